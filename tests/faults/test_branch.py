"""A run that goes on as another, further than planned, or changed. One rank of the reference engine."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from configs.errors import DONE, ConfigError, DataError, UsageError
from configs.load import load
from launcher.prepare import prepare
from pretrain.checkpoint_files import newest_readable, open_files
from pretrain.config import RunConfig
from pretrain.explain import explain
from pretrain.health import Heartbeat
from pretrain.run_folder import RunFolder
from pretrain.session import Session
from tests.conftest import events, leviathan, losses
from tests.small_run import NobodyAsks, small_config, train_small

STEPS = 12


@pytest.fixture
def config(tmp_path: Path, shards: Path, corpus: Path) -> Path:
    return small_config(tmp_path, shards, corpus)


def train(config: Path, *words: str, branch: Sequence[str] = (), allow: Sequence[str] = ()) -> RunFolder:
    """What the verb `train` does, within this process."""
    prepared = prepare([config], ["engine.name=torch", *words], ranks=1, branch=branch, allow=allow)
    session = Session(prepared.folder, prepared.config, Heartbeat(None))
    assert session.train(NobodyAsks()) == DONE
    session.close()
    return prepared.folder


def hashes(folder: RunFolder) -> dict[str, str]:
    """Of every file of a run."""
    files = (path for path in folder.path.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def final_state(folder: RunFolder) -> tuple[int, list[str]]:
    found = newest_readable(folder)
    return found.step, [note["sha256"] for note in found.facts["files"]]


def branch_at_5(config: Path, env: dict[str, str] | None = None) -> RunFolder:
    """A branch by the command line, trained to its end."""
    words = ("engine.name=torch", "--ranks", 1, "run.name=other", "--from", "small@5")
    done = leviathan("train", config, *words, env=env)
    assert done.code == 0, done.err
    return RunFolder(config.parent / "runs" / "other")


def test_a_branch_goes_on_with_the_state_of_that_step_and_leaves_the_other_run_alone(config):
    origin = train_small(config)
    before = hashes(origin)
    other = branch_at_5(config)
    assert sorted(losses(other)) == list(range(6, STEPS + 1))
    assert losses(other) == {step: loss for step, loss in losses(origin).items() if step > 5}
    assert final_state(other) == final_state(origin)
    assert newest_readable(other).facts["data"]["rows"] == newest_readable(origin).facts["data"]["rows"] == 8 * STEPS
    assert hashes(origin) == before
    assert other.facts()["from"] == {"run": str(origin.path.resolve()), "step": 5}
    assert other.facts()["run_id"] != origin.facts()["run_id"]
    assert events(other, "resume") == ["resumed from step_000000005"]


@pytest.mark.e2e
def test_a_branch_that_is_killed_before_it_saved_anything_begins_there_again(config):
    origin = train_small(config)
    other = branch_at_5(config, env={"LEVIATHAN_FAULT": "step.before_update:0:7"})
    assert "died in phase 'step' of step 8" in events(other, "fault")[0]
    assert events(other, "resume") == ["resumed from step_000000005"] * 2
    assert losses(other) == {step: loss for step, loss in losses(origin).items() if step > 5}
    assert final_state(other) == final_state(origin)


def test_a_branch_may_be_trained_otherwise_from_there_on(config):
    origin = train_small(config)
    other = train(config, "run.name=other", "optim.lr=1e-2", branch=["small@10"])
    assert losses(other)[11] == losses(origin)[11], "the loss is of the state before the update"
    assert losses(other)[12] != losses(origin)[12]
    assert other.steps()[11]["lr"] == pytest.approx(2 * origin.steps()[11]["lr"])
    again = train(config, "run.name=again", "data.sources.lists.weight=50", branch=["small@10"])
    rows = [newest_readable(run).facts["data"]["weights"] for run in (origin, again)]
    assert rows[1][: len(rows[0])] == rows[0]
    assert rows[1][1:] == [[80, {"letters": 1.0, "lists": 50.0}]]


def test_a_branch_of_a_step_that_was_not_kept_is_refused_with_those_that_were(config):
    origin = train_small(config, "checkpoint.keep_last=2")
    kept = ", ".join(map(str, sorted(origin.committed_steps())))
    with pytest.raises(ConfigError, match=rf"run small has no checkpoint of step 3, but of {kept}; name one of them"):
        train(config, "run.name=other", branch=["small@3"])
    assert not (origin.path.parent / "other").exists()


def with_sources(config: Path, shards: Path, corpus: Path, *names: str) -> Path:
    """The same configuration with these of the shards' sources, in this order."""
    path = config.parent / f"{'-'.join(names)}.yaml"
    text = config.read_text()
    lines = [line for line in text.splitlines() if not line.strip().startswith(("letters:", "lists:"))]
    at = next(number for number, line in enumerate(lines) if line.strip() == "sources:") + 1
    told = [f"    {name}: {{path: {corpus / name}}}" for name in names]
    path.write_text("\n".join([*lines[:at], *told, *lines[at:]]) + "\n")
    return path


