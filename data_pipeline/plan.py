"""What a build is made from, and whether a folder belongs to it.

The plan is written into the folder before anything else. Another build of the same plan goes on where the first one
stopped, or finds that all is done; a build of another plan is told what differs, and touches nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, DataError
from data_pipeline import tokenizer as tokenizers
from data_pipeline.config import DataConfig
from data_pipeline.corpora import Plan
from data_pipeline.files import sha256_file, write_whole
from data_pipeline.inspect_shards import load_manifest
from data_pipeline.manifest import HEADER, TABLE, Manifest
from data_pipeline.places import RECORDS, public

PLAN = "plan.json"
FORMAT = 1

_DRAFT = re.compile(r"\..+\.[0-9]+\.tmp")
_SHARD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*-(train|heldout)-[0-9]{5,}-[0-9]{2,}\.tar")
_RECORD = re.compile(r"(scan|encode)-[A-Za-z0-9_-]+\.(json|hashes)")


def identity(data: DataConfig, plans: dict[str, Plan]) -> dict[str, Any]:
    """All that the shards depend on: equal identities give equal bytes. Of paths it holds only those configured."""
    tokenizer: dict[str, Any] = {"spec": data.tokenizer}
    if tokenizers.is_trained(data.tokenizer):
        tokenizer["sample_mib"] = data.tokenizer_sample_mib
    elif data.tokenizer != "bytes":
        tokenizer = {"model_sha256": sha256_file(Path(data.tokenizer).expanduser())}
    return {
        "format": FORMAT,
        "tokenizer": tokenizer,
        "heldout": data.heldout,
        "unicode_errors": data.unicode_errors,
        "duplicates": data.duplicates,
        "shard_mib": data.shard_mib,
        "sources": {name: _source(data, name, plan) for name, plan in plans.items()},
    }


def _source(data: DataConfig, name: str, plan: Plan) -> dict[str, Any]:
    source = data.sources[name]
    digest = hashlib.sha256()
    sizes: dict[str, int] = {}
    for part in (part for one in plan.slices for part in one.parts):
        sizes[part.name] = part.size or 0
        digest.update(json.dumps([part.kind, part.name, part.size, part.begin, part.end]).encode())
    return {
        "path": public(source.path),
        "field": source.field,
        "separator": source.separator,
        "limit_mib": source.limit_mib,
        "files": len(sizes),
        "bytes": sum(sizes.values()),
        "files_sha256": digest.hexdigest(),
    }


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder, and keep other builds out of it. Raises ConfigError when one is at work there."""
    try:
        (out / RECORDS).mkdir(parents=True, exist_ok=True)
        file = open(out / RECORDS / "lock", "ab")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ConfigError(f"data.dir {out} cannot be written ({error.strerror}); choose another data.dir") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another build is at work in {out}; wait for it, or choose another data.dir") from None
        except OSError as error:
            # some cluster file systems have no locks; records and renames keep the shards whole there too
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
        yield


@dataclass(frozen=True)
class Folder:
    """A folder that this build may write into."""

    path: Path

    def claim(self, plan: dict[str, Any]) -> Manifest | None:
        """Make the folder this plan's; the manifest, if an earlier build of it was finished and nothing is missing.

        Raises ConfigError when the folder belongs to another plan.
        """
        earlier = self._earlier()
        if earlier is None:
            for name in (tokenizers.HEADER, tokenizers.MODEL):
                (self.path / name).unlink(missing_ok=True)  # of some other build, and nobody can say which
            write_whole(self.path / RECORDS / PLAN, json.dumps(plan, indent=1).encode())
        elif earlier != plan:
            different = "; ".join(_differences(earlier, plan)) or "an earlier version of this program made them"
            raise ConfigError(
                f"{self.path} holds shards of another build ({different}); choose another data.dir, or build with"
                " rebuild to replace them"
            )
        self.remove_drafts()
        finished = self._finished()
        if finished is None:
            # while work is going on, nothing may say that it is done
            (self.path / HEADER).unlink(missing_ok=True)
        return finished

    def clear(self) -> None:
        """Remove what builds have written here, and nothing else."""
        (self.path / HEADER).unlink(missing_ok=True)
        for name in (TABLE, tokenizers.HEADER, tokenizers.MODEL, f"{RECORDS}/{PLAN}"):
            (self.path / name).unlink(missing_ok=True)
        _remove(self.path, _SHARD)
        _remove(self.path / RECORDS, _RECORD)

    def remove_drafts(self) -> None:
        """Remove what killed builds have begun and not finished."""
        for folder in (self.path, self.path / RECORDS):
            _remove(folder, _DRAFT)

    def _earlier(self) -> dict[str, Any] | None:
        try:
            earlier = json.loads((self.path / RECORDS / PLAN).read_bytes())
        except FileNotFoundError:
            if not (self.path / HEADER).exists():
                return None
            raise ConfigError(
                f"{self.path} holds shards, and no plan says what they were made from; choose another data.dir,"
                " or build with rebuild to replace them"
            ) from None
        except ValueError:
            earlier = {}
        return earlier if isinstance(earlier, dict) else {}

    def _finished(self) -> Manifest | None:
        """The manifest, if all it names is here in the right size; `data check` compares every byte."""
        try:
            manifest = load_manifest(self.path)
            tokenizer = tokenizers.load_folder(self.path)
            sizes = [(self.path / name).stat().st_size for name in manifest.table["name"].to_pylist()]
        except (DataError, FileNotFoundError):
            return None
        whole = tokenizer.sha256 == manifest.tokenizer.sha256 and sizes == manifest.column("bytes").tolist()
        return manifest if whole else None


def _remove(folder: Path, pattern: re.Pattern[str]) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if pattern.fullmatch(path.name) and (path.is_file() or path.is_symlink()):
            path.unlink(missing_ok=True)


def _differences(earlier: dict[str, Any], now: dict[str, Any], above: str = "") -> Iterator[str]:
    """What was then and is now, key by key; hashes only where nothing else shows the difference."""
    changed = [name for name in [*earlier, *(n for n in now if n not in earlier)] if earlier.get(name) != now.get(name)]
    shown = [name for name in changed if not name.endswith("_sha256")]
    for name in shown or changed:
        then, here = earlier.get(name), now.get(name)
        if isinstance(then, dict) and isinstance(here, dict):
            yield from _differences(then, here, f"{above}{name}.")
        elif name.endswith("_sha256"):
            yield f"{above}{name.removesuffix('_sha256')}: others than now"
        else:
            yield f"{above}{name}: {_short(then)} there, {_short(here)} now"


def _short(value: Any) -> str:
    return "nothing" if value is None else "something" if isinstance(value, dict) else json.dumps(value)
