"""A copy of a rank's state in host memory, laid out as the file it becomes.

The buffer is allocated and touched once and reused, so that what training waits for is one copy of memory. It is the
image of a safetensors file: a writer only streams it out.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from pretrain.engine import Fragment

_PIECE = 8 << 20


class Snapshot:
    """One rank's staging buffer."""

    def __init__(self, fragments: list[Fragment]) -> None:
        self._keys = [tensor_key(f) for f in fragments]
        self._pinned = bool(fragments) and fragments[0].tensor.is_cuda
        header: dict[str, object] = {}
        views: dict[str, torch.Tensor] = {}
        self._bodies: list[torch.Tensor] = []
        # whole numbers come first, so that all of them lie at multiples of 8 bytes
        for dtype, label in ((torch.int64, "I64"), (torch.float32, "F32")):
            mine = [f for f in fragments if saved_dtype(f) == dtype]
            body = torch.zeros(sum(f.tensor.numel() for f in mine), dtype=dtype, pin_memory=self._pinned)
            at = sum(other.nbytes for other in self._bodies)
            for f, view in zip(mine, body.split([f.tensor.numel() for f in mine])):
                header[tensor_key(f)] = {"dtype": label, "shape": [len(view)], "data_offsets": [at, at + view.nbytes]}
                views[tensor_key(f)] = view
                at += view.nbytes
            self._bodies.append(body)
        self._views = [views[key] for key in self._keys]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self._head) + sum(body.nbytes for body in self._bodies)

    @torch.no_grad()
    def take(self, fragments: list[Fragment]) -> None:
        """Copy the state; it is safe to train on when this returns. Fragments must be those it was made for."""
        assert [tensor_key(f) for f in fragments] == self._keys, "a rank owns the same fragments for a whole run"
        if not self._keys:  # of a small model on many ranks not every one owns a part
            return
        torch._foreach_copy_(self._views, [f.tensor for f in fragments], non_blocking=self._pinned)
        if self._pinned:
            torch.cuda.synchronize()

    def write(self, path: Path) -> str:
        """Write and fsync the file; return its sha256. Raises NotFiniteError rather than write a NaN."""
        digest = hashlib.sha256(self._head)
        with open(path, "xb", buffering=0) as file, ThreadPoolExecutor(1, "hash") as hashing:
            os.fchmod(file.fileno(), 0o600)
            _write_all(file.fileno(), self._head)
            for body in self._bodies:
                step = _PIECE // body.itemsize
                for at in range(0, len(body), step):
                    piece = body[at : at + step].numpy()
                    view = piece.data.cast("B")
                    # hashing and writing both leave the interpreter lock, so a piece costs the longer of the two
                    hashed = hashing.submit(digest.update, view)
                    if body.is_floating_point() and not _finite(piece):
                        raise NotFiniteError(self._first_not_finite())
                    _write_all(file.fileno(), view)
                    hashed.result()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _first_not_finite(self) -> str:
        return next(key for key, view in zip(self._keys, self._views) if not torch.isfinite(view).all())


class NotFiniteError(Exception):
    """The state holds a value that is not finite; the argument is the tensor's key."""


def saved_dtype(fragment: Fragment) -> torch.dtype:
    """The type that a fragment has in a file."""
    return torch.float32 if fragment.tensor.is_floating_point() else torch.int64


def tensor_key(fragment: Fragment) -> str:
    """The name of a fragment's tensor in a file."""
    return f"{fragment.name}|{fragment.kind}|{fragment.offset}"


def parse_key(key: str) -> tuple[str, str, int]:
    """Parameter, kind and offset out of a tensor's name."""
    name, kind, offset = key.rsplit("|", 2)
    return name, kind, int(offset)


def _finite(values: np.ndarray) -> bool:
    """Whether every value is finite: 0 times anything else is NaN. A product with zeros reads memory at full speed."""
    with np.errstate(invalid="ignore"):
        for at in range(0, len(values), len(_ZEROS)):
            part = values[at : at + len(_ZEROS)]
            if np.dot(part, _ZEROS[: len(part)]) != 0.0:
                return False
    return True


_ZEROS = np.zeros(1 << 16, dtype=np.float32)


def _write_all(handle: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
