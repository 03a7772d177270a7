"""What a build is made from, and whether a folder belongs to it.

The plan is written into the folder before anything else. Another build of the same plan goes on where the first one
stopped, or finds that all is done; a build of another plan is told what differs, and touches nothing.
"""

from __future__ import annotations

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
from data_pipeline.files import sha256_file
from data_pipeline.manifest import HEADER, TABLE, Manifest
from data_pipeline.output import Output, load_manifest, load_tokenizer
from data_pipeline.places import RECORDS, public

PLAN = f"{RECORDS}/plan.json"
FORMAT = 1

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


@dataclass(frozen=True)
class Folder:
    """A folder that this build may write into, for as long as the plan in it is its own."""

    output: Output

    def claim(self, plan: dict[str, Any]) -> Manifest | None:
        """Make the folder this plan's; the manifest, if an earlier build of it was finished and nothing is missing.

        Raises ConfigError when the folder belongs to another plan.
        """
        if self._earlier() is None:
            # of some other build, and nobody can say which
            self._remove(tokenizers.HEADER, tokenizers.MODEL)
            self.output.create(PLAN, json.dumps(plan, indent=1).encode())
        self.check(plan)
        self.output.sweep()
        finished = self._finished()
        if finished is None:
            # while work is going on, nothing may say that it is done
            self._remove(HEADER)
        return finished

    def check(self, plan: dict[str, Any]) -> None:
        """Raises ConfigError when the folder belongs to another plan, which somebody may have made it meanwhile."""
        earlier = self._earlier()
        if earlier != plan:
            different = "; ".join(_differences(earlier or {}, plan)) or "an earlier version of this program made them"
            raise ConfigError(
                f"{self.output.where} holds shards of another build ({different}); choose another data.dir, or build"
                " with rebuild to replace them"
            )

    def clear(self) -> None:
        """Remove what builds have written here, and nothing else; the plan last, so that it can be begun again."""
        self._remove(HEADER)
        once = (TABLE, tokenizers.HEADER, tokenizers.MODEL)
        self.output.remove([name for name in self.output.sizes() if name in once or _SHARD.fullmatch(name)])
        records = [f"{RECORDS}/{name}" for name in self.output.sizes(RECORDS) if _RECORD.fullmatch(name)]
        self.output.remove(records)
        self._remove(PLAN)

    def _remove(self, *names: str) -> None:
        """Those of a few small files that are there."""
        self.output.remove([name for name in names if self.output.read(name) is not None])

    def _earlier(self) -> dict[str, Any] | None:
        content = self.output.read(PLAN)
        if content is None:
            if self.output.read(HEADER) is None:
                return None
            raise ConfigError(
                f"{self.output.where} holds shards, and no plan says what they were made from; choose another data.dir,"
                " or build with rebuild to replace them"
            )
        try:
            earlier = json.loads(content)
        except ValueError:
            earlier = {}
        return earlier if isinstance(earlier, dict) else {}

    def _finished(self) -> Manifest | None:
        """The manifest, if all it names is here in the right size; `data check` compares every byte."""
        try:
            manifest, tokenizer = load_manifest(self.output), load_tokenizer(self.output)
        except DataError:
            return None
        there = self.output.sizes()
        sizes = [there.get(name) for name in manifest.table["name"].to_pylist()]
        whole = tokenizer.sha256 == manifest.tokenizer.sha256 and sizes == manifest.column("bytes").tolist()
        return manifest if whole else None


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
