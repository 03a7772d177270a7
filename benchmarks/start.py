"""Starting: CPU seconds of the command line, and of what a rank needs before its first step."""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys

from benchmarks.common import Table, interval


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=7, help="runs of each command (default 7)")


def run(options: argparse.Namespace) -> Table:
    """Measure and return the table."""
    table = Table("start-up, CPU seconds of the whole process")
    arms = {
        "leviathan --help": ([sys.executable, "-m", "launcher", "--help"], 0.5),
        "import configs, data_pipeline, pretrain, launcher": (
            [sys.executable, "-c", "import configs, data_pipeline, pretrain, launcher"], None,
        ),
        "import torch": ([sys.executable, "-c", "import torch"], None),
        "import pretrain.session (a rank, before DeepSpeed)": ([sys.executable, "-c", "import pretrain.session"], None),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(options.rounds + 1):
        for name, (words, _) in arms.items():
            spent = _cpu_seconds(words)
            if number:  # the first round fills the page cache and writes bytecode
                seconds[name].append(spent)
    for name, (_, goal) in arms.items():
        spread = interval(seconds[name])
        table.add(name, spread.median, "CPU s", goal=goal, spread=spread)
    table.add("torch imported by leviathan --help", float(_imports_torch()), "", goal=0.0)
    return table


def _cpu_seconds(words: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=os.environ, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _imports_torch() -> bool:
    script = "import sys; sys.argv = ['leviathan', '--help']\ntry:\n from launcher.cli import main; main()\n"
    script += "except SystemExit: pass\nprint('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return done.stderr.strip().endswith("True")
