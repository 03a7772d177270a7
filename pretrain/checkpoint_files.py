"""What a committed checkpoint is: verified without being changed, read by parameter name and range.

Whatever ranks and shards wrote the files, their fragments make up every parameter and every moment.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import stat
from bisect import insort
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import DataError
from data_pipeline.files import sha256_file
from pretrain.engine import PARAM
from pretrain.run_folder import RunFolder, step_name
from pretrain.snapshot import parse_key

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest was read and verified. facts: the manifest's content."""

    step: int
    path: Path
    facts: dict[str, Any]


class CheckpointFiles:
    """All files of one checkpoint. Raises DataError where their fragments do not cover a tensor exactly.

    near: the number of the file that most of what is asked for lies in. Others are opened only as far as it takes, from
    there on: of as many ranks as wrote a checkpoint, each opens its own. None: all are opened, and checked, at once.
    """

    def __init__(
        self, paths: list[Path], shapes: dict[str, tuple[int, ...]], updates: int, near: int | None = None
    ) -> None:
        self.shapes, self.updates, self._paths = shapes, updates, paths
        self._pieces: dict[tuple[str, str], list[_Piece]] = {}
        self._files: dict[int, safe_open] = {}
        # what every rank has, rank 0 saves
        order = range(len(paths)) if near is None else sorted(range(len(paths)), key=lambda n: (n != 0, abs(n - near)))
        self._unopened = list(reversed(order))
        if near is None:
            while self._unopened:
                self._open(self._unopened.pop())
            self._check()
        elif near in self._unopened:
            self._unopened.remove(near)
            self._open(near)

    @property
    def opened(self) -> int:
        """How many of the files it took so far."""
        return len(self._files)

    def kinds(self, name: str) -> list[str]:
        """What is kept for a parameter, in the files that were opened: `param` and the names of its moments."""
        return [kind for owner, kind in self._pieces if owner == name]

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flat parameter, buffer or moment, 1-D: fp32, or int64 for whole numbers."""
        while (found := self._found(name, kind, start, stop)) is None:
            if not self._unopened:
                raise DataError(self._lacks(name, kind))
            self._open(self._unopened.pop())
        spans = [(piece, max(start, piece.begin), min(stop, piece.end)) for piece in found]
        parts = [self._files[p.file].get_slice(p.key)[low - p.begin : high - p.begin] for p, low, high in spans]
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def tensor(self, name: str, kind: str = PARAM) -> Tensor:
        """A whole parameter, buffer or moment in its shape."""
        shape = self.shapes[name]
        return self.read(name, kind, 0, prod(shape)).view(shape)

    def _open(self, number: int) -> None:
        path = self._paths[number]
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} cannot be read ({error}); restore the checkpoint from a copy") from None
        self._files[number] = file
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            name, kind, offset = parse_key(key)
            count = file.get_slice(key).get_shape()[0]
            insort(self._pieces.setdefault((name, kind), []), _Piece(offset, offset + count, number, key))

    def _found(self, name: str, kind: str, start: int, stop: int) -> list[_Piece] | None:
        """The pieces that make up a range, one after the other; None where some are in files not yet opened."""
        at, parts = start, list[_Piece]()
        for piece in self._pieces.get((name, kind), []):
            if piece.begin < stop and piece.end > start:
                if piece.begin > at or (parts and piece.begin != at):
                    return None
                parts.append(piece)
                at = piece.end
        return parts if parts and at >= stop else None

    def _lacks(self, name: str, kind: str) -> str:
        if (name, kind) in self._pieces:
            return self._uncovered(name, kind)
        return (
            f"the checkpoint holds no {kind} of {name}; it was made by another model or optimizer, so resume with the"
            " configuration that made it"
        )

    def _check(self) -> None:
        for name, kind in self._pieces:
            if name not in self.shapes or self._covered(name, kind) != prod(self.shapes[name]):
                raise DataError(self._uncovered(name, kind))
        missing = [name for name in self.shapes if (name, PARAM) not in self._pieces]
        if missing:
            raise DataError(f"the checkpoint has no values for {missing[0]}; restore it from a copy")

    def _covered(self, name: str, kind: str) -> int:
        """How many values there are from the first on without a gap or an overlap."""
        at = 0
        for piece in self._pieces[name, kind]:
            if piece.begin != at:
                break
            at = piece.end
        return at

    def _uncovered(self, name: str, kind: str) -> str:
        wanted = prod(self.shapes.get(name, (0,)))
        return (
            f"the fragments of {name} ({kind}) cover {self._covered(name, kind)} of {wanted} values; restore the"
            " checkpoint from a copy"
        )


class _Piece(NamedTuple):
    """Elements [begin, end) of a flat tensor, under `key` in a file."""

    begin: int
    end: int
    file: int
    key: str


def verify(path: Path, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with a checkpoint folder, or None. Of `world` ranks, each looks at its share of the files."""
    try:
        manifest = read_manifest(path)
    except DataError as error:
        return str(error)
    expected = {note["name"]: note for note in manifest["files"]}
    strays = sorted(set(os.listdir(path)) - {*expected, MANIFEST}) if rank == 0 else []
    if strays:
        return f"it holds {strays[0]}, which its manifest does not name"
    for name, note in itertools.islice(expected.items(), rank, None, world):
        file = path / name
        size = _size(file)
        if size != note["bytes"]:
            return f"{name} {'is missing' if size is None else f'size {size}'}, manifest says {note['bytes']}"
        if (found := sha256_file(file)) != note["sha256"]:
            return f"{name} sha256 {found[:12]}…, manifest says {note['sha256'][:12]}…"
    return None


