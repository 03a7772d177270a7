"""Where text may come from: files of a web server, buckets, and what no URL may be."""

from __future__ import annotations

import functools
import gzip
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.implementations.memory
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import ConfigError, DataError
from data_pipeline import corpora, places
from data_pipeline.config import SourceConfig
from tests.data_pipeline.reading import MIB, lines, make_tar, read_all, texts


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("pipe:touch canary; cat x.txt", ["pipe: is not read from"]),
        ("pipe://touch canary", ["pipe: is not read from"]),
        ("file:/etc/passwd", ["file: is not read from", "./like:this"]),
        ("file:///etc/passwd.txt", ["file: is not read from"]),
        ("hf://datasets/a/b.parquet", ["hf: is not read from"]),
        ("ais://bucket/x.tar", ["ais: is not read from"]),
        ("ssh://host/x.txt", ["ssh: is not read from"]),
        ("simplecache::https://h/x.txt", ["simplecache: is not read from"]),
        ("https://h/x.txt::file:///etc/passwd", ["no plain URL"]),
        ("https:/h/x.txt", ["https: is not read from"]),
        ("https:///x.txt", ["no plain URL"]),
        ("https://[x/a.txt", ["is no URL"]),
        ("http://example.com/x.txt", ["use https://"]),
        ("http://localhost.evil.com/x.txt", ["use https://"]),
        ("http://127.0.0.1@evil.com/x.txt", ["use https://"]),
        ("-K/tmp/x.txt", ["begins like an option"]),
        ("--config=/tmp/x.txt", ["begins like an option"]),
    ],
)
def test_only_a_few_schemes_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: Any, url: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        read_all(url)
    says(error, *words)
    assert not list(tmp_path.iterdir())


def test_secrets_of_a_url_are_not_public() -> None:
    assert places.public("https://me:pass@host:8/a/b.txt?sig=SECRET#x") == "https://host:8/a/b.txt"
    assert places.public("pipe:curl SECRET") == "pipe:…"
    assert places.public("./local?name.txt") == "./local?name.txt"


@pytest.mark.parametrize(("scheme", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, says: Any, scheme: str, package: str, extra: str
) -> None:
    import fsspec

    def missing(name: str, **options: object) -> None:
        raise ImportError(f"Install {package}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ConfigError) as error:
        read_all(f"{scheme}://bucket/a.txt?X-Sig=SECRET")
    says(error, f"{scheme}://bucket/a.txt needs a package", f"pip install 'leviathan-pretrain[{extra}]'")
    assert "SECRET" not in str(error.value)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server for tmp_path that, as many do, cannot send parts of files."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            if "short" not in self.path:
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"text": "x"}\n')
            return None

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_files_are_read_from_a_web_server(tmp_path: Path, server: str) -> None:
    raw = lines(*({"text": f"document {i}"} for i in range(100)))
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    make_tar(tmp_path / "a.tar", [("1.txt", b"document 0")])
    assert len(read_all(f"{server}/a.jsonl?sig=SECRET", 100)) == 100
    assert [document.name for document in read_all(f"{server}/a.jsonl?sig=SECRET")][:2] == ["a.jsonl@0", "a.jsonl@23"]
    assert len(read_all(f"{server}/a.jsonl.gz")) == 100
    assert texts(f"{server}/a.tar") == ["document 0"]
    pq.write_table(pa.table({"text": ["document 0"]}), tmp_path / "a.parquet")
    assert texts(f"{server}/a.parquet") == ["document 0"]


@pytest.mark.parametrize("name", ["missing.jsonl", "short.jsonl", "missing.parquet", "noranges.parquet"])
def test_a_failing_server_is_named_without_secrets(tmp_path: Path, server: str, says: Any, name: str) -> None:
    if name == "noranges.parquet":
        # more than a server that cannot send parts is asked for at once
        pq.write_table(pa.table({"text": [os.urandom(1000).hex()] * 4000}), tmp_path / name, use_dictionary=False)
    with pytest.raises(DataError) as error:
        read_all(f"{server.replace('//', '//me:SECRET@')}/{name}?sig=SECRET")
    says(error, f"{server}/{name} cannot be read")
    assert "SECRET" not in str(error.value)


def test_a_bucket_is_listed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.implementations.memory.MemoryFileSystem()
    for name in ("b.txt", "a.txt", "c/d.txt", "e.csv"):
        memory.pipe(f"/bucket/data/{name}", name.encode())

    class Bucket:
        """What s3fs and gcsfs show: keys without a slash in front."""

        def find(self, url: str, detail: bool) -> dict[str, Any]:
            return {key.lstrip("/"): info for key, info in memory.find(url[4:], detail=detail).items()}

        def glob(self, url: str, detail: bool) -> dict[str, Any]:
            return {key.lstrip("/"): info for key, info in memory.glob(url[4:], detail=detail).items()}

        def info(self, url: str) -> dict[str, Any]:
            return memory.info(url[4:])

        def open(self, url: str, mode: str, **options: Any) -> Any:
            return memory.open(url[4:], mode)

    monkeypatch.setattr(places, "filesystem", lambda url: Bucket())
    plan = corpora.plan("s", SourceConfig(path="s3://bucket/data/"), MIB)
    assert [d.name for part in plan.slices for d in corpora.read(part)] == ["a.txt", "b.txt", "c/d.txt"]
    assert plan.skipped_files == 1
    assert [d.name for d in read_all("s3://bucket/data/*.txt")] == ["a.txt", "b.txt"]
    assert texts("s3://bucket/data/c/d.txt") == ["c/d.txt"]
