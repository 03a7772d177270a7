"""Starting: CPU seconds of the command line, and of what a rank needs before its first step."""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Table, interval

_CONFIG = """
run: {{dir: {folder}/runs}}
data: {{dir: {folder}/shards, sources: {{stdlib: {{path: stdlib, limit_mib: 1}}}}}}
model: {{width: 16, depth: 2, length: 32, mixers: [{{name: correlation, options: {{heads: 2}}}}]}}
train: {{steps: 1, batch_rows: 8}}
engine: {{device: cpu, threads: 1}}
log: {{peak_tflops: 0.05}}
"""
_BARE, _PLAIN = "import torch and one bare step", "leviathan train, one rank, one step: plain torch"
_BARE_STEP = """
import torch
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Embedding(257, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 257))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
ids = torch.randint(0, 257, (8, 32))
torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
optimizer.step()
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=7, help="runs of each command (default 7)")


def run(options: argparse.Namespace) -> Table:
    """Measure and return the table."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "one.yaml"
        config.write_text(_CONFIG.format(folder=folder))
        _cpu_seconds([sys.executable, "-m", "launcher", "data", "build", str(config)])
        return _table(config, options.rounds)


@dataclass(frozen=True)
class _Arm:
    """A command. new_run: it trains, each time under a name of its own."""

    words: list[str]
    goal: float | None = None
    new_run: bool = False


def _arms(config: Path) -> dict[str, _Arm]:
    def python(code: str, goal: float | None = None) -> _Arm:
        return _Arm([sys.executable, "-c", code], goal)

    def train(*words: str) -> _Arm:
        return _Arm([sys.executable, "-m", "launcher", "train", str(config), "--ranks", "1", *words], new_run=True)

    return {
        "leviathan --help": _Arm([sys.executable, "-m", "launcher", "--help"], goal=0.5),
        "import configs, data_pipeline, pretrain, launcher": python(
            "import configs, data_pipeline, pretrain, launcher", goal=0.1
        ),
        "import torch": python("import torch"),
        _BARE: python(_BARE_STEP),
        "import pretrain.session (a rank, before DeepSpeed)": python("import pretrain.session"),
        "leviathan train, one rank, one step: DeepSpeed, ZeRO-1": train("engine.zero=1"),
        "leviathan train, one rank, one step: DeepSpeed, ZeRO-3": train("engine.zero=3"),
        _PLAIN: train("engine.name=torch"),
    }


def _table(config: Path, rounds: int) -> Table:
    table = Table("start-up, CPU seconds of the whole process")
    arms = _arms(config)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for place, (name, arm) in enumerate(arms.items()):
            spent = _cpu_seconds(arm.words + ([f"run.name=run-{place}-{number}"] if arm.new_run else []))
            if number:  # the first round fills the page cache and writes bytecode
                seconds[name].append(spent)
    for name, arm in arms.items():
        spread = interval(seconds[name])
        table.add(name, spread.median, "CPU s", goal=arm.goal, spread=spread)
    spread = interval([ours / bare for ours, bare in zip(seconds[_PLAIN], seconds[_BARE])])
    table.add("one step and its checkpoint, plain torch / the bare step", spread.median, "x", goal=1.5, spread=spread)
    table.add("torch imported by leviathan --help", float(_imports_torch()), "", goal=0.0)
    return table


def _cpu_seconds(words: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=env, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _imports_torch() -> bool:
    script = "import sys; sys.argv = ['leviathan', '--help']\ntry:\n from launcher.cli import main; main()\n"
    script += "except SystemExit: pass\nprint('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return done.stderr.strip().endswith("True")
