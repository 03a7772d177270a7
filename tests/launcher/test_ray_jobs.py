"""The Jobs API, against a real server: who is asked, with which token, for how long; what is made of the answers."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, LeviathanError
from launcher.ray_jobs import RayError, RayJobs, own_token
from tests.jobs_api import TOKEN, JobsApi

PATIENCE_S = 0.5


@pytest.fixture(autouse=True)
def nothing_of_mine(monkeypatch, tmp_path):
    """Of who runs the tests: no token, no mode."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def api(monkeypatch) -> Iterator[JobsApi]:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with JobsApi() as server:
        yield server


@contextlib.contextmanager
def speaking(first: bytes, again: bytes = b"") -> Iterator[str]:
    """The address of somebody who says `first` to all who call, and `again` until they leave, and never hangs up."""
    over = threading.Event()
    calls: list[socket.socket] = []

    def talk(call: socket.socket) -> None:
        with contextlib.suppress(OSError):
            call.recv(1 << 16)
            call.sendall(first)
            while again and not over.wait(0.05):
                call.sendall(again)

    def listen(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                calls.append(server.accept()[0])
                threading.Thread(target=talk, args=(calls[-1],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=listen, args=(server,), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        over.set()
        server.shutdown(socket.SHUT_RDWR)
    for call in calls:
        call.close()


def token_file(folder, text=TOKEN, mode=0o600):
    path = folder / "token"
    path.write_text(text)
    path.chmod(mode)
    return path


# ---- addresses


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://10.0.0.1:8265", "http://10.0.0.1:8265"),
        ("http://10.0.0.1:8265/", "http://10.0.0.1:8265"),
        ("10.0.0.1:8265", "http://10.0.0.1:8265"),
        ("head.example", "http://head.example"),
        ("https://head.example/ray/", "https://head.example/ray"),
        ("[::1]:8265", "http://[::1]:8265"),
        ("http://[fe80::1%25eth0]:8265//", "http://[fe80::1%25eth0]:8265"),
    ],
)
def test_addresses_are_taken_as_people_write_them(given, address):
    assert RayJobs(given).address == address


@pytest.mark.parametrize(
    "address",
    [
        "", "http://", "://", "ray://10.0.0.1:10001", "ftp://head", "http://:8265", "http://head:port", "http://[::1",
        "::1:8265", "http://head:99999", "http://head:0", "http://he ad:1", "http://head:1\nX: y", "file:///etc/passwd",
        "http://me:secret@head:8265", "http://head:8265?token=x", "http://head:8265/#jobs", "http://head\\@evil:1",
    ],
)  # fmt: skip
def test_other_addresses_are_refused(address):
    with pytest.raises(ConfigError, match="is no address of a Ray dashboard; write for example"):
        RayJobs(address)


@settings(max_examples=500, deadline=None)
@given(address=st.text(max_size=30) | st.text(alphabet="http:/[]@.%?# 0189a\\\n", max_size=30))
def test_no_address_is_more_than_refused(address):
    with contextlib.suppress(ConfigError):
        taken = RayJobs(address)
        assert taken.address.startswith(("http://", "https://"))
        assert not taken.address.endswith("/")


def test_a_cluster_is_reached_by_ipv6(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with JobsApi(host="::1") as api:
        RayJobs(api.address).check()


# ---- tokens


def test_the_token_goes_with_every_request_but_the_one_that_asks_whether_it_must(api):
    jobs = RayJobs(api.address)
    jobs.check()
    assert jobs.submit("a-1", "true")
    jobs.stop("a-1")
    bearers = [said for _, _, said in api.asked]
    assert bearers == [f"Bearer {TOKEN}", None, f"Bearer {TOKEN}", f"Bearer {TOKEN}"]


@pytest.mark.parametrize(("token", "what"), [(None, "asks for a token (401)"), ("b2", "refused the token (403)")])
def test_a_token_that_is_missing_or_wrong_is_told_apart(api, monkeypatch, token, what):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    if token is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    for ask in (lambda jobs: jobs.check(), lambda jobs: jobs.submit("a-1", "true"), lambda jobs: jobs.job("a-1")):
        with pytest.raises(ConfigError) as refused:
            ask(RayJobs(api.address))
        assert f"the cluster at {api.address} {what}; put the cluster's into ~/.ray/auth_token" in str(refused.value)
    assert not api.jobs


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_token_of_its_owner_alone_is_taken(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token_file(tmp_path, f" {TOKEN}\n", mode)))
    assert own_token() == TOKEN


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o602, 0o610])
def test_a_token_that_others_may_read_is_refused(tmp_path, monkeypatch, mode):
    path = token_file(tmp_path, mode=mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    with pytest.raises(ConfigError, match=f"others may read \\(mode {mode:o}\\); chmod 600 {path}$"):
        own_token()


def test_a_token_is_looked_for_where_ray_looks(tmp_path, monkeypatch):
    assert own_token() is None
    (tmp_path / "home" / ".ray").mkdir(parents=True)
    token_file(tmp_path / "home" / ".ray", "of-home").rename(tmp_path / "home" / ".ray" / "auth_token")
    assert own_token() == "of-home"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token_file(tmp_path, "of-path")))
    assert own_token() == "of-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-environment\n")
    assert own_token() == "of-environment"


