"""A web server of shards on this machine that fails as it is told, and what is compared of what was read from it."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import http.server
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline import remote
from data_pipeline.batch import Batch
from data_pipeline.build import build
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.dataset import open_dataset
from data_pipeline.inspect_shards import load_manifest
from data_pipeline.loader import Loader
from data_pipeline.order import Order


class Store(http.server.ThreadingHTTPServer):
    """A folder, read by GET alone as with a signed URL.

    fault(name, n): what befalls the n-th request of a name; a status, or one of the words of _Handler, or nothing.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        manifest = load_manifest(folder)
        self.infos = [manifest.shard(row) for row in range(manifest.table.num_rows)]
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}/shards"
        self.fault: Callable[[str, int], str] = lambda name, n: ""
        self.asked: Counter[str] = Counter()
        self.queries: set[tuple[str, str | None]] = set()
        """What came with requests: the query and the credentials."""

    def shutdown_request(self, request: socket.socket) -> None:
        self.close_request(request)  # without the polite end that would come before a reset

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # readers hang up when they have seen enough

    @contextlib.contextmanager
    def running(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
        """Serve, and have those who read from here behave as ever, but within a test's patience."""
        monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
        monkeypatch.setattr(remote, "GRACE_S", 0.2)
        thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: Store

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_error(403)

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        name = path.rpartition("/")[2]
        self.server.asked[name] += 1
        self.server.queries.add((query, self.headers.get("Authorization")))
        kind = self.server.fault(name, self.server.asked[name])
        if kind.isdigit():
            self.send_error(int(kind))
            return
        body = (Path(self.directory) / name).read_bytes()
        half = len(body) // 2
        if kind == "flip":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        body = {"short": body[:half], "long": body + b"x" * 9000}.get(kind, body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if kind not in ("reset", "stall") else body[:half])
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if kind == "stall":
            self.connection.settimeout(20)
            self.connection.recv(1)  # returns when the reader gives up


def many_shards(corpus: Path, out: Path) -> Path:
    """The corpus in many small shards."""
    build(data_of(str(out), corpus), out, workers=1)
    return out


def data_of(place: str, corpus: Path, **more: object) -> DataConfig:
    sources = {name: SourceConfig(path=str(corpus / name)) for name in ("letters", "lists")}
    return DataConfig(dir=place, sources=sources, heldout=0.1, shard_mib=0.01, **more)


def loader_of(data: DataConfig) -> Loader:
    dataset = open_dataset(data)
    order = Order(dataset.manifest, length=32, seed=1, weights={"letters": 2, "lists": 1}, window=data.window)
    return Loader(order, dataset.shards, batch_rows=8, micro_rows=8, rank=0, world=1)


def batches_of(data: DataConfig, steps: int) -> Iterator[Batch]:
    """The loader's batches, the loader closed at the end."""
    loader = loader_of(data)
    try:
        for _ in range(steps):
            yield loader.next()[0]
    finally:
        loader.close()


def digest_of(data: DataConfig, steps: int) -> str:
    digest = hashlib.sha256()
    for batch in batches_of(data, steps):
        for tensor in (batch.tokens_BT, batch.targets_BT, batch.doc_BT, batch.source_B):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def room(cache: Path) -> int:
    """Bytes that shards take in a cache, at a moment when nobody takes room."""
    sizes = []
    with contextlib.ExitStack() as stack:
        for lock in cache.rglob(".room.lock"):
            fcntl.flock(stack.enter_context(open(lock)), fcntl.LOCK_EX)
        for path in [*cache.rglob("*.part"), *cache.rglob("*.tar")]:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(path.stat())
    return sum({stat.st_ino: stat.st_size for stat in sizes}.values())


def open_though_gone(cache: Path) -> int:
    """Shards of a cache that this process still has mapped although their files were removed."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(f"{cache}/" in line and line.endswith("(deleted)") for line in lines)


def left_over(cache: Path) -> list[str]:
    """What lies in a cache beside shards and locks."""
    return [p.name for p in cache.rglob("*") if p.is_file() and not p.name.endswith((".tar", ".lock"))]
