"""Checkpoints: complete or invisible, verified before use."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from configs.errors import CannotGoOnError, ConfigError, DataError
from pretrain import checkpoint as checkpoints
from pretrain import lease as leases
from pretrain.checkpoint import CheckpointStore
from pretrain.checkpoint_files import newest_readable, open_files, own_hash, verify
from pretrain.config import CheckpointConfig
from pretrain.engine import EngineState, Fragment
from pretrain.lease import Lease
from pretrain.parallel import Ranks
from pretrain.run_folder import RunFolder
from pretrain.snapshot import NotFiniteError, Snapshot


def rank(number=0, world=1):
    return Ranks(number, world, number, "here")


def state_of(seed=0, updates=3):
    """Two parameters with moments, the first in two fragments as two ranks of ZeRO would own it."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(n, generator=generator)  # noqa: E731
    fragments = [
        Fragment("a.weight", "param", 0, draw(30)), Fragment("a.weight", "exp_avg", 0, draw(30)),
        Fragment("a.weight", "param", 30, draw(30)), Fragment("a.weight", "exp_avg", 30, draw(30)),
        Fragment("b", "param", 0, draw(7)), Fragment("b", "exp_avg", 0, draw(7)),
    ]  # fmt: skip
    return EngineState(fragments, {"a.weight": (6, 10), "b": (7,)}, updates)


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.make()
    return run


def store_of(folder, **keys):
    return CheckpointStore(folder, rank(), CheckpointConfig(**{"keep_last": 5, **keys}))


def save(folder, *steps, **keys):
    store = store_of(folder, **keys)
    for step in steps:
        assert store.save(step, state_of(step), {"data": {"rows": 8 * step}})
        store.wait()
    return store


def events(folder, kind):
    return [e["message"] for e in folder.history() if e["event"] == kind]


def test_what_was_saved_is_read_back_by_name_and_range(folder):
    save(folder, 10)
    found = newest_readable(folder)
    files, expected = open_files(found), state_of(10)
    assert (found.step, found.facts["data"]["rows"], files.updates) == (10, 80, 3)
    whole = torch.cat([f.tensor for f in expected.fragments if f.name == "a.weight" and f.kind == "param"])
    assert torch.equal(files.tensor("a.weight"), whole.view(6, 10))
    for start, stop in [(0, 60), (29, 31), (30, 60), (0, 1), (59, 60), (5, 5)]:
        if start < stop:
            assert torch.equal(files.read("a.weight", "param", start, stop), whole[start:stop])
    with pytest.raises(DataError, match="holds no exp_avg_sq of b"):
        files.read("b", "exp_avg_sq", 0, 7)


def test_the_files_are_plain_safetensors_and_nothing_else(folder):
    save(folder, 1)
    path = folder.checkpoints / "step_000000001"
    with safe_open(path / "rank_00000.safetensors", framework="pt") as file:
        assert "a.weight|param|30" in set(file.keys())
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "rank_00000.safetensors"]


def test_training_may_go_on_as_soon_as_save_returns(folder):
    store, state = store_of(folder), state_of(4)
    kept = [f.tensor.clone() for f in state.fragments]
    store.save(4, state, {})
    for f in state.fragments:
        f.tensor.fill_(float("nan"))
    store.wait()
    files = open_files(newest_readable(folder))
    assert torch.equal(files.read("a.weight", "param", 30, 60), kept[2])


def test_the_newest_are_kept_and_every_nth_for_good(folder):
    save(folder, *range(1, 11), keep_last=2, keep_every=4)
    assert folder.committed_steps() == [10, 9, 8, 4]


