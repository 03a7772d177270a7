"""Remote shards on this host's disk: within their bound, checked, shared by threads and processes."""

from __future__ import annotations

import random
import subprocess
import sys
import threading

import pytest
import torch

from configs.errors import ConfigError, DataError
from data_pipeline import remote
from data_pipeline.dataset import open_dataset
from data_pipeline.remote import ShardCache
from data_pipeline.shards import Shard
from tests.conftest import ROOT, wait_until
from tests.data_pipeline.store import (
    batches_of,
    data_of,
    digest_of,
    left_over,
    open_though_gone,
    room,
)

ROOMY = 1 << 30
READER = """import sys; from tests.data_pipeline.store import DataConfig, digest_of
print(digest_of(DataConfig.model_validate_json(sys.argv[1]), 60))"""


@pytest.fixture
def reader():
    """reader(data): a process that reads and prints the digest of what it read; none is left at the end."""
    started = []

    def start(data):
        command = [sys.executable, "-c", READER, data.model_dump_json()]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=20)


def test_an_epoch_in_windows_stays_within_the_bound_though_the_server_fails(server, folder, corpus, tmp_path):
    limit, most, gone, draw = 5 * max(info.bytes for info in server.infos), [], [], random.Random(0)

    def fault(name: str, n: int) -> str:
        most.append(room(tmp_path))
        return "503" if draw.random() < 0.3 else ""

    server.fault = fault
    here = data_of(str(folder), corpus, window=1)
    afar = data_of(server.url, corpus, window=1, cache_dir=str(tmp_path), cache_gib=limit / 2**30)
    train = [info for info in server.infos if info.split == "train"]
    steps = sum(info.tokens // 32 for info in train) // 8
    for one, other in zip(batches_of(here, steps), batches_of(afar, steps), strict=True):
        assert torch.equal(one.tokens_BT, other.tokens_BT)
        most.append(room(tmp_path))
        gone.append(open_though_gone(tmp_path))
    assert {info.name for info in train} <= set(server.asked)
    assert limit / 2 < max(most) <= limit
    assert max(gone) < len(train) // 3  # as many as lie in a window, not all that were ever read


def test_no_more_is_fetched_ahead_than_fits_together_however_often_it_is_asked_for(server, tmp_path):
    a, b, c, d = sorted(server.infos, key=lambda info: info.bytes)[-4:]
    cache = ShardCache(server.url, tmp_path, a.bytes + b.bytes + c.bytes)
    for _ in range(4):  # as a loader asks that reads of the window a, b, for long
        cache.expect([b, a, b, c, d])
        wait_until(lambda: not cache._expected, 20)
    assert server.asked == {info.name: 1 for info in (a, b, c)}


@pytest.mark.parametrize("harm", [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: bytes(len(b)), lambda b: b[:-1]])
def test_a_cached_shard_that_is_damaged_is_fetched_again(server, tmp_path, harm):
    path = ShardCache(server.url, tmp_path, ROOMY).locate(server.infos[0])
    path.write_bytes(harm(path.read_bytes()))
    Shard(ShardCache(server.url, tmp_path, ROOMY).locate(server.infos[0]), server.infos[0]).verify()
    assert server.asked == {server.infos[0].name: 2}


def test_the_shards_used_longest_ago_go_and_who_reads_one_keeps_it(server, tmp_path):
    a, b, c, d = sorted(server.infos, key=lambda info: info.bytes)[-4:]
    cache = ShardCache(server.url, tmp_path, a.bytes + b.bytes + c.bytes)
    shards = {info.name: Shard(cache.locate(info), info) for info in (a, b, c)}
    cache.locate(a)
    cache.locate(d)
    assert (tmp_path / a.name).exists() and not (tmp_path / b.name).exists()
    shards[b.name].ends()


def test_a_shard_is_safe_while_its_reader_is_about_to_open_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "GRACE_S", 1.0)
    a, b = server.infos[:2]
    cache = ShardCache(server.url, tmp_path, max(a.bytes, b.bytes))
    path = cache.locate(a)
    other = threading.Thread(target=cache.locate, args=(b,))
    other.start()
    other.join(0.5)
    Shard(path, a).verify()
    other.join(30)
    assert not path.exists() and (tmp_path / b.name).exists()


