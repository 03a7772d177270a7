"""One rank of a run, from its folder to its exit code, as a launcher starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from configs.errors import DONE
from launcher.prepare import prepare
from tests.conftest import ROOT, losses
from tests.small_run import small_config, train_small

NOT_NEEDED = (
    "ray", "wandb", "sentencepiece", "matplotlib", "pytest", "scipy", "pandas", "sympy", "torch._dynamo.convert_frame"
)  # fmt: skip


def test_a_rank_trains_on_an_image_that_holds_no_more_than_training_needs(tmp_path, shards, corpus):
    config = small_config(tmp_path, shards, corpus)
    folder = prepare([config], ["train.steps=3"], ranks=1, branch=(), allow=[]).folder
    script = (
        f"import sys\nsys.modules.update(dict.fromkeys({NOT_NEEDED!r}))\n"
        "from pretrain.run import leave, main\nleave(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", script, str(folder.path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == DONE, done.stderr[-2000:]
    assert len(losses(folder)) == 3


def test_the_peak_is_measured_once_so_that_utilisation_means_the_same_after_a_restart(tmp_path, shards, corpus):
    config = small_config(tmp_path, shards, corpus)
    run = train_small(config, "train.steps=2")
    (peak,) = run.facts()["peak_flops"].values()
    assert peak > 1e8
    train_small(config, "train.steps=4")
    assert list(run.facts()["peak_flops"].values()) == [peak]
    for row in run.steps().values():
        flops = run.facts()["flops_per_token"] * row["tokens_per_s"]
        assert abs(row["mfu"] * peak / flops - 1) < 1e-6


def test_a_rank_leaves_a_note_of_why_it_ended(tmp_path, shards, corpus):
    config = small_config(tmp_path, shards, corpus)
    folder = prepare([config], ["model.length=60000"], ranks=1, branch=(), allow=[]).folder
    words = [sys.executable, "-m", "pretrain.run", str(folder.path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100, env=os.environ, check=False)
    note = json.loads(folder.exit_of(0).read_bytes())
    assert (done.returncode, note["code"]) == (65, 65)
    assert "has no shard of 60001 tokens" in note["message"]
    assert "Traceback" not in done.stderr
