"""The door to the Jobs API of a Ray cluster: its few requests, each with a deadline, and answers as plain values.

Plain HTTP, as documented: what runs on the cluster is its own Ray, and asking how a job is must not take the second
that importing one takes.
"""

from __future__ import annotations

import json
import os
import stat
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
_PATIENCE_S = 30.0


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
        return f"Ray job {self.number}: {self.state}"


class RayJobs:
    """The jobs of the cluster whose dashboard is at an address, such as http://10.0.0.1:8265."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
        parts = urllib.parse.urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{address!r} is no address of a Ray dashboard; write for example http://10.0.0.1:8265")

    def check(self) -> None:
        """Raises ConfigError where the cluster's Ray is too old, or does whatever anybody tells it to."""
        version = str(self._ask("GET", "/api/version").get("ray_version", "0"))
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
        try:
            self._ask("POST", "/api/jobs/", {"submission_id": number, "entrypoint": entrypoint})
        except RayError:
            if self.job(number) is None:
                raise
            return False
        return True

    def job(self, number: str) -> RayJob | None:
        """A job, or None where the cluster knows none of that number."""
        try:
            found = self._ask("GET", f"/api/jobs/{urllib.parse.quote(number)}")
        except UnknownError:
            return None
        return RayJob(number, str(found.get("status", "?")), str(found.get("message") or ""))

    def stop(self, number: str) -> None:
        """Take a job from the cluster, waiting or running; it has three seconds to end by itself."""
        self._ask("POST", f"/api/jobs/{urllib.parse.quote(number)}/stop")

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
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_PATIENCE_S) as answer:
                found = json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise self._refused(error, bool(token)) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ConfigError(
                f"no Ray dashboard answers at {self.address} ({reason}); check the address, and that the cluster runs"
            ) from None
        return found if isinstance(found, dict) else {}

    def _refused(self, error: urllib.error.HTTPError, with_token: bool) -> LeviathanError:
        said = error.read().decode("utf-8", "replace").strip().splitlines()
        last = (said or [str(error.reason)])[-1][:300]
        if error.code in (401, 403):
            what = "refused the token" if with_token else "asks for a token"
            return RefusedError(
                f"the cluster at {self.address} {what} ({error.code}); put the cluster's into ~/.ray/auth_token (mode"
                " 0600), or set RAY_AUTH_TOKEN_PATH"
            )
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
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        mode, token = path.stat().st_mode, path.read_text().strip()
    except FileNotFoundError:
        return None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path} is a token that others may read (mode {mode & 0o777:o}); chmod 600 {path}")
    return token
