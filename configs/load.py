"""YAML files, then `key=value` words, merged left to right into one frozen configuration.

Nothing else is looked at: no includes, no interpolation, no environment. All mistakes are told at once, each with
the file and line it was written in, what was found, what is allowed, and the nearest key that exists.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import ConfigError, UsageError
from configs.schema import leaves, nested_schema
from configs.strict_yaml import Key, Origin, Parsed, dotted, parse_file, parse_value

S = TypeVar("S", bound=BaseModel)

PACKAGED = Path(__file__).parent


@dataclass
class Layers:
    """Merged plain values and the place each was written."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, Origin] = field(default_factory=dict)

    def origin(self, key: Key) -> str:
        """Where `key` was written, or the nearest section above it that was written anywhere."""
        for end in range(len(key), -1, -1):
            if key[:end] in self.origins:
                return str(self.origins[key[:end]])
        return "defaults"

    def under(self, key: Key) -> Layers:
        """The part below `key`, with its origins."""
        tree: Any = self.tree
        for part in key:
            tree = tree[part]
        below = {k[len(key) :]: o for k, o in self.origins.items() if k[: len(key)] == key}
        return Layers(tree, below)


def find(name: str | Path) -> Path:
    """A configuration file by path, or by its name among those that come with the package (`demo`, `engine/zero2`)."""
    path = Path(name)
    if path.is_file():
        return path
    packaged = PACKAGED / path.with_suffix(".yaml")
    if not path.is_absolute() and ".." not in path.parts and packaged.is_file():
        return packaged
    known = sorted(str(p.relative_to(PACKAGED).with_suffix("")) for p in PACKAGED.rglob("*.yaml"))
    near = difflib.get_close_matches(path.with_suffix("").as_posix(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"those that come along: {', '.join(known)}"
    raise UsageError(f"no configuration file {str(name)!r} here; {hint}")


def read(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Layers:
    """Read and merge; raise ConfigError with every mistake of writing."""
    layers, mistakes = Layers(), []
    for parsed in [parse_file(find(f)) for f in files] + [_parse_override(word) for word in overrides]:
        mistakes += parsed.mistakes
        _lay_over(layers, parsed)
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return layers


def load(schema: type[S], files: Sequence[str | Path], overrides: Sequence[str] = ()) -> S:
    """`schema` filled from files (later wins), then from `key=value` words."""
    return build(schema, read(files, overrides))


def build(schema: type[S], layers: Layers, where: Key = ()) -> S:
    """Check merged values against a schema; raise ConfigError with every mistake. `where` prefixes the keys named."""
    try:
        return schema.model_validate_json(json.dumps(layers.tree), strict=True)
    except ValidationError as error:
        lines = [_sentence(mistake, schema, layers, where) for mistake in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def to_yaml(config: BaseModel) -> str:
    """The configuration as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True, width=110)


def _parse_override(word: str) -> Parsed:
    name, equals, text = word.partition("=")
    parts = tuple(name.split("."))
    source = f"the word {word!r}"
    if not equals or not all(parts):
        parsed = Parsed()
        parsed.mistakes.append(f"{source} is not key=value; write for example optim.lr=3e-4")
        return parsed
    return parse_value(text, source, parts)


def _lay_over(layers: Layers, parsed: Parsed) -> None:
    layers.tree = _merge(layers.tree, parsed.tree, (), layers.origins)
    # what spans sections is nobody's mistake in particular, least of all the last file's
    layers.origins |= {key: origin for key, origin in parsed.origins.items() if key}


def _merge(low: Mapping[str, Any], high: Mapping[str, Any], at: Key, origins: dict[Key, Origin]) -> dict[str, Any]:
    """`low` with `high` laid over it, mapping by mapping; what is replaced loses its origins."""
    out = dict(low)
    for name, value in high.items():
        here = (*at, name)
        if isinstance(value, Mapping) and isinstance(out.get(name), Mapping):
            out[name] = _merge(out[name], value, here, origins)
        else:
            for stale in [k for k in origins if k[: len(here)] == here]:
                del origins[stale]
            out[name] = value
    return out


_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of `key: value` lines",
    "model_type": "a section of `key: value` lines",
    "model_attributes_type": "a section of `key: value` lines",
}
_LIMITS = {"greater_than": ("gt", ">"), "greater_than_equal": ("ge", ">="), "less_than": ("lt", "<"),
           "less_than_equal": ("le", "<="), "multiple_of": ("multiple_of", "a multiple of")}  # fmt: skip


def _sentence(mistake: Any, schema: type[BaseModel], layers: Layers, where: Key) -> str:
    """One mistake of pydantic's as: origin, key, found, allowed, what to do."""
    loc: Key = tuple(mistake["loc"])
    name, origin, kind = dotted((*where, *loc)), layers.origin(loc), mistake["type"]
    found = mistake["input"]
    if kind == "extra_forbidden":
        return f"{origin}: unknown key {name!r}; {_nearest(schema, loc, where)}"
    if kind == "missing":
        above = layers.origin(loc[:-1])
        return f"{above}: key {name!r} is missing; add it"
    if kind == "value_error":
        text = str(mistake["ctx"]["error"])
        return f"{origin}: {name + ' ' if name else ''}{text}"
    if kind in ("literal_error", "enum"):
        allowed = mistake["ctx"]["expected"]
        words = [w.strip("' ") for w in allowed.replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(str(found), words, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{origin}: {name} is {_show(found)}, not one of {', '.join(words)}{hint}"
    if kind in _LIMITS:
        limit, sign = _LIMITS[kind]
        return f"{origin}: {name} is {_show(found)}; it must be {sign} {mistake['ctx'][limit]}"
    wanted = _EXPECTED.get(kind)
    if wanted is None:
        return f"{origin}: {name} is {_show(found)}: {mistake['msg'][0].lower() + mistake['msg'][1:]}"
    return f"{origin}: {name} is {_show(found)} ({_kind(found)}), not {wanted}"


def _show(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true/false", list: "a list"}
    names |= {dict: "a section", type(None): "empty"}
    return names.get(type(value), type(value).__name__)


def _nearest(schema: type[BaseModel], loc: Key, where: Key) -> str:
    """The key that was probably meant: a sibling first, then any key of the tree with that last word."""
    siblings = _siblings(schema, loc)
    near = difflib.get_close_matches(str(loc[-1]), siblings, n=1, cutoff=0.5)
    if near:
        return f"did you mean {dotted((*where, *loc[:-1], near[0]))!r}?"
    paths = {".".join(path): path[-1] for path, _ in leaves(schema)}
    elsewhere = [path for path, last in paths.items() if last == loc[-1]]
    if elsewhere:
        return f"did you mean {dotted((*where, elsewhere[0]))!r}?"
    return f"known keys here: {', '.join(siblings) or 'none'}"


def _siblings(schema: type[BaseModel], loc: Key) -> list[str]:
    """The keys that are known where the last part of `loc` stands."""
    kind: type[BaseModel] | None = schema
    for part in loc[:-1]:
        if kind is None:
            return []
        info = kind.model_fields.get(str(part)) if isinstance(part, str) else None
        kind = nested_schema(info) if info is not None else kind
    return list(kind.model_fields) if kind is not None else []