def rows_by_source(folder: RunFolder, first: int, last: int) -> set[str]:
    return {row.source for step in range(first, last + 1) for row in explain(folder, step).rows}


def test_a_branch_with_more_or_fewer_sources_reads_all_of_them_and_says_so(config, shards, corpus):
    both = train_small(config)
    fewer = train(with_sources(config, shards, corpus, "lists"), "run.name=fewer", branch=["small@10"])
    assert newest_readable(fewer).facts["data"]["rows"] == 8 * 2
    assert rows_by_source(fewer, 11, 12) == {"lists"}
    (told,) = events(fewer, "data")
    assert told.endswith("lists from the beginning")
    more = train(config, "run.name=more", "train.steps=16", branch=["fewer@12"])
    assert rows_by_source(more, 13, 16) == {"letters", "lists"}
    assert set(more.steps()[16]["source_loss"]) == {"letters", "lists"}
    assert not events(both, "data")


def test_a_run_that_goes_on_with_its_sources_in_another_order_is_the_same_run(config, shards, corpus):
    undisturbed = train_small(config)
    train(config, "run.name=turned", "train.steps=5")
    run = train(with_sources(config, shards, corpus, "lists", "letters"), "run.name=turned", f"train.steps={STEPS}")
    assert [{k: row[k] for k in ("loss", "source_loss")} for row in run.steps().values()] == [
        {k: row[k] for k in ("loss", "source_loss")} for row in undisturbed.steps().values()
    ]
    assert final_state(run)[1] == final_state(undisturbed)[1]


def test_a_run_does_not_go_on_with_other_sources(config, shards, corpus):
    train_small(config, "train.steps=5")
    fewer = with_sources(config, shards, corpus, "lists")
    allow = [f"data.sources.letters.{key}" for key in ("path", "field", "separator", "limit_mib")]
    with pytest.raises(
        ConfigError, match=r"small was trained on letters, lists and data\.sources are lists; go on with"
    ):
        train(fewer, "run.name=small", allow=allow)


def test_after_a_change_of_the_batch_no_row_is_read_twice_and_documents_are_named_right(config):
    words = ("data.sources.lists.weight=3",)
    small = train(config, "run.name=it", "train.steps=5", *words)
    read = [row.number for step in range(1, 6) for row in explain(small, step).rows]
    run = train(config, "run.name=it", "train.steps=8", "train.batch_rows=12", *words, allow=["train.batch_rows"])
    assert newest_readable(run).facts["data"]["rows"] == 5 * 8 + 3 * 12
    read += [row.number for step in range(6, 9) for row in explain(run, step).rows]
    assert read == list(range(76))
    with pytest.raises(
        UsageError, match=r"it went on after step 5 with another train\.batch_rows .*; ask for a later step"
    ):
        explain(run, 5)


