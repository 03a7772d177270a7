"""What tests of sources read by: all documents of a path, and files made for it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from data_pipeline import corpora
from data_pipeline.config import SourceConfig
from data_pipeline.documents import Document

MIB = 1 << 20
PROPERTY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_all(path: object, slice_bytes: int = MIB, **keys: object) -> list[Document]:
    plan = corpora.plan("s", SourceConfig(path=str(path), **keys), slice_bytes)
    assert [part.number for part in plan.slices] == list(range(len(plan.slices)))
    return [document for part in plan.slices for document in corpora.read(part)]


def texts(path: object, slice_bytes: int = MIB, **keys: object) -> list[str]:
    return [document.text for document in read_all(path, slice_bytes, **keys)]


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def make_tar(path: Path, members: list[tuple[str, bytes]], **kind: Any) -> Path:
    with tarfile.open(path, "w", **kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