@pytest.mark.parametrize("text", ["two\nlines", "two words", "schlüssel", "a\x00b", "a\r\nX-Evil: 1"])
def test_what_is_no_token_is_refused_and_not_told(tmp_path, monkeypatch, text):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token_file(tmp_path, text)))
    with pytest.raises(ConfigError, match="holds no token") as refused:
        RayJobs("http://127.0.0.1:1").check()
    assert text.split()[0] not in str(refused.value).replace(str(tmp_path), "").split()


def test_a_token_that_is_a_folder_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path))
    tmp_path.chmod(0o700)
    with pytest.raises(ConfigError, match="cannot be read"):
        own_token()


def test_a_token_is_not_carried_to_where_a_cluster_sends_it(api):
    with JobsApi(token=None) as elsewhere:
        for path in ("/api/version", "/api/jobs/"):
            api.answers[path] = (302, b"")
        api.headers["Location"] = f"{elsewhere.address}/api/version"
        for ask in (lambda jobs: jobs.check(), lambda jobs: jobs.submit("a-1", "true")):
            with pytest.raises(ConfigError, match=f"sends all who ask to {elsewhere.address}/api/version; give"):
                ask(RayJobs(api.address))
        assert not elsewhere.asked


# ---- clusters that are refused


@pytest.mark.parametrize("version", ["2.51.9", "2.9.0", "1.99.0", "2.51.0.dev0", "0"])
def test_a_ray_that_runs_what_anybody_submits_is_refused(api, version):
    api.version = version
    with pytest.raises(ConfigError, match=f"has Ray {version}, which runs whatever anybody .* install Ray 2.52"):
        RayJobs(api.address).check()


@pytest.mark.parametrize("version", ["2.52.0", "2.60.1", "3.0.0.dev0", "2.100.0"])
def test_a_newer_ray_is_taken(api, version):
    api.version = version
    RayJobs(api.address).check()


def test_a_cluster_that_asks_nobody_is_refused_unless_that_is_accepted(api, monkeypatch):
    api.token = None
    with pytest.raises(
        ConfigError, match=f"the cluster at {api.address} asks nobody for a token.*RAY_AUTH_MODE=disabled"
    ):
        RayJobs(api.address).check()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ConfigError, match="asks nobody"):
        RayJobs(api.address).check()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    RayJobs(api.address).check()
    api.version = "2.51.0"
    with pytest.raises(ConfigError, match="has Ray"):
        RayJobs(api.address).check()


# ---- jobs


def test_a_number_runs_once_however_many_submit_it_at_the_same_moment(api):
    with ThreadPoolExecutor(8) as pool:
        new = list(pool.map(lambda n: RayJobs(api.address).submit("a-1", f"echo {n}"), range(16)))
    assert new.count(True) == 1
    assert len(api.entrypoints) == 1


def test_a_job_that_the_cluster_refuses_for_another_reason_is_an_error(api):
    api.answers["/api/jobs/"] = (400, b"Traceback:\n  line\nValueError: the entrypoint is empty\n")
    with pytest.raises(RayError, match=r"refused \(400\): ValueError: the entrypoint is empty$"):
        RayJobs(api.address).submit("a-1", "")


