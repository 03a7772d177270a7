"""Shards read from afar: what comes is what was built, what fails is tried again, what is wrong is refused."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError
from data_pipeline import manifest as manifests
from data_pipeline import places, remote
from data_pipeline.dataset import open_dataset
from data_pipeline.inspect_shards import load_manifest
from data_pipeline.remote import ShardCache
from data_pipeline.shards import Shard
from tests.conftest import wait_until
from tests.data_pipeline.store import Store, batches_of, data_of, digest_of, left_over

ROOMY = 1 << 30


def test_the_same_batches_come_from_afar_as_from_here_and_a_shard_comes_once(server, folder, corpus, tmp_path):
    here, afar = data_of(str(folder), corpus), data_of(server.url, corpus, cache_dir=str(tmp_path))
    for one, other in zip(batches_of(here, 60), batches_of(afar, 60), strict=True):
        for name in ("tokens_BT", "targets_BT", "doc_BT", "pos_BT", "source_B"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert digest_of(afar, 60) == digest_of(here, 60)
    shards = {path.name for path in folder.glob("*.tar")}
    assert {name: n for name, n in server.asked.items() if name in shards and n > 1} == {}
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("kind", ["503", "429", "reset", "short", "long", "flip"])
def test_what_fails_twice_is_had_at_the_third_try(server, folder, corpus, tmp_path, kind):
    whole = kind in ("503", "429", "reset")
    server.fault = lambda name, n: kind if n <= 2 and (whole or name.endswith(".tar")) else ""
    afar = data_of(server.url, corpus, cache_dir=str(tmp_path))
    assert digest_of(afar, 20) == digest_of(data_of(str(folder), corpus), 20)
    assert {n for name, n in server.asked.items() if whole or name.endswith(".tar")} == {3}
    assert left_over(tmp_path) == []


def test_a_server_that_falls_silent_is_given_up_and_asked_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "SILENCE_S", 0.3)
    server.fault = lambda name, n: "stall" if n == 1 else ""
    Shard(ShardCache(server.url, tmp_path, ROOMY).locate(server.infos[0]), server.infos[0]).verify()
    assert server.asked == {server.infos[0].name: 2}


@pytest.mark.parametrize(("kind", "size"), [("flip", "{:,}"), ("short", "{half:,}"), ("long", "more than {:,}")])
def test_another_shard_than_the_manifest_names_is_refused_after_three_looks(server, tmp_path, says, kind, size):
    server.fault = lambda name, n: kind
    info = server.infos[0]
    with pytest.raises(DataError) as error:
        ShardCache(server.url, tmp_path, ROOMY).locate(info)
    came = f"{info.name} came as {size.format(info.bytes, half=info.bytes // 2)} bytes with sha256 "
    says(error, came, f"the manifest says {info.bytes:,} bytes with {info.sha256[:12]}…;", "(after 3 tries)")
    assert server.asked == {info.name: 3}
    assert [p.suffix for p in tmp_path.iterdir()] == [".lock", ".lock"]


@pytest.mark.parametrize("kind", ["404", "403"])
@pytest.mark.parametrize("lost", [".json", ".tar"])
def test_what_is_not_there_is_told_at_once_and_without_secrets(server, corpus, tmp_path, says, monkeypatch, kind, lost):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 20.0)
    server.fault = lambda name, n: kind if name.endswith(lost) else ""
    url, began = server.url.replace("//", "//me:SECRET@") + "/?sig=SECRET#SECRET", time.monotonic()
    with pytest.raises(DataError) as error:
        digest_of(data_of(url, corpus, cache_dir=str(tmp_path)), 1)
    assert time.monotonic() - began < 10
    reason = "not found" if kind == "404" else "status 403"
    says(error, server.url, f"{lost} cannot be read ({reason}); check the address", "(after one try)")
    assert "SECRET" not in str(error.value)


def test_a_signed_address_asks_for_every_object_with_its_signature(server, folder, corpus, tmp_path):
    url = server.url.replace("//", "//me:word@") + "/?sig=a%2Bb"
    assert digest_of(data_of(url, corpus, cache_dir=str(tmp_path)), 5) == digest_of(data_of(str(folder), corpus), 5)
    assert server.queries == {("sig=a%2Bb", "Basic bWU6d29yZA==")}


@given(st.from_regex(r"https://[a-z]{1,9}(/[a-z]{1,9}){0,3}/{0,2}", fullmatch=True), st.sampled_from(["", "?a=/b/"]))
def test_an_object_of_a_folder_is_below_it(folder, query):
    assert remote.join(folder + query, "s.tar") == f"{folder.rstrip('/')}/s.tar{query}"


def test_patience_ends_with_a_sentence_and_pauses_grow(server, tmp_path, says, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(remote, "PATIENCE_S", 0.0)
    times = []
    server.fault = lambda name, n: times.append(time.monotonic()) or "503"
    with pytest.raises(DataError) as error:
        ShardCache(server.url + "?sig=SECRET", tmp_path, ROOMY).locate(server.infos[0])
    says(error, f"{server.url}/{server.infos[0].name} cannot be read (status 503); check", "(after 4 tries)")
    assert "SECRET" not in str(error.value)
    assert all(later - earlier >= 0.05 * 2**i for i, (earlier, later) in enumerate(itertools.pairwise(times)))
    monkeypatch.setattr(remote, "PATIENCE_S", 3.0)
    with pytest.raises(DataError, match=r"\(after [5-7] tries\)"):
        ShardCache(server.url, tmp_path, ROOMY).locate(server.infos[0])


def test_what_goes_wrong_in_the_background_is_told_when_the_shard_is_wanted(server, tmp_path, says):
    small, large, lost = server.infos[0], dataclasses.replace(server.infos[1], bytes=ROOMY), server.infos[2]
    server.fault = lambda name, n: "404" if name == lost.name else ""
    cache = ShardCache(server.url, tmp_path, 1 << 20)
    cache.expect([large, lost, small])
    wait_until((tmp_path / small.name).exists, 20)
    with pytest.raises(ConfigError) as error:
        cache.locate(large)
    says(error, f"shard {large.name} takes 1.1 GB, but data.cache_gib allows 1.0 MB; raise it")
    with pytest.raises(DataError, match="not found"):
        cache.locate(lost)
    Shard(cache.locate(small), small).verify()
    assert server.asked[small.name] == 1


def test_a_manifest_cannot_name_a_folder_elsewhere(folder, corpus, tmp_path, says, monkeypatch):
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).symlink_to(path)
    manifest = load_manifest(folder)
    header, _ = manifests.encode(dataclasses.replace(manifest, fingerprint="../elsewhere"))
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_bytes(header)
    with Store(tmp_path).running(monkeypatch) as server, pytest.raises(DataError) as error:
        open_dataset(data_of(server.url, corpus, cache_dir=str(tmp_path / "cache")))
    says(error, f"{server.url}/manifest.json has the fingerprint '../elsewhere'", "who made them")
    assert not (tmp_path / "cache").exists() and not (tmp_path / "elsewhere").exists()
