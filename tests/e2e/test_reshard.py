"""Any layout to any layout: ranks 2 -> 1 -> 2, every ZeRO stage to every other and to plain torch."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pretrain.run_folder import RunFolder
from tests.conftest import events, leviathan, losses
from tests.ranks import run_ranks

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
WORKER = "tests.pretrain.engine_worker"
STAGES = ["0", "1", "2", "3"]


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory):
    """Checkpoints of every stage on two ranks, each loaded by every stage on two ranks."""
    out = tmp_path_factory.mktemp("two")
    return out, run_ranks(WORKER, "reshard", 2, out, timeout=300, writers=STAGES, readers=STAGES)


def close(results, writer, reader, reference):
    went_on, expected = ([float.fromhex(x) for x in r] for r in (results[f"{writer}>{reader} losses"], reference))
    assert went_on == pytest.approx(expected, rel=1e-5), (writer, reader)
    return went_on == expected


def test_two_ranks_of_every_stage_load_every_stage(saved_by_two):
    _, results = saved_by_two
    for writer in STAGES:
        for reader in STAGES:
            assert results[f"{writer}>{reader} state"] == results[f"{writer} state"], (writer, reader)
            exact = close(results, writer, reader, results[f"{writer} losses"])
            assert exact or writer != reader, writer
    for stage in "123":
        assert results[f"{stage}>{stage} opened"] == 2, "each rank opens what it wrote, and nothing else"


def test_one_rank_of_every_stage_and_plain_torch_load_what_two_saved(saved_by_two, tmp_path):
    folder, two = saved_by_two
    readers = [*STAGES, "torch"]
    one = run_ranks(WORKER, "reshard", 1, tmp_path, timeout=300, writers=STAGES, readers=readers, source=str(folder))
    for writer in STAGES:
        for reader in readers:
            assert one[f"{writer}>{reader} state"] == two[f"{writer} state"], (writer, reader)
            close(one, writer, reader, two[f"{writer} losses"])


def test_two_ranks_of_every_stage_load_what_one_and_plain_torch_saved(tmp_path):
    writers = [*STAGES, "torch"]
    one = run_ranks(WORKER, "reshard", 1, tmp_path, timeout=300, writers=writers, readers=["torch"])
    two = run_ranks(
        WORKER, "reshard", 2, tmp_path / "two", timeout=300, writers=writers, readers=STAGES, source=str(tmp_path)
    )
    for writer in writers:
        for reader in STAGES:
            assert two[f"{writer}>{reader} state"] == one[f"{writer} state"], (writer, reader)
            close(two, writer, reader, one[f"{writer} losses"])


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_goes_from_two_ranks_to_one_and_back_with_the_same_rows(stage, tiny):
    words = [f"engine.zero={stage}", "optim.schedule=constant"]
    steady = leviathan("train", tiny, *words, "run.name=steady", "--ranks", 2)
    assert steady.code == 0, steady.err
    for steps, ranks in ((5, 2), (10, 1), (20, 2)):
        done = leviathan("train", tiny, *words, f"train.steps={steps}", "--ranks", ranks)
        assert done.code == 0, done.err
    moved, reference = (RunFolder(tiny.parent / "runs" / name) for name in ("tiny", "steady"))
    assert events(moved, "resume") == ["resumed from step_000000005", "resumed from step_000000010"]
    a, b = ([float.fromhex(x) for x in losses(run).values()] for run in (moved, reference))
    assert a[:5] == b[:5]
    assert np.allclose(a, b, rtol=1e-5, atol=0)
    counts = [[row["source_loss"].keys() for row in run.steps().values()] for run in (moved, reference)]
    assert counts[0] == counts[1]
    rows = [
        json.loads((run.checkpoints / "step_000000020" / "manifest.json").read_text())["data"]["rows"]
        for run in (moved, reference)
    ]
    assert rows == [160, 160]