def test_a_cluster_that_has_only_just_started_is_asked_again_for_a_while(api):
    api.answers["/api/jobs/"] = (500, b"No available agent to submit job, please try again later.\n")
    with pytest.raises(RayError, match=r"refused \(500\): No available agent"):
        RayJobs(api.address, PATIENCE_S).submit("a-1", "true")
    asked = sum(method == "POST" for method, _, _ in api.asked)
    assert asked > 1
    later = threading.Timer(PATIENCE_S, api.answers.clear)
    later.start()
    assert RayJobs(api.address).submit("a-1", "true")
    later.join()


def test_a_job_nobody_knows_is_none(api):
    jobs = RayJobs(api.address)
    assert jobs.job("a-1") is None
    with pytest.raises(RayError, match="knows no such job"):
        jobs.stop("a-1")


@pytest.mark.parametrize(
    ("state", "over"),
    [("PENDING", False), ("RUNNING", False), ("STOPPED", True), ("SUCCEEDED", True), ("FAILED", True), ("NEW", False)],
)
def test_a_job_is_over_for_good_or_not(api, state, over):
    api.jobs["a-1"] = (state, "why")
    job = RayJobs(api.address).job("a-1")
    assert (job.number, job.state, job.message, job.over) == ("a-1", state, "why", over)
    assert str(job) == f"Ray job a-1: {state}"


def test_numbers_stay_within_their_place_in_an_address(api):
    assert RayJobs(api.address).job("../version?x#y") is None
    assert api.asked[-1][1] == "/api/jobs/..%2Fversion%3Fx%23y"


# ---- answers that are none


@pytest.mark.parametrize(
    "answer",
    [b"", b"<html>hello</html>", b"\xff\xfe\x00", b'{"ray_version": ', b"[]", b"{}", b"null", b'"2.60.0"'],
)
def test_what_is_no_ray_dashboard_is_told(api, answer):
    api.answers["/api/version"] = (200, answer)
    with pytest.raises(ConfigError, match=r"no Ray dashboard.*check the address") as told:
        RayJobs(api.address).check()
    assert str(told.value).count("\n") == 0


def test_another_server_is_told(api):
    api.answers["/api/version"] = (404, b"<html>\nnot found\n</html>")
    with pytest.raises(ConfigError, match="is no Ray dashboard; check the address"):
        RayJobs(api.address).check()


@pytest.mark.parametrize("answer", [b"[]", b"{}", b"null", b"7"])
def test_a_job_without_a_state_is_no_job(api, answer):
    api.answers["/api/jobs/a-1"] = (200, answer)
    with pytest.raises(ConfigError, match="is no Ray dashboard"):
        RayJobs(api.address).job("a-1")


@pytest.mark.parametrize(
    "words",
    [b"SSH-2.0-OpenSSH_9.2\r\n", b"\x00\x01\x02\r\n\r\n", b"HTTP/1.1 boo\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-"],
)
def test_who_does_not_speak_http_is_told_within_the_deadline(words):
    began = time.monotonic()
    with speaking(words) as address, pytest.raises(ConfigError, match="no Ray dashboard answers at"):
        RayJobs(address, PATIENCE_S).check()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("code", [b"200 OK", b"500 Oh", b"401 No"])
def test_an_answer_that_never_ends_has_a_deadline(code):
    """Each piece comes in time; all of them never do."""
    began = time.monotonic()
    with (
        speaking(b"HTTP/1.1 " + code + b"\r\nContent-Length: 999999\r\n\r\n", b" ") as address,
        pytest.raises(LeviathanError, match=address),
    ):
        RayJobs(address, PATIENCE_S).check()
    assert time.monotonic() - began < 5


def test_silence_has_a_deadline():
    began = time.monotonic()
    with speaking(b"") as address, pytest.raises(ConfigError, match=r"no Ray dashboard answers at .*timed out"):
        RayJobs(address, PATIENCE_S).job("a-1")
    assert PATIENCE_S <= time.monotonic() - began < 5


def test_nobody_there_is_told_in_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConfigError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:.*Connection refused"):
        RayJobs(f"127.0.0.1:{port}").check()


def test_no_proxy_stands_between_a_user_and_the_cluster(api, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    RayJobs(api.address).check()
