"""Text that every machine has: sources and documentation of Python's library, C++ headers, character names.

Nothing is imported or executed to read it: documentation strings are found by parsing.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sysconfig
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from configs.errors import DataError
from data_pipeline.documents import Document, Part, document

BLOCK = 256
_PLANES = 0x110000
_CODE_POINTS_A_PART = 16 * BLOCK
_BYTES_A_NAME = 40  # about; only progress depends on it
_DOCS_SHARE = 7  # one byte of documentation in so many of source
_TOPICS = "pydoc_data/topics.py"
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
_TESTS = {"test", "tests", "idle_test"}
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def parts_of(name: str) -> list[Part]:
    """The parts of an embedded corpus, in a stable order. Raises DataError where this machine lacks it."""
    return _CORPORA[name]()


def read_part(part: Part) -> Iterator[Document]:
    """The documents of one part."""
    if part.kind == "unicode":
        yield from _character_names(part.begin, part.end)
        return
    root = _headers_root() if part.kind == "headers" else _stdlib_root()
    content = (root / part.path).read_bytes()
    if len(content) != part.size:
        raise DataError(f"{part.name} changed while it was being read; build again when Python is installed")
    if part.kind == "docs":
        yield from _docstrings(part.name, content)
    elif part.kind == "topics":
        yield from _topics(part.name, content)
    else:
        yield document(part.name, content)


def _stdlib() -> list[Part]:
    root = _stdlib_root()
    return [Part("stdlib", name, name, size, size) for name, size in _files(root, (".py",), _NOT_LIBRARY)]


def _headers() -> list[Part]:
    root = _headers_root()
    return [Part("headers", name, name, size, size) for name, size in _files(root, (".h", ".hpp", ".cuh"), set())]


def _docs() -> list[Part]:
    files = _files(_stdlib_root(), (".py",), _NOT_LIBRARY | _TESTS)
    parts = [Part("docs", name, name, size, size // _DOCS_SHARE) for name, size in files]
    return [replace(p, kind="topics", text_bytes=p.size or 0) if p.path == _TOPICS else p for p in parts]


def _unicode() -> list[Part]:
    # the names grow with Python's version, so the version is part of what the documents were made from
    name = f"unicode-{unicodedata.unidata_version}"
    starts = range(0, _PLANES, _CODE_POINTS_A_PART)
    named = [sum(1 for c in range(a, a + _CODE_POINTS_A_PART) if unicodedata.name(chr(c), "")) for a in starts]
    return [
        Part("unicode", name, name, None, count * _BYTES_A_NAME, start, start + _CODE_POINTS_A_PART)
        for start, count in zip(starts, named)
        if count
    ]


_CORPORA: dict[str, Callable[[], list[Part]]] = {
    "stdlib": _stdlib,
    "headers": _headers,
    "docs": _docs,
    "unicode": _unicode,
}
EMBEDDED = tuple(_CORPORA)


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _headers_root() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise DataError("the corpus `headers` ships with torch, which is not installed; run `pip install torch`")
    return Path(next(iter(found.submodule_search_locations))) / "include"


def _files(root: Path, suffixes: tuple[str, ...], leave_out: set[str]) -> list[tuple[str, int]]:
    """Relative names and sizes of the files below `root`, sorted."""
    out = []
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in leave_out]
        paths = [Path(parent, name) for name in files if name.endswith(suffixes)]
        out += [(path.relative_to(root).as_posix(), path.stat().st_size) for path in paths if path.is_file()]
    if not out:
        raise DataError(f"no {suffixes[0]} files in {root}; install them, or leave this corpus out")
    return sorted(out)


def _docstrings(name: str, source: bytes) -> Iterator[Document]:
    """One document a module: its documentation, then that of each class and function under its name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the sources are not our concern
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    texts = [f"{where}\n\n{text}\n" for where, text in _documented(tree, module)]
    if texts:
        yield document(name, "\n\n".join(texts))


def _documented(node: _Documented, name: str) -> Iterator[tuple[str, str]]:
    """Every documented thing below `node` with its dotted name, in the order of the file."""
    text = ast.get_docstring(node)
    if text:
        yield name, text
    for child in node.body:
        if isinstance(child, _Documented):
            yield from _documented(child, f"{name}.{child.name}")


def _topics(name: str, source: bytes) -> Iterator[Document]:
    """The pages of Python's reference manual that `help()` shows."""
    for node in ast.parse(source).body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            pages = ast.literal_eval(value)
            for topic in sorted(pages):
                yield document(f"{name}/{topic}", str(pages[topic]))


def _character_names(begin: int, end: int) -> Iterator[Document]:
    """One document for each 256 code points of which any has a name."""
    for start in range(begin, end, BLOCK):
        lines = [
            f"U+{code:04X} {chr(code)} {name}\n"
            for code in range(start, start + BLOCK)
            if (name := unicodedata.name(chr(code), ""))
        ]
        if lines:
            yield document(f"U+{start:04X}", "".join(lines))
