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
        header: dict[str, object] = {}
        at = 0
        for f in fragments:
            end = at + 4 * f.tensor.numel()
            header[tensor_key(f)] = {"dtype": "F32", "shape": [f.tensor.numel()], "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._pinned = bool(fragments) and fragments[0].tensor.is_cuda
        self._body = torch.zeros(at // 4, dtype=torch.float32, pin_memory=self._pinned)
        self._views = list(self._body.split([f.tensor.numel() for f in fragments]))
        self._keys = [tensor_key(f) for f in fragments]

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self._head) + 4 * self._body.numel()

    @torch.no_grad()
    def take(self, fragments: list[Fragment]) -> None:
        """Copy the state; it is safe to train on when this returns. Fragments must be those it was made for."""
        assert [tensor_key(f) for f in fragments] == self._keys, "a rank owns the same fragments for a whole run"
        torch._foreach_copy_(self._views, [f.tensor for f in fragments], non_blocking=self._pinned)
        if self._pinned:
            torch.cuda.synchronize()

    def write(self, path: Path) -> str:
        """Write and fsync the file; return its sha256. Raises NotFiniteError rather than write a NaN."""
        digest = hashlib.sha256(self._head)
        body = self._body.numpy()
        with open(path, "xb", buffering=0) as file, ThreadPoolExecutor(1, "hash") as hashing:
            os.fchmod(file.fileno(), 0o600)
            _write_all(file.fileno(), self._head)
            for at in range(0, len(body), _PIECE // 4):
                piece = body[at : at + _PIECE // 4]
                view = piece.data.cast("B")
                # hashing and writing both leave the interpreter lock, so a piece costs the longer of the two
                hashed = hashing.submit(digest.update, view)
                if not _finite(piece):
                    raise NotFiniteError(self._name_at(at + int(np.flatnonzero(~np.isfinite(piece))[0])))
                _write_all(file.fileno(), view)
                hashed.result()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _name_at(self, element: int) -> str:
        for key, view in zip(self._keys, self._views):
            if element < view.numel():
                return key
            element -= view.numel()
        raise AssertionError("the element lies in the body")


class NotFiniteError(Exception):
    """The state holds a value that is not finite; the argument is the tensor's key."""


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
