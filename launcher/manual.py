"""The manual of all keys: `python -m launcher.manual` prints configs/base.yaml, made from the schema itself."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, get_origin

import yaml
from pydantic import BaseModel

from configs.schema import nested_schema, resume_class
from launcher.config import LaunchConfig
from pretrain.config import RunConfig

_HEAD = """\
# Every key there is, with its default. Files of your own hold only what differs; later files and key=value words win.
#   [match]   makes it another run: refused when a run is resumed with another value
#   [record]  may change when a run is resumed; the change is written into its history
#   [free]    may change, and nobody needs to know
# Made from the schema by `python -m launcher.manual`; a test holds the two together.
"""


def manual() -> str:
    """The text of configs/base.yaml."""
    lines: list[str] = [_HEAD.rstrip()]
    for name, info in RunConfig.model_fields.items():
        schema = nested_schema(info)
        assert schema is not None
        lines += ["", f"{name}:  # {_sentence(schema)}", *_keys(schema, 1)]
    lines += ["", f"launch:  # {_sentence(LaunchConfig)}", *_keys(LaunchConfig, 1)]
    return "\n".join(lines) + "\n"


def _keys(schema: type[BaseModel], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, info in schema.model_fields.items():
        inner = nested_schema(info)
        if inner is not None and resume_class(info) is None:
            yield f"{indent}{name}:  # {_sentence(inner)}"
            yield from _keys(inner, depth + 1)
            continue
        comment = f"{info.description or ''} [{resume_class(info)}]"
        yield from (f"{indent}# {line}" for line in textwrap.wrap(comment, 110))
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        yield f"{indent}{name}: {_flow(default)}".rstrip()
        if inner is not None and get_origin(info.annotation) is dict:
            yield f"{indent}#  NAME:"
            yield from (line.replace(indent, f"{indent}#    ", 1) for line in _keys(inner, depth))


def _flow(value: Any) -> str:
    """A default as YAML on one line."""
    if value is None:
        return ""
    plain = json.loads(value.model_dump_json()) if isinstance(value, BaseModel) else value
    if isinstance(value, tuple):
        plain = [json.loads(v.model_dump_json()) if isinstance(v, BaseModel) else v for v in value]
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def _sentence(schema: type[BaseModel]) -> str:
    return (schema.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    print(manual(), end="")