@pytest.mark.parametrize(
    "damage", ["truncate", "empty", "delete", "grow", "manifest", "manifest gone", "stray", "swap"]
)
def test_a_damaged_checkpoint_is_told_set_aside_and_passed_over(folder, damage):
    save(folder, 10, 20)
    path = folder.checkpoints / "step_000000020"
    file, manifest = path / "rank_00000.safetensors", path / "manifest.json"
    size = file.stat().st_size
    if damage == "truncate":
        os.truncate(file, size // 2)
    elif damage == "empty":
        os.truncate(file, 0)
    elif damage == "delete":
        file.unlink()
    elif damage == "grow":
        file.write_bytes(file.read_bytes() + b"x")
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"step": 20', '"step": 21'))
    elif damage == "manifest gone":
        manifest.unlink()
    elif damage == "stray":
        (path / "evil.pkl").write_bytes(b"")
    else:
        shutil.copyfile(folder.checkpoints / "step_000000010" / "rank_00000.safetensors", file)
    store = store_of(folder)
    assert store.newest_valid().step == 10
    assert events(folder, "invalid_checkpoint")[0].startswith("checkpoint step_000000020 invalid: ")
    assert events(folder, "fallback") == ["using step_000000010 instead (lost 10 steps)"]
    assert folder.committed_steps() == [10]
    assert not path.exists()
    save(folder, 20)
    assert store_of(folder).newest_valid().step == 20


def test_two_hundred_random_faults_are_all_found_before_use(folder):
    """Single bits, truncations and deletions anywhere in a checkpoint: 200 of 200."""
    save(folder, 10)
    path, rng = folder.checkpoints / "step_000000010", random.Random(0)
    pristine = {p.name: p.read_bytes() for p in path.iterdir()}
    for number in range(200):
        name = rng.choice(sorted(pristine))
        data = bytearray(pristine[name])
        kind = rng.choice(["bit"] * 8 + ["truncate", "delete"])
        if kind == "bit":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "truncate":
            data = data[: rng.randrange(len(data))]
        (path / name).unlink() if kind == "delete" else (path / name).write_bytes(bytes(data))
        mistake = verify(path)
        assert mistake is not None, (number, name, kind)
        assert name in mistake, mistake
        (path / name).write_bytes(pristine[name])
    assert verify(path) is None


def test_a_run_never_silently_begins_again(folder):
    save(folder, 10, 20)
    for step in (10, 20):
        (folder.checkpoints / f"step_0000000{step}" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no valid checkpoint left \(2 found, none verifies\)"):
        store_of(folder).newest_valid()
    shutil.rmtree(folder.checkpoints)
    folder.make()
    with pytest.raises(DataError, match=r"no valid checkpoint left \(0 found"):
        store_of(folder).newest_valid()


def test_a_run_that_saved_nothing_yet_has_no_checkpoint(folder):
    assert store_of(folder).newest_valid() is None


def test_pointers_drafts_and_times_of_files_mislead_nobody(folder):
    save(folder, 10, 20)
    (folder.checkpoints / "latest").write_text("step_000000010")
    (folder.checkpoints / "step_000000030.draft-1-0").mkdir()
    (folder.checkpoints / "step_000000005.deleted").mkdir()
    os.utime(folder.checkpoints / "step_000000010", (time.time() + 9999,) * 2)
    assert store_of(folder).newest_valid().step == 20
    assert events(folder, "ignored") == [
        "ignoring incomplete checkpoint step_000000030.draft-1-0: it was never committed"
    ]
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["latest", "step_000000010", "step_000000020"]


def test_reading_from_outside_changes_nothing(folder):
    save(folder, 10, 20)
    (folder.checkpoints / "step_000000020" / "manifest.json").write_text("{}")
    before = sorted(p.name for p in folder.checkpoints.rglob("*"))
    assert newest_readable(folder).step == 10
    assert sorted(p.name for p in folder.checkpoints.rglob("*")) == before
    with pytest.raises(DataError, match="has no checkpoint of step 15; there is 20, 10"):
        newest_readable(folder, 15)
    with pytest.raises(DataError, match="manifest"):
        newest_readable(folder, 20)


def test_all_ranks_files_make_one_checkpoint_and_a_missing_one_makes_none(folder):
    stores = [CheckpointStore(folder, rank(r, 2), CheckpointConfig()) for r in range(2)]
    halves = [EngineState(state_of(1).fragments[2 * r :: 3], {}, 1) for r in range(2)]
    for store, half in zip(stores, halves):
        store.save(1, half, {})
    for store in stores:
        store.wait()
    assert folder.committed_steps() == [1]
    hasty = CheckpointStore(folder, rank(0, 2), CheckpointConfig(commit_timeout_s=0.5))
    hasty.save(2, halves[0], {})
    hasty.wait()
    assert folder.committed_steps() == [1]
    assert "no file from rank [1] within" in events(folder, "save_failed")[0]
    assert not list(folder.checkpoints.glob("*.draft*"))


def test_a_rank_that_owns_nothing_saves_an_empty_file(folder):
    stores = [CheckpointStore(folder, rank(number, 2), CheckpointConfig()) for number in range(2)]
    for store, state in zip(stores, (state_of(), EngineState([], {}, 3))):
        assert store.save(10, state, {"data": {"rows": 80}})
    for store in stores:
        store.wait()
    found = newest_readable(folder)
    assert verify(found.path) is None
    for number, world in ((0, 1), (1, 2)):
        files = open_files(found, number, world)
        assert torch.equal(files.read("b", "param", 0, 7), state_of().fragments[4].tensor)


def test_when_another_rank_could_not_write_rank_0_does_not_wait_for_it(folder):
    store = CheckpointStore(folder, rank(0, 2), CheckpointConfig())
    threading.Timer(0.2, store.tell_failed).start()
    began = time.monotonic()
    store.save(1, state_of(), {})
    store.wait()
    assert time.monotonic() - began < 5
    assert folder.committed_steps() == []
    assert store.failures == 1


def test_a_value_that_is_not_finite_is_never_saved(folder):
    store, state = save(folder, 10), state_of(20)
    state.fragments[3].tensor[4] = float("inf")
    store.save(20, state, {})
    store.wait()
    assert folder.committed_steps() == [10]
    assert "a.weight|exp_avg|30 holds a value that is not finite" in events(folder, "save_failed")[0]
    assert "last good: step 10; training goes on (1 of 3 in a row" in events(folder, "save_failed")[0]


def test_a_good_save_after_failures_forgets_them(folder):
    store, bad = store_of(folder), state_of()
    bad.fragments[0].tensor[0] = float("nan")
    for step in (1, 2, 3):
        store.save(step, bad, {})
        store.wait()
    assert store.given_up
    store.save(4, state_of(), {})
    store.wait()
    assert not store.given_up


def test_without_room_nothing_is_begun_and_the_message_has_need_and_free(folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "free_bytes", lambda path: 1000)
    store = store_of(folder)
    with pytest.raises(ConfigError, match=r"needs 66\.\d kB .* has 1\.0 kB free"):
        store.check_room(state_of())
    assert store.save(1, state_of(), {}) is False
    assert "no space on" in events(folder, "save_failed")[0]
    assert "(need 66." in events(folder, "save_failed")[0]


def test_an_owner_that_lost_the_lease_commits_nothing(folder):
    lease = Lease(folder.path)
    old = lease.take()
    lease.release()
    store = CheckpointStore(folder, rank(), CheckpointConfig(), lease=lease, fence=old)
    again = Lease(folder.path)
    assert again.take() == old + 1
    store.save(5, state_of(), {})
    store.wait()
    again.release()
    assert isinstance(store.lost_lease, CannotGoOnError)
    assert f"number {old}, now {old + 1}" in str(store.lost_lease)
    assert folder.committed_steps() == []


@pytest.mark.parametrize("what", ["lock", "anything"])
def test_whatever_a_commit_fails_of_is_a_save_that_failed_and_is_told(folder, monkeypatch, what):
    monkeypatch.setattr(leases, "LOCK_S", 0.2)
    lease = Lease(folder.path)
    store = CheckpointStore(folder, rank(), CheckpointConfig(), lease=lease, fence=lease.take())
    if what == "lock":
        with open(folder.path / "lease.lock") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            assert store.save(10, state_of(), {})
            store.wait()
    else:
        with monkeypatch.context() as broken:
            broken.setattr(checkpoints, "own_hash", lambda manifest: 1 // 0)
            assert store.save(10, state_of(), {})
            store.wait()
    assert store.failures == 1
    (told,) = events(folder, "save_failed")
    reason = {"lock": "has been locked for 0 s by another process", "anything": "by zero"}[what]
    assert told.startswith("checkpoint step 10 failed: ")
    assert reason in told
    assert not folder.committed_steps()
    assert store.save(20, state_of(), {})
    store.wait()
    assert (store.failures, folder.committed_steps()) == (0, [20])
    lease.release()


def test_a_manifest_that_names_a_file_elsewhere_is_refused(folder):
    save(folder, 1)
    path = folder.checkpoints / "step_000000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256")
    manifest["files"][0]["name"] = "../../../etc/passwd"
    manifest["sha256"] = own_hash(manifest)
    path.write_text(json.dumps(manifest))
    assert "outside its folder" in verify(path.parent)


def test_a_link_is_no_file(folder, tmp_path):
    save(folder, 1)
    file = folder.checkpoints / "step_000000001" / "rank_00000.safetensors"
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert "is missing" in verify(file.parent)


def test_fragments_must_cover_every_parameter_exactly(folder):
    state = state_of()
    for broken in (state.fragments[:2] + state.fragments[4:], state.fragments[:4]):
        run = RunFolder(folder.path.parent / f"run{len(broken)}-{broken[0].name}-{broken[-1].name}")
        run.make()
        store = store_of(run)
        store.save(1, EngineState(broken, state.shapes, 0), {})
        store.wait()
        with pytest.raises(DataError, match=r"cover 30 of 60 values|no values for b"):
            open_files(newest_readable(run))


def test_a_snapshot_is_touched_memory_and_refuses_other_fragments(tmp_path):
    state = state_of()
    snapshot = Snapshot(state.fragments)
    snapshot.take(state.fragments)
    assert len(snapshot.write(tmp_path / "f")) == 64
    assert (tmp_path / "f").stat().st_size == snapshot.bytes
    with pytest.raises(FileExistsError):
        snapshot.write(tmp_path / "f")
    with pytest.raises(AssertionError):
        snapshot.take(state.fragments[1:])
    state.fragments[0].tensor[3] = float("nan")
    snapshot.take(state.fragments)
    with pytest.raises(NotFiniteError, match=r"a\.weight\|param\|0"):
        snapshot.write(tmp_path / "g")


def code_of(source):
    """The text of a program without its comments, and without strings that nothing is done with: its docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.unparse(tree)


def test_nothing_in_the_project_unpickles():
    assert "pickle.loads(" in code_of("value = pickle.loads(content)")
    assert "pickle" not in code_of('"""Not by pickle."""\ncount = 1  # nor by pickle')
    root = Path(__file__).parents[2]
    words = (
        "pickle",
        "torch.load(",
        "torch.save(",
        "weights_only",
        ".decode(True",
        "np.load(",
        "joblib",
        "shelve",
        "marshal",
    )
    for package in ("configs", "data_pipeline", "pretrain", "launcher"):
        for path in (root / package).rglob("*.py"):
            code = code_of(path.read_text())
            found = [word for word in words if word in code]
            assert not found, f"{path}: {found}"
