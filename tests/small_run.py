"""A run trained within this process, by the reference engine: everything a run folder holds, in about a second."""

from __future__ import annotations

from pathlib import Path

from configs.errors import DONE
from launcher.prepare import prepare
from pretrain.health import Heartbeat
from pretrain.run_folder import RunFolder
from pretrain.session import Session
from tests.conftest import data_of


class NobodyAsks:
    """Stands where requests to stop come from."""

    def poll(self) -> tuple[bool, bool]:
        return False, False


def train_small(config: Path, *words: str) -> RunFolder:
    """Train a configuration file's run to its end, with one rank."""
    prepared = prepare([config], ["engine.name=torch", *words], ranks=1, branch=(), allow=[])
    prepared.folder.event("launch", "attempt 0: starting 1 rank here")
    session = Session(prepared.folder, prepared.config, Heartbeat(None))
    assert session.train(NobodyAsks()) == DONE
    session.close()
    return prepared.folder


def small_config(folder: Path, shards: Path, corpus: Path, name: str = "small") -> Path:
    """A configuration file without options of mixers, so that its mistakes are told without torch."""
    path = folder / f"{name}.yaml"
    path.write_text(
        f"""run: {{name: {name}, dir: {folder / "runs"}}}
{data_of(shards, corpus)}
model: {{width: 16, depth: 2, length: 32, mixers: [{{name: correlation}}, {{name: attention}}]}}
optim: {{lr: 5e-3, warmup_steps: 4}}
train: {{steps: 12, batch_rows: 8}}
engine: {{device: cpu, threads: 1}}
checkpoint: {{every: 5, keep_last: 20}}
launch: {{hang_s: 10}}
"""
    )
    return path
