"""A small ensemble of two modules, by the reference engine: seconds to train, alone and joined."""

from __future__ import annotations

from pathlib import Path

from configs.errors import CANNOT_GO_ON, DONE
from launcher.prepare import Prepared, make_ready, prepare, resolve
from pretrain.ensemble.alone import module_run
from pretrain.health import Heartbeat
from pretrain.run_folder import RunFolder
from pretrain.session import Session
from tests.conftest import data_of
from tests.small_run import NobodyAsks

MODULES = ("letters", "lists")
STEPS, ALONE_STEPS = 8, 6


def write_ensemble(folder: Path, shards: Path, corpus: Path, engine: str = "torch") -> Path:
    """A configuration file whose modules are named as its sources."""
    path = folder / "duo.yaml"
    path.write_text(
        f"""run: {{name: duo, dir: {folder / "runs"}}}
{data_of(shards, corpus)}
model:
  width: 16
  depth: 2
  length: 32
  mixers: [{{name: correlation}}]
  ensemble: {{modules: [letters, lists], couple_heads: 2, fusion: mhc, width: 16, heads: 2}}
optim: {{lr: 5e-3, warmup_steps: 2}}
train: {{steps: {STEPS}, batch_rows: 8}}
modules: {{steps: {ALONE_STEPS}}}
engine: {{name: {engine}, device: cpu, threads: 1}}
checkpoint: {{every: 3, keep_last: 20}}
eval: {{every: 2, rows: 16}}
log: {{peak_tflops: 1}}
launch: {{hang_s: 10, ranks: {1 if engine == "torch" else 2}}}
"""
    )
    return path


def trained(prepared: Prepared) -> RunFolder:
    """What a supervisor would do with a run that is ready, within this process."""
    prepared.folder.event("launch", "attempt 0: starting 1 rank here")
    session = Session(prepared.folder, prepared.config, Heartbeat(None))
    assert session.train(NobodyAsks()) == DONE
    session.close()
    return prepared.folder


def train_module(config: Path, module: str, *words: str) -> RunFolder:
    """One module alone."""
    whole, launch = resolve([config], words)
    alone = module_run(whole, module)
    return trained(make_ready(alone, launch, RunFolder(Path(alone.run.dir) / str(alone.run.name))))


def train_joined(config: Path, *words: str, branch: tuple[str, ...] | None = None) -> RunFolder:
    """The joint run, from its modules' runs."""
    origin = tuple(f"{name}=duo-{name}" for name in MODULES) if branch is None else branch
    return trained(prepare([config], words, ranks=None, branch=origin, allow=[]))


class Here:
    """Stands where supervisors are: trains within this process. ends: exit codes of runs that do not end well."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.ends: dict[str, int] = {}

    def train(self, supervisors, runs, side_by_side=1, begins=lambda run: None):
        codes = {}
        for run in runs:
            begins(run)
            self.trained.append(run.folder.name)
            code = self.ends.get(run.folder.name, DONE)
            if code == DONE:
                trained(run)
            elif code == CANNOT_GO_ON:
                run.folder.event("stop", "stopped: the loss is not finite; lower optim.lr", code=code, step=0)
            codes[run.folder.name] = code
            if code != DONE:
                break
        return codes
