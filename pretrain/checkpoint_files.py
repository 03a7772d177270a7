"""What a committed checkpoint is: verified without being changed, read by parameter name and range.

Whatever ranks and shards wrote the files, their fragments make up every parameter and every moment.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

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
    """All files of one checkpoint. Raises DataError where their fragments do not cover a tensor exactly."""

    def __init__(self, paths: list[Path], shapes: dict[str, tuple[int, ...]], updates: int) -> None:
        self.shapes, self.updates = shapes, updates
        self._pieces: dict[tuple[str, str], list[tuple[int, int, int, str]]] = {}
        self._files = []
        for number, path in enumerate(paths):
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise DataError(f"{path} cannot be read ({error}); restore the checkpoint from a copy") from None
            self._files.append(file)
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                name, kind, offset = parse_key(key)
                count = file.get_slice(key).get_shape()[0]
                self._pieces.setdefault((name, kind), []).append((offset, offset + count, number, key))
        for pieces in self._pieces.values():
            pieces.sort()
        self._check()

    def kinds(self, name: str) -> list[str]:
        """What is kept for a parameter: `param` and the names of its moments."""
        return [kind for owner, kind in self._pieces if owner == name]

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flat parameter, buffer or moment, 1-D: fp32, or int64 for whole numbers."""
        if (name, kind) not in self._pieces:
            raise DataError(
                f"the checkpoint holds no {kind} of {name}; it was made by another model or optimizer, so resume with"
                " the configuration that made it"
            )
        parts = []
        for begin, end, number, key in self._pieces[name, kind]:
            low, high = max(start, begin), min(stop, end)
            if low < high:
                parts.append(self._files[number].get_slice(key)[low - begin : high - begin])
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def tensor(self, name: str, kind: str = PARAM) -> Tensor:
        """A whole parameter, buffer or moment in its shape."""
        shape = self.shapes[name]
        return self.read(name, kind, 0, prod(shape)).view(shape)

    def _check(self) -> None:
        for (name, kind), pieces in self._pieces.items():
            at = 0
            for begin, end, _, _ in pieces:
                if begin != at:
                    break
                at = end
            if at != prod(self.shapes.get(name, ())) or name not in self.shapes:
                raise DataError(
                    f"the fragments of {name} ({kind}) cover {at} of {prod(self.shapes.get(name, (0,)))} values"
                )
        missing = [name for name in self.shapes if (name, PARAM) not in self._pieces]
        if missing:
            raise DataError(f"the checkpoint has no values for {missing[0]}; restore it from a copy")


def verify(path: Path, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with a checkpoint folder, or None. Of `world` ranks, each hashes its share of the files."""
    try:
        manifest = read_manifest(path)
    except DataError as error:
        return str(error)
    expected = {note["name"]: note for note in manifest["files"]}
    strays = sorted(p.name for p in path.iterdir() if p.name not in expected and p.name != MANIFEST)
    if strays:
        return f"it holds {strays[0]}, which its manifest does not name"
    for number, (name, note) in enumerate(expected.items()):
        file = path / name
        size = file.stat().st_size if file.is_file() and not file.is_symlink() else None
        if size != note["bytes"]:
            return f"{name} {'is missing' if size is None else f'size {size}'}, manifest says {note['bytes']}"
        if number % world == rank and (found := sha256_file(file)) != note["sha256"]:
            return f"{name} sha256 {found[:12]}…, manifest says {note['sha256'][:12]}…"
    return None


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


def open_files(checkpoint: Checkpoint) -> CheckpointFiles:
    """The tensors of a verified checkpoint."""
    paths = [checkpoint.path / note["name"] for note in checkpoint.facts["files"]]
    shapes = {name: tuple(shape) for name, shape in checkpoint.facts["shapes"].items()}
    return CheckpointFiles(paths, shapes, checkpoint.facts["updates"])


def own_hash(manifest: dict[str, Any]) -> str:
    """The hash that a manifest carries of its own content."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