def test_room_is_taken_before_a_fetch_begins(server, tmp_path):
    a, b = server.infos[:2]
    cache, goes_on = ShardCache(server.url, tmp_path, a.bytes + b.bytes - 1), threading.Event()
    server.fault = lambda name, n: "" if name != a.name or goes_on.wait(20) else "503"
    first, second = (threading.Thread(target=cache.locate, args=(info,)) for info in (a, b))
    first.start()
    wait_until(lambda: server.asked[a.name] == 1, 20)
    second.start()
    second.join(0.5)
    assert server.asked[b.name] == 0
    goes_on.set()
    first.join(20)
    second.join(20)
    assert [path.name for path in tmp_path.glob("*.tar")] == [b.name]


def test_processes_share_one_cache_and_one_of_them_fetches_a_shard(server, folder, corpus, tmp_path, reader):
    data = data_of(server.url, corpus, cache_dir=str(tmp_path))
    others = [reader(data), reader(data)]
    mine = digest_of(data, 60)
    assert {other.communicate(timeout=60)[0].strip() for other in others} == {mine}
    assert mine == digest_of(data_of(str(folder), corpus), 60)
    assert {n for name, n in server.asked.items() if name.endswith(".tar")} == {1}
    assert left_over(tmp_path) == []


def test_threads_that_want_more_than_fits_all_get_what_they_want(server, tmp_path):
    limit, most, errors = 4 * max(info.bytes for info in server.infos), [], []
    server.fault = lambda name, n: most.append(room(tmp_path)) or ""

    def read(seed: int) -> None:
        cache = ShardCache(server.url, tmp_path, limit)
        for info in random.Random(seed).sample(server.infos, 8):
            try:
                Shard(cache.locate(info), info).verify()
            except DataError as error:
                errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert max(most) <= limit


def test_what_a_killed_process_left_takes_no_room(server, corpus, tmp_path, reader):
    server.fault = lambda name, n: "stall" if n == 1 and name.endswith(".tar") else ""
    data = data_of(server.url, corpus, cache_dir=str(tmp_path))
    killed = reader(data)
    wait_until(lambda: any(name.endswith(".tar") for name in server.asked), 60)
    killed.kill()
    killed.wait(20)
    drafts, (cache,) = left_over(tmp_path), tmp_path.iterdir()
    assert drafts and all(name.endswith(".tar.part") for name in drafts)
    other = next(info for info in server.infos if f".{info.name}.part" not in drafts)
    server.fault = lambda name, n: ""
    Shard(ShardCache(server.url, cache, other.bytes).locate(other), other).verify()
    assert left_over(tmp_path) == []


def test_a_cache_that_cannot_work_is_a_sentence(server, corpus, tmp_path, says):
    data = data_of(server.url, corpus, cache_dir=str(tmp_path / "cache"), cache_gib=1e-5)
    with pytest.raises(ConfigError) as error:
        open_dataset(data)
    says(error, "all shards, as data.window is not set, takes", "data.cache_gib allows 10.7 kB")
    with pytest.raises(ConfigError, match=r"shuffling 1 shards of each source takes \d+\.\d kB on disk"):
        open_dataset(data.model_copy(update={"window": 1}))
    (tmp_path / "cache").touch()
    with pytest.raises(ConfigError) as error:
        open_dataset(data_of(server.url, corpus, cache_dir=str(tmp_path / "cache")))
    says(error, f"data.cache_dir: {tmp_path / 'cache'}", "cannot be made (Not a directory)")
    (tmp_path / f".{server.infos[0].name}.lock").mkdir()
    with pytest.raises(DataError) as error:
        ShardCache(server.url, tmp_path, ROOMY).locate(server.infos[0])
    says(error, f"shard {server.infos[0].name} cannot be kept in {tmp_path} (Is a directory); make room")