def test_a_branch_that_would_train_nothing_is_refused(config):
    origin = train_small(config)
    for steps in (8, 10):
        with pytest.raises(
            ConfigError, match=rf"begins at step 10 and ends at step {steps}, so it would train nothing"
        ):
            prepare([config], ["run.name=other", f"train.steps={steps}"], ranks=1, branch=["small@10"], allow=[])
    assert not (origin.path.parent / "other").exists()
    train(config, "run.name=other", "train.steps=11", branch=["small@10"])
    # to give the command of a finished run again is no mistake
    assert sorted(losses(train(config, "run.name=other", "train.steps=11", branch=["small@10"]))) == [11]


def test_a_branch_without_a_step_begins_at_the_newest_and_stays_with_it(config):
    origin = train_small(config, "train.steps=10")
    prepared = prepare([config], ["run.name=other"], ranks=1, branch=["small"], allow=[])
    assert prepared.folder.facts()["from"]["step"] == 10
    # the other run goes on before the branch begins, or while it is started again
    train(config)
    other = train(config, "run.name=other")
    assert sorted(losses(other)) == [11, 12]
    assert events(other, "resume") == ["resumed from step_000000010"]
    assert losses(other) == {step: losses(origin)[step] for step in (11, 12)}


def test_a_run_that_has_begun_keeps_its_origin(config):
    train_small(config)
    other = train(config, "run.name=other", branch=["small@10"])
    before = other.facts()["from"]
    with pytest.raises(ConfigError, match=r"run other has begun, from .*/small@10; .* another run\.name"):
        prepare([config], ["run.name=other"], ranks=1, branch=["small@5"], allow=[])
    plain = train(config, "run.name=plain", "train.steps=5")
    with pytest.raises(ConfigError, match=r"run plain has begun, from nothing; .* another run\.name"):
        prepare([config], ["run.name=plain"], ranks=1, branch=["small@5"], allow=[])
    assert "from" not in plain.facts()
    # the same command as before is how a branch goes on
    train(config, "run.name=other", "train.steps=14", branch=["small@10"])
    assert other.facts()["from"] == before
    assert events(other, "resume")[-1] == "resumed from step_000000012"


def test_there_is_no_branch_from_a_run_that_saved_nothing(config):
    prepare([config], [], ranks=1, branch=(), allow=[])
    with pytest.raises(ConfigError, match=r"--from small: run small has no checkpoint yet"):
        prepare([config], ["run.name=other"], ranks=1, branch=["small"], allow=[])


def test_a_run_whose_steps_are_extended_goes_on_and_says_so(config):
    run = train_small(config)
    before = losses(run)
    assert train(config, f"train.steps={STEPS + 8}").path == run.path
    after = losses(run)
    assert sorted(after) == list(range(1, STEPS + 9))
    assert {step: after[step] for step in before} == before
    assert events(run, "change") == ["configuration changed: train.steps: 12 → 20"]
    assert events(run, "resume") == [f"resumed from step_{STEPS:09d}"]
    assert newest_readable(run).step == run.facts()["steps"] == STEPS + 8
    assert newest_readable(run).facts["data"]["rows"] == 8 * (STEPS + 8)


def test_what_makes_it_another_run_is_refused_until_it_is_allowed_and_then_recorded(config):
    run = train_small(config, "train.steps=5")
    with pytest.raises(ConfigError, match=r"train\.batch_rows: 8 → 4.* or allow it with --allow train\.batch_rows"):
        train(config, "train.steps=10", "train.batch_rows=4")
    assert not events(run, "change")
    train(config, "train.steps=10", "train.batch_rows=4", allow=("train.batch_rows",))
    (change,) = (event for event in run.history() if event["event"] == "change")
    assert change["message"] == "configuration changed: train.batch_rows: 8 → 4; train.steps: 5 → 10"
    assert change["changes"] == {"train.batch_rows": [8, 4], "train.steps": [5, 10]}
    assert load(RunConfig, [run.config]).train.batch_rows == 4
    assert sorted(losses(run)) == list(range(1, 11))
    assert newest_readable(run).facts["data"]["rows"] == 5 * 8 + 5 * 4
    rows = run.steps()
    assert [rows[step]["tokens"] for step in (5, 6, 10)] == [32 * n for n in (5 * 8, 5 * 8 + 4, 5 * 8 + 5 * 4)]
    with pytest.raises(ConfigError, match=r"the 10 before had 1,920; set train\.tokens=null and train\.steps"):
        train(config, "train.tokens=20000", "train.batch_rows=4")
    train(config, "train.tokens=null", "train.steps=11", "train.batch_rows=4")
    # from then on it is part of the run
    train(config, "train.steps=12", "train.batch_rows=4")
    with pytest.raises(ConfigError, match=r"train\.batch_rows: 4 → 8"):
        train(config, "train.steps=14")


