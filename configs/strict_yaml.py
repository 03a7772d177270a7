"""YAML without its surprises: every value keeps its line, and nothing is guessed.

PyYAML reads `3e-4` as text and `no` as false, lets the second of two equal keys win, and follows aliases. Here numbers
are numbers, only `true` and `false` are booleans, a key stands once, and anchors, aliases and tags are refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]

MAX_BYTES = 1 << 20
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a file and a line, or a word of the command line (`line` is 0)."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass
class Parsed:
    """A tree of plain values, where each was written, and what was wrong with the writing."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, Origin] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)


def parse_file(path: Path) -> Parsed:
    """Read one YAML file whose top level is a mapping."""
    parsed = Parsed()
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            parsed.mistakes.append(f"{path}: {size:,} bytes is no configuration; the limit is {MAX_BYTES:,}")
            return parsed
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        parsed.mistakes.append(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text")
        return parsed
    except OSError as error:
        parsed.mistakes.append(f"{path}: cannot be read ({error.strerror}); check the path")
        return parsed
    _parse(text, str(path), parsed)
    return parsed


def parse_value(text: str, source: str, key: Key) -> Parsed:
    """Read the right-hand side of a `key=value` word; the value is put at `key`."""
    parsed = Parsed()
    node = _compose(text, source, parsed, one_line=True)
    value = _value(node, key, source, parsed, has_lines=False) if node is not None else None
    parsed.origins[key] = Origin(source, 0)
    for part in reversed(key[1:]):
        value = {part: value}
    parsed.tree = {str(key[0]): value}
    return parsed


def _parse(text: str, source: str, parsed: Parsed) -> None:
    node = _compose(text, source, parsed)
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        parsed.mistakes.append(f"{source}:1: the file holds a {_shape(node)}, not `key: value` lines")
        return
    parsed.tree = _value(node, (), source, parsed)


def _compose(text: str, source: str, parsed: Parsed, *, one_line: bool = False) -> yaml.Node | None:
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AnchorToken | yaml.AliasToken | yaml.TagToken):
                where = source if one_line else f"{source}:{token.start_mark.line + 1}"
                parsed.mistakes.append(f"{where}: anchors, aliases and tags are not used here; write the value out")
                return None
            if one_line and isinstance(token, yaml.DocumentStartToken | yaml.DocumentEndToken | yaml.DirectiveToken):
                parsed.mistakes.append(f"{source}: {text!r} is no value to YAML; put it in quotes")
                return None
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}:{mark.column + 1}" if mark and not one_line else ""
        parsed.mistakes.append(f"{source}{line}: not valid YAML ({_first_line(error.problem)}); check the indentation")
    except yaml.YAMLError as error:
        parsed.mistakes.append(f"{source}: not valid YAML ({_first_line(str(error))}); save it as plain text")
    except RecursionError:
        parsed.mistakes.append(f"{source}: nested too deeply for a configuration; flatten it")
    return None


def _value(node: yaml.Node, key: Key, source: str, parsed: Parsed, *, has_lines: bool = True) -> Any:
    """Turn a node into plain values, noting the line of each."""
    line = node.start_mark.line + 1 if has_lines else 0
    parsed.origins[key] = Origin(source, line)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(child, (*key, i), source, parsed, has_lines=has_lines) for i, child in enumerate(node.value)]
    out: dict[str, Any] = {}
    for name_node, child in node.value:
        where = Origin(source, name_node.start_mark.line + 1 if has_lines else 0)
        name = name_node.value if isinstance(name_node, yaml.ScalarNode) else None
        if name is None:
            parsed.mistakes.append(f"{where}: a key must be a word")
            continue
        if name in out:
            first = parsed.origins[(*key, name)]
            parsed.mistakes.append(f"{where}: key {dotted((*key, name))!r} stands twice (first at {first}); keep one")
            continue
        out[name] = _value(child, (*key, name), source, parsed, has_lines=has_lines)
        parsed.origins[(*key, name)] = where
    return out


def _scalar(node: yaml.ScalarNode) -> Any:
    """The YAML 1.2 core reading of a plain scalar, without infinities; quoted text stays text."""
    text = node.value
    if node.style is not None:
        return text
    if text in ("", "~", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if _INT.fullmatch(text) and len(text) <= 40:
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(number := float(text)):
        return number
    return text


def dotted(key: Key) -> str:
    """`model.mixers[0].name` for ("model", "mixers", 0, "name")."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _shape(node: yaml.Node) -> str:
    return "list" if isinstance(node, yaml.SequenceNode) else "single value"


def _first_line(text: str | None) -> str:
    lines = (text or "unreadable").strip().splitlines()
    return lines[0] if lines else "unreadable"
