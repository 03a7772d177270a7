"""The base of every configuration class, and the three classes a key can have when a run is resumed.

match   the run would not be the same run with another value: refused on resume, with the difference shown
record  may change; the change is written into the run's history
free    may change; nobody needs to know
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

Resume = Literal["match", "record", "free"]


class Config(BaseModel):
    """A frozen section of the configuration. Unknown keys and wrong types are mistakes, never guesses."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def key(default: Any, resume: Resume, doc: str, **limits: Any) -> Any:
    """A field: its default, its resume class, one sentence for the manual, and limits such as `gt=0`."""
    extra: JsonDict = {"resume": resume}
    if isinstance(default, list | dict):
        return Field(default_factory=lambda: type(default)(default), description=doc, json_schema_extra=extra, **limits)
    return Field(default=default, description=doc, json_schema_extra=extra, **limits)


def section(kind: type[BaseModel]) -> Any:
    """A nested section with its own defaults."""
    return Field(default_factory=kind)


def resume_class(info: FieldInfo) -> Resume | None:
    """The resume class that `key()` gave this field, or None for a section."""
    extra = info.json_schema_extra
    return extra.get("resume") if isinstance(extra, dict) else None  # type: ignore[return-value]


def leaves(kind: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every key of a schema that is not itself a section, with its path; `*` stands for names the user chooses."""
    for name, info in kind.model_fields.items():
        nested, named = nested_schema(info), get_origin(info.annotation) is dict
        if nested is not None and named:
            yield from leaves(nested, (*path, name, "*"))
        elif nested is not None and resume_class(info) is None:
            yield from leaves(nested, (*path, name))
        else:
            yield (*path, name), info


def values(config: BaseModel, path: str = "") -> Iterator[tuple[str, Any, Resume]]:
    """Every key of a configuration that is not itself a section: dotted path, plain value, resume class."""
    for name, info in type(config).model_fields.items():
        value, here = getattr(config, name), f"{path}.{name}" if path else name
        resume = resume_class(info)
        if isinstance(value, BaseModel) and resume is None:
            yield from values(value, here)
        elif isinstance(value, dict) and nested_schema(info) is not None:
            for chosen, part in value.items():
                yield from values(part, f"{here}.{chosen}")
        else:
            assert resume is not None, f"{here} has no resume class"
            yield here, _plain(value), resume


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def nested_schema(info: FieldInfo) -> type[BaseModel] | None:
    """The schema of a section, whether it stands alone, in a tuple, or as the values of a mapping."""
    return _schema_in(info.annotation)


def _schema_in(kind: Any) -> type[BaseModel] | None:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    if get_origin(kind) is None:
        return None
    return next(filter(None, (_schema_in(inner) for inner in get_args(kind))), None)
