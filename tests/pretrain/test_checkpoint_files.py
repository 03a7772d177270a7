"""Reading a checkpoint of many ranks: each opens what it needs, and all look at no file twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from data_pipeline.files import sha256_file
from pretrain.checkpoint import CheckpointStore
from pretrain.checkpoint_files import _size, newest_readable, open_files, verify
from pretrain.config import CheckpointConfig
from pretrain.engine import EngineState, Fragment
from pretrain.parallel import Ranks
from pretrain.run_folder import RunFolder

COUNT = 1000


def values(kind):
    return torch.arange(COUNT, dtype=torch.float32) + (0.5 if kind == "exp_avg" else 0.0)


def saved(path, cuts, first_has=()):
    """A run whose checkpoint has a file for each span between cuts, as ranks of ZeRO write them."""
    run, edges = RunFolder(path), [0, *cuts, COUNT]
    run.make()
    world = len(edges) - 1
    for number in reversed(range(world)):
        span = slice(edges[number], edges[number + 1])
        mine = [Fragment("w", kind, span.start, values(kind)[span]) for kind in ("param", "exp_avg")]
        if number == 0:
            mine += [Fragment(name, "param", 0, torch.tensor([7, 8])) for name in first_has]
        shapes = {"w": (COUNT,), **dict.fromkeys(first_has, (2,))}
        store = CheckpointStore(run, Ranks(number, world, number, "here"), CheckpointConfig())
        store.save(1, EngineState(mine, shapes, 3), {})
        store.wait()
    return run


EIGHT = range(125, COUNT, 125)


def test_each_of_as_many_ranks_as_wrote_it_opens_its_own_file(tmp_path):
    found = newest_readable(saved(tmp_path / "run", EIGHT))
    for rank in range(8):
        files, span = open_files(found, rank, 8), slice(125 * rank, 125 * (rank + 1))
        for kind in ("param", "exp_avg"):
            assert torch.equal(files.read("w", kind, span.start, span.stop), values(kind)[span])
        assert files.opened == 1
    assert open_files(found).opened == 8


@pytest.mark.parametrize(("world", "most"), [(4, 3), (2, 5), (1, 8), (16, 2), (64, 2)])
def test_other_ranks_open_few_more_than_what_they_need(tmp_path, world, most):
    found = newest_readable(saved(tmp_path / "run", EIGHT))
    for rank in range(world):
        files, start, stop = open_files(found, rank, world), COUNT * rank // world, COUNT * (rank + 1) // world
        assert torch.equal(files.read("w", "param", start, stop), values("param")[start:stop])
        assert files.opened <= most + 1, "one more may be rank 0's"


def test_what_every_rank_has_is_read_from_the_first_ones_file(tmp_path):
    found = newest_readable(saved(tmp_path / "run", EIGHT, first_has=["counter"]))
    for rank in range(8):
        files = open_files(found, rank, 8)
        assert files.read("counter", "param", 0, 2).tolist() == [7, 8]
        assert files.opened == (1 if rank == 0 else 2)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(1, COUNT - 1), unique=True, max_size=9).map(sorted),
    rank=st.integers(0, 6),
    spans=st.lists(st.tuples(st.integers(0, COUNT), st.integers(0, COUNT)), min_size=1, max_size=5),
)
def test_any_range_is_the_same_wherever_a_rank_begins_to_look(tmp_path_factory, cuts, rank, spans):
    files = open_files(newest_readable(saved(tmp_path_factory.mktemp("run"), cuts)), rank, 7)
    for start, stop in ((min(span), max(span)) for span in spans if span[0] != span[1]):
        assert torch.equal(files.read("w", "exp_avg", start, stop), values("exp_avg")[start:stop])


def test_what_is_nowhere_is_told_when_all_was_looked_at(tmp_path):
    run = saved(tmp_path / "run", EIGHT)
    files = open_files(newest_readable(run), 3, 8)
    with pytest.raises(DataError, match=r"holds no exp_avg_sq of w; it was made by another model"):
        files.read("w", "exp_avg_sq", 0, 10)
    assert files.opened == 8


@pytest.mark.parametrize(("second", "covered"), [(501, 500), (499, 500)])
def test_a_gap_or_an_overlap_is_told_and_never_read(tmp_path, second, covered):
    run = RunFolder(tmp_path / "run")
    run.make()
    fragments = [
        Fragment("w", "param", 0, torch.zeros(500)),
        Fragment("w", "param", second, torch.zeros(COUNT - second)),
    ]
    store = CheckpointStore(run, Ranks(0, 1, 0, "here"), CheckpointConfig())
    store.save(1, EngineState(fragments, {"w": (COUNT,)}, 0), {})
    store.wait()
    found = newest_readable(run)
    with pytest.raises(DataError, match=rf"the fragments of w \(param\) cover {covered} of 1000 values"):
        open_files(found, 0, 1).read("w", "param", 400, 600)
    with pytest.raises(DataError, match=rf"cover {covered} of 1000 values"):
        open_files(found)


def test_ranks_share_the_looking_and_each_mistake_is_found_by_one(tmp_path):
    run = saved(tmp_path / "run", EIGHT)
    path = run.checkpoints / "step_000000001"

    def found():
        return [verify(path, rank, 4) for rank in range(4)]

    assert found() == [None] * 4
    files = sorted(path.glob("*.safetensors"))
    whole = files[6].read_bytes()
    files[6].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert [mistake is not None for mistake in found()] == [False, False, True, False]
    files[6].unlink()
    assert found()[2] == "rank_00006.safetensors is missing, manifest says " + str(len(whole))
    files[6].write_bytes(whole)
    (path / "evil.pkl").touch()
    assert found() == ["it holds evil.pkl, which its manifest does not name", None, None, None]


def test_a_rank_looks_at_its_share_of_the_files_and_no_other(tmp_path, monkeypatch):
    path = saved(tmp_path / "run", EIGHT).checkpoints / "step_000000001"
    looked, hashed = [], []
    monkeypatch.setattr("pretrain.checkpoint_files._size", lambda file: looked.append(file.name) or _size(file))
    monkeypatch.setattr(
        "pretrain.checkpoint_files.sha256_file", lambda file: hashed.append(file.name) or sha256_file(file)
    )
    for rank in range(3):
        looked.clear(), hashed.clear()
        assert verify(path, rank, 3) is None
        assert looked == hashed == [f"rank_{number:05d}.safetensors" for number in range(rank, 8, 3)]
