"""A small real server that speaks the Jobs API of a Ray cluster as it is documented, and what else may stand there."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

TOKEN = "a1" * 32


class JobsApi:
    """Use it in `with`. It takes jobs and runs none of them.

    token: that it asks for; None asks nobody. jobs: state and message by number, for tests to change. asked: method,
    path and token of every request. answers: what it says instead, by path: a code, and bytes.
    """

    def __init__(self, token: str | None = TOKEN, version: str = "2.60.0", host: str = "127.0.0.1") -> None:
        self.token, self.version = token, version
        self.jobs: dict[str, tuple[str, str]] = {}
        self.entrypoints: list[str] = []
        self.asked: list[tuple[str, str, str | None]] = []
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.headers: dict[str, str] = {}
        self._lock = threading.Lock()
        kind = type("Server", (ThreadingHTTPServer,), {"address_family": socket.AF_INET6} if ":" in host else {})
        self._server = kind((host, 0), self._handler())
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> JobsApi:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *said: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                self.answer()

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                said = self.headers.get("Authorization")
                with api._lock:
                    api.asked.append((self.command, self.path, said))
                    code, text = api._answer(self.command, self.path, said, body)
                self.send_response(code)
                for name, value in api.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        return Handler

    def _answer(self, method: str, path: str, said: str | None, body: bytes) -> tuple[int, bytes]:
        if path in self.answers:
            return self.answers[path]
        if self.token is not None and said is None:
            return 401, b"Unauthorized: Missing authentication token"
        if self.token is not None and said != f"Bearer {self.token}":
            return 403, b"Forbidden: Invalid authentication token"
        if path == "/api/version":
            return 200, json.dumps({"version": "4", "ray_version": self.version}).encode()
        if (method, path) == ("POST", "/api/jobs/"):
            return self._submit(json.loads(body))
        if path == "/api/jobs/":
            return 200, json.dumps(sorted(self.jobs)).encode()
        number, _, verb = path.removeprefix("/api/jobs/").partition("/")
        if number not in self.jobs:
            return 404, f"Job {number} does not exist".encode()
        if (method, verb) == ("POST", "stop"):
            self.jobs[number] = ("STOPPED", "Job was intentionally stopped.")
            return 200, b'{"stopped": true}'
        state, message = self.jobs[number]
        return 200, json.dumps({"submission_id": number, "status": state, "message": message}).encode()

    def _submit(self, asked: dict[str, Any]) -> tuple[int, bytes]:
        number = asked["submission_id"]
        if number in self.jobs:
            text = f"Traceback (most recent call last):\nValueError: Job with submission_id {number} already exists."
            return 500, text.encode()
        self.jobs[number] = ("PENDING", "Job has not started yet.")
        self.entrypoints.append(asked["entrypoint"])
        return 200, json.dumps({"job_id": number, "submission_id": number}).encode()
