"""The door to the Jobs API of a Ray cluster: its few requests, each with a deadline, and answers as plain values.

Plain HTTP, as documented: what runs on the cluster is its own Ray, and asking how a job is must not take the second
that importing one takes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, LeviathanError
from data_pipeline.on_ray import OLDEST

SCRIPT = "job.sh"
"""In the run folder: sets the environment up and becomes the module that it is told."""
OVER = ("STOPPED", "SUCCEEDED", "FAILED")
"""States of a job that nothing follows."""
UNKNOWN = "UNKNOWN"
"""State of a job whose cluster does not answer."""
PATIENCE_S = 30.0
_POLL_S = 1.0
_NOT_YET = "No available agent"
_TOKEN = re.compile(r"[!-~]*")
_ELSEWHERE = (301, 302, 303, 307, 308)


class RayError(LeviathanError):
    """The cluster refused, or did not answer."""


@dataclass(frozen=True)
class RayJob:
    """One job as the cluster sees it. state: PENDING, RUNNING, ...; message: what the cluster says of it."""

    number: str
    state: str
    message: str

    @property
    def over(self) -> bool:
        """Whether it has ended for good."""
        return self.state in OVER

    def __str__(self) -> str:
        reason = f", {self.message}" if self.state == UNKNOWN else ""
        return f"Ray job {self.number}: {self.state}{reason}"


class RayJobs:
    """The jobs of the cluster whose dashboard is at an address, such as http://10.0.0.1:8265.

    patience_s: for an answer.
    """

    def __init__(self, address: str, patience_s: float = PATIENCE_S) -> None:
        self.address = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
        self._patience_s = patience_s
        if not _is_address(self.address):
            raise ConfigError(f"{address!r} is no address of a Ray dashboard; write for example http://10.0.0.1:8265")

    def check(self) -> None:
        """Raises ConfigError where the cluster's Ray is too old, or does whatever anybody tells it to."""
        try:
            version = str(self._ask("GET", "/api/version")["ray_version"])
        except (KeyError, UnknownError):
            raise ConfigError(f"what answers at {self.address} is no Ray dashboard; check the address") from None
        if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
            raise ConfigError(
                f"the cluster at {self.address} has Ray {version}, which runs whatever anybody on the network submits;"
                f" install Ray {'.'.join(map(str, OLDEST))} or newer on it"
            )
        if os.environ.get("RAY_AUTH_MODE") == "disabled":
            return
        try:
            self._ask("GET", "/api/jobs/", token=None)
        except RefusedError:
            return
        raise ConfigError(
            f"the cluster at {self.address} asks nobody for a token, so whoever reaches it may run anything as its"
            " owner; start it with RAY_AUTH_MODE=token, or accept that with RAY_AUTH_MODE=disabled here"
        )

    def submit(self, number: str, entrypoint: str) -> bool:
        """Submit a job under a number of our own; False where the cluster has one of that number: it never runs twice.

        entrypoint: a line for the shell.
        """
        end = time.monotonic() + self._patience_s
        while True:
            try:
                self._ask("POST", "/api/jobs/", {"submission_id": number, "entrypoint": entrypoint})
                return True
            except RayError as error:
                if self.job(number) is not None:
                    return False
                # a cluster that has only just started answers before it can take jobs
                if _NOT_YET not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(_POLL_S)

    def job(self, number: str) -> RayJob | None:
        """A job, or None where the cluster knows none of that number."""
        try:
            found = self._ask("GET", f"/api/jobs/{urllib.parse.quote(number, safe='')}")
        except UnknownError:
            return None
        if "status" not in found:
            raise ConfigError(f"what answers at {self.address} is no Ray dashboard; check the address")
        return RayJob(number, str(found["status"]), str(found.get("message") or ""))

    def stop(self, number: str) -> None:
        """Take a job from the cluster, waiting or running; it has three seconds to end by itself."""
        self._ask("POST", f"/api/jobs/{urllib.parse.quote(number, safe='')}/stop")

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, token: str | None = ""
    ) -> dict[str, Any]:
        """One request. token: None sends none, and the empty one stands for the user's."""
        headers = {"Content-Type": "application/json"}
        token = own_token() if token == "" else token
        if token:
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data=data, method=method, headers=headers)
        # a proxy is for the world outside
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
        end = time.monotonic() + self._patience_s
        try:
            with opener.open(request, timeout=self._patience_s) as answer:
                found = json.loads(_read(answer, end) or b"{}")
        except urllib.error.HTTPError as error:
            raise self._refused(error, bool(token), end) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error))[:200]
            raise ConfigError(
                f"no Ray dashboard answers at {self.address} ({reason}); check the address, and that the cluster runs"
            ) from None
        return found if isinstance(found, dict) else {}

    def _refused(self, error: urllib.error.HTTPError, with_token: bool, end: float) -> LeviathanError:
        said: list[str] = []
        with contextlib.suppress(OSError, http.client.HTTPException):
            said = _read(error.fp, end).decode("utf-8", "replace").strip().splitlines()
        last = (said or [str(error.reason)])[-1][:300]
        if error.code in (401, 403):
            what = "refused the token" if with_token else "asks for a token"
            return RefusedError(
                f"the cluster at {self.address} {what} ({error.code}); put the cluster's into ~/.ray/auth_token (mode"
                " 0600), or set RAY_AUTH_TOKEN_PATH"
            )
        if error.code in _ELSEWHERE:
            place = error.headers.get("Location", "elsewhere")
            return ConfigError(f"{self.address} sends all who ask to {place}; give the address of the dashboard itself")
        if error.code == 404:
            return UnknownError(f"the cluster at {self.address} knows no such job; check the address")
        return RayError(f"the cluster at {self.address} refused ({error.code}): {last}")


class RefusedError(ConfigError):
    """A token is missing, or wrong."""


class UnknownError(RayError):
    """There is no such job."""


def own_token() -> str | None:
    """The user's token, from where Ray itself looks for it. Raises ConfigError where others may read it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return _token(os.environ["RAY_AUTH_TOKEN"], "RAY_AUTH_TOKEN")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        mode, token = path.stat().st_mode, path.read_bytes().decode("ascii", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"the token {path} cannot be read ({error.strerror}); make it a file of yours") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path} is a token that others may read (mode {mode & 0o777:o}); chmod 600 {path}")
    return _token(token, str(path))


def _token(text: str, place: str) -> str:
    """A token without what surrounds it. Raises ConfigError, which does not tell it, where no header could carry it."""
    token = text.strip()
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"{place} holds no token, which is letters, digits and signs; put the cluster's there")
    return token


def _is_address(address: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(address)
        port = parts.port
    except ValueError:
        return False
    plain = address.isprintable() and not set(address) & set(" ?#@\\")
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0


def _read(answer: Any, end: float) -> bytes:
    """All of an answer. Raises TimeoutError where it goes on for too long."""
    parts, left = [], answer.length  # which is None where the end of it is told otherwise
    while left != 0 and (part := answer.read1(1 << 16)):
        parts.append(part)
        left = None if left is None else left - len(part)
        if time.monotonic() > end:
            raise TimeoutError("its answer does not end")
    return b"".join(parts)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The token is for the address that the user gave, and no other."""

    def redirect_request(self, *asked: Any) -> None:
        return None
