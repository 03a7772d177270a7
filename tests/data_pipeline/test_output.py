"""Builds into real stores: the same bytes as here, whatever happens on the way, and one sentence for what cannot be."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from configs.errors import ConfigError, DataError
from data_pipeline import build as builder
from data_pipeline import plan, remote, tasks
from data_pipeline.build import Progress, build
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.output import RemoteFolder, load_manifest, output_of
from data_pipeline.places import RECORDS
from data_pipeline.scratch import PREFIX
from tests.conftest import leviathan, start_leviathan, wait_until
from tests.conftest import text as sentences
from tests.data_pipeline import stores
from tests.data_pipeline.store import batches_of, digest_of

pytestmark = pytest.mark.timeout(200)
STORES = {"s3": stores.s3, "gs": stores.gcs}


@pytest.fixture(autouse=True)
def _drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts lie where no other test has any."""
    (tmp_path / "drafts").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "drafts"))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, stores.Server]]:
    with contextlib.ExitStack() as stack:
        yield {scheme: stack.enter_context(store()) for scheme, store in STORES.items()}


def connect(server: stores.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process and its children be clients of a server."""
    for key, value in server.env.items():
        monkeypatch.setenv(key, value)
    for scheme in STORES:
        fsspec.get_filesystem_class(scheme).clear_instance_cache()


@pytest.fixture(params=list(STORES))
def place(servers: dict[str, stores.Server], monkeypatch: pytest.MonkeyPatch, request: Any) -> str:
    """A folder in a store that nobody has written to."""
    connect(servers[request.param], monkeypatch)
    return f"{request.param}://bucket/{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}/shards"


@pytest.fixture
def bucket(servers: dict[str, stores.Server], monkeypatch: pytest.MonkeyPatch, request: Any) -> str:
    """The same on S3 alone, which keeps conditions and asks for keys."""
    connect(servers["s3"], monkeypatch)
    return f"s3://bucket/{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}/shards"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of some files, each of which is more than one slice."""
    folder = tmp_path_factory.mktemp("text")
    for source in ("letters", "lists"):
        (folder / source).mkdir()
        for number in range(3):
            lines = [json.dumps({"text": sentences(100 * number + n, 60)}) for n in range(50)]
            (folder / source / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


def config(text: Path | str, place: str, **keys: object) -> DataConfig:
    sources = {
        "letters": SourceConfig(path=f"{text}/letters/"),
        "lists": SourceConfig(path=f"{text}/lists/", limit_mib=0.08),
    }
    return DataConfig(dir=place, sources=sources, **{"heldout": 0.1, "shard_mib": 0.02, "tokenizer": "sp:300", **keys})


def store_of(url: str) -> Any:
    return fsspec.filesystem(url.partition("://")[0], use_listings_cache=False, skip_instance_cache=True)


def objects(url: str) -> dict[str, str]:
    """The sha256 of every object in a folder, without the records of the build."""
    fs = store_of(url)
    found = {key.rpartition("/")[2]: key for key in fs.find(url) if f"/{RECORDS}/" not in key}
    return {name: hashlib.sha256(fs.cat_file(key)).hexdigest() for name, key in sorted(found.items())}


@pytest.fixture(scope="module")
def local(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build into a folder here gives."""
    out = tmp_path_factory.mktemp("local") / "out"
    build(config(text, str(out)), out, workers=1)
    return out


def drafts() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))


# ---- the same bytes


def test_a_build_from_a_store_into_a_store_gives_the_bytes_of_one_here(
    place: str, text: Path, local: Path, hashes: Callable[[Path], dict[str, str]]
) -> None:
    afar = place.rpartition("/")[0] + "/text"
    store_of(place).put(f"{text}/", f"{afar}/", recursive=True)
    manifest = build(config(afar, place), place, workers=2)
    different = {name for name, digest in hashes(local).items() if objects(place).get(name) != digest}
    assert different == {"manifest.json"}, "which says where the text came from"
    assert objects(place).keys() == hashes(local).keys()
    assert manifest.fingerprint == load_manifest(output_of(local)).fingerprint
    assert manifest.table.num_rows > 10
    assert not drafts()
    again = build(config(afar, place), place + "/", workers=1, progress=lambda told: pytest.fail("work was done"))
    assert again.fingerprint == manifest.fingerprint


def test_a_build_from_a_web_server_into_a_store_gives_the_bytes_of_one_here(
    place: str, text: Path, tmp_path: Path, hashes: Callable[[Path], dict[str, str]]
) -> None:
    def one_file(path: str) -> DataConfig:
        return DataConfig(sources={"letters": SourceConfig(path=path)}, heldout=0.1, shard_mib=0.05)

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(text))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        build(one_file(f"http://127.0.0.1:{web.server_port}/letters/0.jsonl"), place, workers=1)
        web.shutdown()
    build(one_file(f"{text}/letters/0.jsonl"), tmp_path / "here", workers=1)
    found, wanted = objects(place), hashes(tmp_path / "here")
    assert found.keys() == wanted.keys()
    assert {name for name in wanted if found[name] != wanted[name]} == {"manifest.json"}


def test_training_reads_equal_batches_from_a_store(place: str, text: Path, local: Path, tmp_path: Path) -> None:
    build(config(text, place), place, workers=1)
    afar = config(text, place, cache_dir=str(tmp_path))
    assert digest_of(afar, 40) == digest_of(config(text, str(local)), 40)
    assert len(list(batches_of(afar, 2))) == 2


@pytest.mark.parametrize("after", [1, 8, 20])
def test_a_build_that_was_stopped_goes_on_and_sends_nothing_again(
    place: str, text: Path, local: Path, hashes: Callable[[Path], dict[str, str]], after: int
) -> None:
    told: list[Progress] = []

    def stop(progress: Progress) -> None:
        told.append(progress)
        if len(told) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(config(text, place), place, workers=1, progress=stop)
    sent = {name: store_of(place).info(f"{place}/{name}") for name in objects(place)}
    assert "manifest.json" not in sent
    again: list[Progress] = []
    build(config(text, place), place, workers=1, progress=again.append)
    assert objects(place) == hashes(local)
    for phase in ("scan", "encode"):
        done = max((p.done_bytes for p in told if p.phase == phase), default=0)
        assert max(p.kept_bytes for p in again if p.phase == phase) == done
    for name, info in sent.items():
        if name.endswith(".tar"):
            assert store_of(place).info(f"{place}/{name}") == info, f"{name} was sent again"


@pytest.mark.e2e
def test_a_killed_build_leaves_nothing_that_counts_and_the_next_one_goes_on(
    bucket: str, tmp_path: Path, servers: dict[str, stores.Server]
) -> None:
    path = tmp_path / "my.yaml"
    source = "{python: {path: stdlib, limit_mib: 6}}"
    path.write_text(f"data: {{dir: '{bucket}', shard_mib: 0.5, sources: {source}}}\n")
    env = servers["s3"].env | {"TMPDIR": str(tmp_path)}
    process = start_leviathan("data", "build", path, "--workers", 2, env=env)
    wait_until(lambda: len(objects(bucket)) > 3, seconds=60)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "manifest.json" not in objects(bucket)
    (tmp_path / f"{PREFIX}left").mkdir()
    (tmp_path / f"{PREFIX}left" / "a.tar").write_bytes(b"of a process that was killed")
    done = leviathan("data", "build", path, "--workers", 2, env=env)
    assert done.code == 0, done.err
    assert f"building {bucket} from python" in done.out
    assert "data show" not in done.out
    assert not [left for left in tmp_path.glob(f"{PREFIX}*") if list(left.iterdir())]
    here = leviathan("data", "build", path, f"data.dir={tmp_path / 'here'}")
    assert here.code == 0, here.err
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "here").iterdir() if p.is_file()}
    assert objects(bucket) == files


def test_missing_and_foreign_objects_are_built_again_and_no_others(
    place: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(config(text, place), place, workers=1)
    wanted, fs = objects(place), store_of(place)
    fs.rm_file(f"{place}/letters-train-00001-00.tar")
    fs.pipe_file(f"{place}/lists-train-00002-00.tar", b"something else")
    fs.rm_file(f"{place}/{RECORDS}/encode-letters-00003.json")
    worked, work = [], tasks.Encode.work
    monkeypatch.setattr(tasks.Encode, "work", lambda task: worked.append(task.name) or work(task))
    build(config(text, place), place, workers=1)
    assert worked == ["encode-letters-00001", "encode-letters-00003", "encode-lists-00002"]
    assert objects(place) == wanted


# ---- whose folder it is


def test_a_folder_of_another_build_is_left_alone_until_it_is_told_to_rebuild(
    place: str, text: Path, says: Any, hashes: Callable[[Path], dict[str, str]], local: Path
) -> None:
    store_of(place).pipe_file(f"{place}/mine.txt", b"of somebody")
    build(config(text, place, heldout=0.2), place, workers=1)
    before = objects(place)
    with pytest.raises(ConfigError) as error:
        build(config(text, place), place, workers=1)
    says(error, f"{place} holds shards of another build (heldout: 0.2 there, 0.1 now); choose another data.dir")
    assert objects(place) == before
    build(config(text, place), place, workers=1, rebuild=True)
    assert objects(place) == {**hashes(local), "mine.txt": before["mine.txt"]}


def test_of_many_plans_for_one_folder_one_is_taken(bucket: str) -> None:
    wins = []

    def claim(number: int) -> None:
        with contextlib.suppress(ConfigError):
            plan.Folder(RemoteFolder(bucket)).claim({"number": number})
            wins.append(number)

    threads = [threading.Thread(target=claim, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1


def test_two_builds_of_one_plan_at_once_end_alike(
    bucket: str, text: Path, local: Path, hashes: Callable[[Path], dict[str, str]]
) -> None:
    made, gate = [], threading.Barrier(2)

    def work() -> None:
        gate.wait()
        made.append(build(config(text, bucket), bucket, workers=1).fingerprint)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2 and len(set(made)) == 1
    assert objects(bucket) == hashes(local)


def test_a_build_whose_folder_was_taken_writes_no_manifest(bucket: str, text: Path, says: Any) -> None:
    taken: list[str] = []

    def take(progress: Progress) -> None:
        if progress.phase == "encode" and progress.shards > 3 and not taken:
            taken.append(build(config(text, bucket, tokenizer="bytes"), bucket, workers=1, rebuild=True).fingerprint)

    with pytest.raises((ConfigError, DataError)) as error:
        build(config(text, bucket), bucket, workers=1, progress=take)
    says(error, bucket)
    assert load_manifest(output_of(bucket)).fingerprint == taken[0]


def test_all_of_many_objects_are_listed(bucket: str) -> None:
    store_of(bucket).pipe({f"{bucket}/{n:04d}.tar": b"x" * (n % 7) for n in range(1100)})
    sizes = RemoteFolder(bucket).sizes()
    assert sizes == {f"{n:04d}.tar": n % 7 for n in range(1100)}
    RemoteFolder(bucket).remove(sizes)
    assert RemoteFolder(bucket).sizes() == {}


# ---- what goes wrong


def test_what_a_store_holds_is_compared_with_what_was_sent(
    place: str, text: Path, monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    fs, sent = type(store_of(place)), []
    put = fs.put_file

    def flip(self: Any, here: str, there: str, **more: Any) -> None:
        content = bytearray(Path(here).read_bytes())
        content[len(content) // 2] ^= len(sent) < 2 or always
        sent.append(there)
        Path(here + ".flipped").write_bytes(content)
        put(self, here + ".flipped", there, **more)

    monkeypatch.setattr(fs, "put_file", flip)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(remote, "PATIENCE_S", 0.0)
    always = False
    manifest = build(config(text, place), place, workers=1)
    assert sent[0] == sent[1] == sent[2] != sent[3]
    shard = manifest.shard(0)
    assert objects(place)[shard.name] == shard.sha256
    always = True
    with pytest.raises(DataError) as error:
        build(config(text, place, heldout=0.2), place, workers=1, rebuild=True)
    says(error, f"{place}/letters-", "does not hold what was sent there (sha256", "(after 4 tries)")
    assert "manifest.json" not in objects(place)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("change", "where", "reason"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "s3://bucket/a", "permission denied"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "s3://bucket/a", "permission denied"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "s3://bucket/a", "no credentials"),
        ({}, "s3://absent/a", "not found"),
        ({}, "gs://absent/a", "not found"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "s3://bucket/a", "no answer"),
        ({"STORAGE_EMULATOR_HOST": "http://127.0.0.1:1"}, "gs://bucket/a", "no answer"),
    ],
)
def test_a_store_that_cannot_be_had_is_told_in_one_sentence(
    servers: dict[str, stores.Server], text: Path, tmp_path: Path, change: dict[str, str], where: str, reason: str
) -> None:
    env = servers["s3"].env | servers["gs"].env | {"HOME": str(tmp_path)} | change
    builds, began = {}, time.monotonic()
    for what, out, source in (("written", where, text / "letters"), ("read", tmp_path / "out", f"{where}/a.txt")):
        path = tmp_path / f"{what}.yaml"
        path.write_text(f"data: {{dir: '{out}', sources: {{a: {{path: '{source}'}}}}}}\n")
        builds[what] = start_leviathan("data", "build", path, env=env)
    for what, build_ in builds.items():  # both at once: most of it is waiting
        out, err = build_.communicate(timeout=90)
        assert build_.returncode in (65, 78), out + err
        assert err.startswith("error: " + where), err
        assert f"cannot be {what} ({reason}); check the address" in err
        assert err.count("\n") == 1
    assert time.monotonic() - began < 75


def test_a_store_that_goes_while_a_build_is_at_work_is_told(
    text: Path, monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 1.0)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.1)
    with stores.s3() as server:
        connect(server, monkeypatch)

        def end(progress: Progress) -> None:
            if progress.phase == "encode" and progress.shards > 3:
                server.process.kill()

        began = time.monotonic()
        with pytest.raises(DataError) as error:
            build(config(text, "s3://bucket/a", tokenizer="bytes"), "s3://bucket/a", workers=1, progress=end)
        says(error, "s3://bucket/a/", "(no answer); check the address, the network", "tries)")
        assert time.monotonic() - began < 90
    assert not drafts()


def test_nothing_is_written_to_a_web_server(text: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.dir is https://h/a, where nothing can be written; build on s3://"):
        build(config(text, "https://h/a"), "https://me:SECRET@h/a?sig=SECRET", workers=1)


def test_a_tokenizer_is_trained_where_tasks_are_done(text: Path, tmp_path: Path) -> None:
    from data_pipeline.pool import InProcess

    class Recorder(InProcess):
        names: list[str] = []  # noqa: RUF012 (of this test alone)

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.names.append(args[0].name)
            return super().submit(fn, *args, **kwargs)

    build(config(text, str(tmp_path / "out")), tmp_path / "out", workers=2, executor=Recorder())
    assert Recorder.names.count("the tokenizer") == 1
    assert builder.tokenizer.load_folder(tmp_path / "out").spec == "sp:300"
