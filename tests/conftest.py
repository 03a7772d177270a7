"""What many tests need: a small set of shards, the command line as a user calls it, runs to compare."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# before torch looks: idle threads of tiny operations make tests twenty times slower on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
# or each of the many processes that tests start compiles the whole project for itself
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# tables and sentences must not break where the path of a temporary folder is long
os.environ.setdefault("COLUMNS", "200")

from data_pipeline.build import build
from data_pipeline.config import DataConfig, SourceConfig
from pretrain.run_folder import RunFolder
from tests.ranks import end_all

ROOT = Path(__file__).parents[1]
LONG_FILES = (
    "test_slurm_apart.py", "test_ray.py", "test_slurm.py", "test_kills.py", "test_ensemble.py", "test_output.py",
    "test_odd_node.py", "test_local_run.py", "test_reshard.py", "test_engine.py", "test_on_ray.py", "test_moe.py",
    "test_ray_on_slurm.py", "test_models_ranks.py", "test_expert_parallel.py", "test_wandb.py", "test_disk.py",
)  # fmt: skip
"""Files that take minutes, the longest first. They are dealt to processes whole: what is long must not be left over."""
SENTENCE = "the sea holds what the land lets go and every river knows the way down to a harbour no chart has named"
WORDS = SENTENCE.split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    places = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def text(seed: int, count: int) -> str:
    """Some sentences, a function of the seed."""
    state, out = seed * 7919 + 1, []
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        out.append(WORDS[state % len(WORDS)])
    return " ".join(out) + "."


@pytest.fixture(scope="module", autouse=True)
def no_ranks_left() -> Iterator[None]:
    """Ranks that do the tasks of a file's tests end with it."""
    yield
    end_all()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of text: 150 letters and 150 lists."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("letters", "lists"):
        (folder / name).mkdir()
        for i in range(150):
            body = text(i, 60) if name == "letters" else "\n".join(f"{j}: {text(i + j, 3)}" for j in range(12))
            (folder / name / f"{i:03d}.txt").write_text(body)
    return folder


@pytest.fixture(scope="session")
def shards(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as shards."""
    out = tmp_path_factory.mktemp("shards")
    sources = {name: SourceConfig(path=str(corpus / name)) for name in ("letters", "lists")}
    build(DataConfig(dir=str(out), sources=sources, heldout=0.1, shard_mib=0.05), out, workers=1)
    return out


def data_of(shards: Path, corpus: Path) -> str:
    """The section of a configuration for the two sources of text that tests share."""
    return f"""data:
  dir: {shards}
  heldout: 0.1
  shard_mib: 0.05
  sources:
    letters: {{path: {corpus / "letters"}}}
    lists: {{path: {corpus / "lists"}}}"""


def write_tiny(folder: Path, shards: Path, corpus: Path) -> Path:
    """A configuration file: seconds to train, everything as in a real run."""
    path = folder / "tiny.yaml"
    path.write_text(
        f"""run: {{name: tiny, dir: {folder / "runs"}}}
{data_of(shards, corpus)}
model: {{width: 16, depth: 2, length: 32, mixers: [{{name: correlation}}, {{name: attention}}]}}
optim: {{lr: 5e-3, warmup_steps: 4}}
train: {{steps: 20, batch_rows: 8}}
engine: {{device: cpu, threads: 1}}
checkpoint: {{every: 5, keep_last: 20}}
launch: {{hang_s: 10}}
"""
    )
    return path


@pytest.fixture
def tiny(shards: Path, corpus: Path, tmp_path: Path) -> Path:
    """A configuration of its own for one test."""
    return write_tiny(tmp_path, shards, corpus)


@dataclass
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str
    seconds: float


def leviathan(*words: object, timeout: float = 100, env: dict[str, str] | None = None, cwd: Path | None = None) -> Done:
    """Run the command line to its end, as a user would; everything it started is gone when this returns."""
    began = time.monotonic()
    process = start_leviathan(*words, env=env, cwd=cwd)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"leviathan {words} took longer than {timeout} s\n{out}\n{err}") from None
    return Done(process.returncode, out, err, time.monotonic() - began)


def start_leviathan(
    *words: object, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[str]:
    """Start the command line and return at once."""
    return subprocess.Popen(
        [sys.executable, "-m", "launcher", *map(str, words)],
        env=os.environ | {"COLUMNS": "200", "WANDB_MODE": "offline"} | (env or {}),
        cwd=cwd or ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextlib.contextmanager
def tmpfs(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of a size that `mount` understands; skips where nobody may mount one."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something, with a deadline."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def losses(folder: RunFolder) -> dict[int, str]:
    """The loss of each step, in hexadecimal."""
    return {step: row["loss"].hex() for step, row in folder.steps().items()}


def events(folder: RunFolder, *kinds: str) -> list[str]:
    """The messages of some kinds of events."""
    return [record["message"] for record in folder.history() if record["event"] in kinds]