def _size(file: Path) -> int | None:
    """Of a file, by one look; None where there is none, or a link."""
    try:
        found = file.lstat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def newest_readable(folder: RunFolder, only: int | None = None) -> Checkpoint:
    """The newest checkpoint of a run that verifies, or the one of step `only`; nothing is changed in the folder.

    Raises DataError where there is none.
    """
    steps = folder.committed_steps()
    if only is not None and only not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise DataError(f"{folder.path} has no checkpoint of step {only}; there is {there}")
    mistakes = []
    for step in [only] if only is not None else steps:
        path = folder.checkpoints / step_name(step)
        mistake = verify(path)
        if mistake is None:
            return Checkpoint(step, path, read_manifest(path))
        mistakes.append(f"{path.name}: {mistake}")
    found = f"({'; '.join(mistakes)})" if mistakes else "(there is none)"
    raise DataError(f"{folder.path} has no valid checkpoint {found}; train it first, or restore one from a copy")


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest, checked against its own hash. Raises DataError."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        stated = manifest.pop("sha256")
    except FileNotFoundError:
        raise DataError(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, AttributeError):
        raise DataError(f"{MANIFEST} is not what was written") from None
    if stated != own_hash(manifest):
        raise DataError(f"{MANIFEST} says sha256 {stated[:12]}…, its content has {own_hash(manifest)[:12]}…")
    if manifest["format"] != FORMAT:
        raise DataError(f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}")
    if any(Path(note["name"]).name != note["name"] for note in manifest["files"]):
        raise DataError(f"{MANIFEST} names a file outside its folder")
    return manifest


def open_files(checkpoint: Checkpoint, rank: int | None = None, world: int = 1) -> CheckpointFiles:
    """The tensors of a verified checkpoint; for one rank of `world`, where it reads no more than its own."""
    paths = [checkpoint.path / note["name"] for note in checkpoint.facts["files"]]
    shapes = {name: tuple(shape) for name, shape in checkpoint.facts["shapes"].items()}
    near = None if rank is None else (2 * rank + 1) * len(paths) // (2 * world)
    return CheckpointFiles(paths, shapes, checkpoint.facts["updates"], near)


def own_hash(manifest: dict[str, Any]) -> str:
    """The hash that a manifest carries of its own content."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