def test_a_branch_may_freeze_a_model_and_train_a_part_that_it_did_not_have(config):
    origin, steps = (
        train_small(config),
        ["train.steps=16", "model.logits.hidden=8", "model.logits.freeze_backbone=true"],
    )
    other = train(config, "run.name=other", *steps, branch=["small"])
    assert sorted(losses(other)) == [13, 14, 15, 16]
    (told,) = events(other, "grow")
    assert "head.feed.up.weight, head.feed.up.bias, head.feed.out.weight, head.feed.out.bias: they begin anew" in told
    before, after = (open_files(newest_readable(run)) for run in (origin, other))
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.shapes)
    assert {name.rpartition(".")[0] for name in after.shapes.keys() - before.shapes.keys()} == {
        "head.feed.up",
        "head.feed.out",
    }
    # the new part changes nothing at first: the first loss is that of the same rows without it
    assert losses(other)[13] == pytest.approx(losses(train(config, "train.steps=16"))[13], abs=1e-6)
    # once it has a checkpoint of its own it goes on like any other run
    train(config, "run.name=other", *steps[1:], "train.steps=18")
    assert events(other, "resume")[-1] == "resumed from step_000000016"
    assert len(events(other, "grow")) == 1
    # what was frozen has no moments to be trained with
    with pytest.raises(DataError, match=r"the checkpoint holds no exp_avg of embed\.weight"):
        train(config, "run.name=thawed", *steps[1:2], "train.steps=20", branch=["other"])


@pytest.mark.parametrize(
    ("words", "rows"), [(["run.seed=1"], 8), (["data.window=1"], 8), (["model.length=16"], 8), (["optim.lr=1e-3"], 88)]
)
def test_a_branch_whose_rows_are_numbered_otherwise_reads_from_the_beginning_and_says_so(config, words, rows):
    train_small(config)
    other = train(config, "run.name=other", "train.steps=11", *words, branch=["small@10"])
    assert newest_readable(other).facts["data"]["rows"] == rows
    told = events(other, "data")
    assert len(told) == (rows == 8)
    assert all(said.endswith("lists from the beginning") for said in told)
    length = 16 if words == ["model.length=16"] else 32
    assert other.steps()[11]["tokens"] == 80 * 32 + 8 * length, "all that it was trained on, before and after"


def test_rows_are_named_right_where_a_run_was_allowed_another_order_and_has_saved_nothing_since(config):
    fresh = train(config, "run.name=fresh", "train.steps=1", "run.seed=1")
    run = train(config, "run.name=it", "train.steps=5")
    train(config, "run.name=it", "train.steps=6", "run.seed=1", allow=["run.seed"])
    shutil.rmtree(run.checkpoints / "step_000000006")
    assert list(explain(run, 6).rows) == list(explain(fresh, 1).rows)


@pytest.mark.parametrize("words", [["model.depth=3"], ["model.logits.hidden=8"], ["model.wrap.passes=2"]])
def test_a_branch_of_another_shape_whose_backbone_is_not_frozen_is_refused(config, words):
    train_small(config)
    with pytest.raises(ConfigError, match=r"the model does not fit .*; resume with the model it was trained with"):
        train(config, "run.name=other", "train.steps=16", *words, branch=["small"])
