"""The script of a Ray job, its number and its submission: every value arrives exactly or is refused, nothing of it is
executed, and a job that is submitted twice is one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, LeviathanError, UsageError
from launcher.config import LaunchConfig, RayConfig
from launcher.ray_jobs import RayJob, RayJobs
from launcher.submit_ray import FORWARDED, code_of, job_number, queue, script_of, submit_ray, write_script
from pretrain.run_folder import RunFolder
from tests.conftest import events, leviathan
from tests.jobs_api import TOKEN, JobsApi
from tests.small_ensemble import write_ensemble

NASTY = st.one_of(
    st.text(st.characters(), max_size=40),
    st.binary(max_size=20).map(os.fsdecode),
    st.sampled_from([
        "a; touch pwned", "$(touch pwned)", "`touch pwned`", "'; touch pwned; '", "a\ntouch pwned\n", "a\rb", "'", '"',
        "\\", "a b", "a\u2028b", "-", "-c", "--", "", "*", "~", "~root", "a%j", "x\x00y", "${HOME}", "$'\\n'", "a&&b",
        "|cat", "{{ 7*7 }}", "{% raw %}", "#", "!", "\n", " ", "\t", "\udc80", "\ud800", "é", ".", "..", "a\\", "=",
    ]),
)  # fmt: skip
PRINTER = r"""#!/bin/bash
printf '%s\0' "$0" "$PWD" "$PYTHONPATH" "$FROM_FILE" "$LEVIATHAN_FAULT" "$WANDB_MODE" "$WANDB_BASE_URL" "$@"
"""


@pytest.fixture(autouse=True)
def of_nobody(monkeypatch):
    """Nothing of who runs the tests reaches a job, or stays changed."""
    for name in (*FORWARDED, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    old = os.umask(0o077)
    yield
    os.umask(old)


@pytest.fixture
def api() -> Iterator[JobsApi]:
    with JobsApi() as server:
        yield server


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "it's a run")
    folder.make()
    folder.set_facts(run_id="0123456789abcdef", name=folder.name)
    return folder


# ---- the script


def component(text: str) -> str:
    """A text as the name of a file."""
    name = os.fsencode(text.encode("utf-8", "surrogateescape").replace(b"/", b"_")[:80] if plain(text) else b"x")
    return os.fsdecode(b"_" + name if name in (b"", b".", b"..") else name)


def plain(text: str) -> bool:
    """Whether the text can be part of a path, or a variable, at all."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def holds_only_text(*values: str) -> bool:
    return not any(re.search("[\0\ud800-\udfff]", value) for value in values)


def tried(run: Path, asks: RayConfig) -> tuple[str, str | None]:
    """The script, and why there is none."""
    try:
        return script_of(RunFolder(run), asks, run / "code-0"), None
    except ConfigError as error:
        return "", str(error)


class Cases:
    """Scripts and what is to arrive of them; all are run by one shell."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.expected = folder, dict[Path, list[str]]()
        self.refused = 0
        self.printer = folder / "printer"
        self.printer.write_text(PRINTER)
        self.printer.chmod(0o700)

    def add(self, words: list[str], environ: pytest.MonkeyPatch) -> None:
        """A case whose run, working folder, file of variables, Python and variables are called as the words say."""
        base = self.folder / str(len(self.expected) + self.refused)
        run, cwd, env_file, python = (base / kind / component(word) for kind, word in zip("abcd", words))
        for path in (run, cwd, env_file.parent, python.parent):
            path.mkdir(parents=True)
        env_file.write_text("export FROM_FILE=yes\n")
        python.symlink_to(self.printer)
        values = [word if plain(word) else "" for word in words[4:]]
        for name, value in zip(FORWARDED, values):
            environ.setenv(name, value)
        environ.chdir(cwd)
        text, refusal = tried(run, RayConfig(python=str(python), env_file=str(env_file)))
        if refusal is not None:
            assert not holds_only_text(*map(str, (run, cwd, env_file, python)), *values)
            assert refusal.startswith("no script can hold the line ")
            assert "\n" not in refusal
            self.refused += 1
            return
        script = base / "job.sh"
        script.write_bytes(text.encode())
        path = str(run)
        self.expected[script] = [str(python), str(cwd), f"{path}/code-0", "yes", *values, "-P", "-m", "a.module", path]

    def check(self) -> None:
        """Run all of them."""
        lines = []
        for script, words in self.expected.items():
            assert subprocess.run(["bash", "-n", script], timeout=20, check=False).returncode == 0
            lines.append(f"( . {script} a.module {shlex.quote(words[-1])} ) > {script}.out 2>&1")
        (self.folder / "all.sh").write_bytes("\n".join(lines).encode())
        clean = {"PATH": os.environ["PATH"]}
        subprocess.run(["bash", self.folder / "all.sh"], env=clean, cwd=self.folder, timeout=100, check=True)
        for script, words in self.expected.items():
            assert Path(f"{script}.out").read_bytes().decode().split("\0") == [*words, ""]
        assert not list(self.folder.rglob("pwned*"))


def test_names_folders_and_variables_arrive_exactly_or_are_refused(tmp_path, monkeypatch):
    cases = Cases(tmp_path)

    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(words=st.lists(NASTY, min_size=7, max_size=7))
    def collect(words):
        cases.add(words, monkeypatch)

    collect()
    monkeypatch.chdir(tmp_path)
    assert len(cases.expected) > 60
    assert cases.refused > 0
    cases.check()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(python=NASTY, env_file=NASTY)
def test_any_words_for_python_and_its_file_are_quoted_or_refused(tmp_path, python, env_file):
    """Also those that name nothing."""
    assert "launch.ray.env_file: " in str(tried(tmp_path, RayConfig(env_file=env_file))[1])
    text, refusal = tried(tmp_path, RayConfig(python=python))
    if refusal is not None:
        assert not holds_only_text(python)
        assert "no script can hold the line" in refusal
    elif python:
        assert text.endswith(f'exec -- {shlex.quote(python)} -P -m "$@"\n')


def test_a_script_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    (tmp_path / "a.env").write_text("")
    asks = RayConfig(python="/opt/python", env_file=str(tmp_path / "a.env"))
    lines = script_of(RunFolder(tmp_path / "run"), asks, tmp_path / "run" / "code-0").splitlines()
    assert lines[0] == "#!/bin/bash"
    assert [line for line in lines[1:] if not line.startswith("#")] == [
        "set -e", "trap '' USR1", f"cd -- {Path.cwd()}", f". {tmp_path}/a.env", "export WANDB_MODE=offline",
        f"export PYTHONPATH={tmp_path}/run/code-0", 'exec -- /opt/python -P -m "$@"',
    ]  # fmt: skip


@pytest.mark.parametrize("env_file", ["/none", "~nobody-of-that-name/x", "a\0b", ""])
def test_a_file_of_variables_that_is_not_there_is_told(tmp_path, env_file):
    with pytest.raises(ConfigError, match=r"launch\.ray\.env_file: .*empty$"):
        script_of(RunFolder(tmp_path), RayConfig(env_file=env_file), tmp_path)


def test_a_file_of_variables_must_succeed(tmp_path):
    (tmp_path / "a.env").write_text("false\n")
    text = script_of(RunFolder(tmp_path), RayConfig(python="/bin/echo", env_file=str(tmp_path / "a.env")), tmp_path)
    done = subprocess.run(["bash", "-c", text, "-", "a"], capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


# ---- numbers


@settings(max_examples=300, deadline=None)
@given(name=NASTY, nth=st.integers(1, 10**6))
def test_numbers_are_words_of_a_shell_and_names_of_files(tmp_path_factory, name, nth):
    folder = RunFolder(tmp_path_factory.getbasetemp() / "numbers")
    folder.make()
    folder.set_facts(run_id="0123456789abcdef")
    folder.name = name
    number = job_number(folder, nth)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,130}", number)
    assert number == job_number(folder, nth) != job_number(folder, nth + 1)
    folder.name = f"{name}x"
    assert job_number(folder, nth).endswith(f"-01234567-{nth}")


def test_a_run_that_is_submitted_again_has_another_number_each_time_and_one_job(run, api):
    jobs = RayJobs(api.address)
    assert queue(run, jobs, "launcher.on_ray", [run]) == ("it-s-a-run-01234567-1", True)
    assert run.facts()["job"] | {"submitted": 0} == {
        "ray": "it-s-a-run-01234567-1", "address": api.address, "submitted": 0, "shared": False,
    }  # fmt: skip
    assert queue(run, jobs, "launcher.on_ray", [run]) == ("it-s-a-run-01234567-2", True)
    path = run.path
    assert api.entrypoints == [f"exec {shlex.join(['bash', f'{path}/job.sh', 'launcher.on_ray', str(path)])}"] * 2


@pytest.mark.parametrize(("of_ray", "expected"), [(None, "/opt/slurm"), ("/opt/ray", "/opt/ray")])
def test_within_a_slurm_job_python_is_slurms_where_ray_names_none(run, of_ray, expected):
    launch = LaunchConfig(ray=RayConfig(python=of_ray))
    write_script(SimpleNamespace(folder=run, launch=launch), "/opt/slurm")
    assert f"exec -- {expected} " in (run.path / "job.sh").read_text()


QUEUED = """
import sys
from pathlib import Path
from launcher import submit_ray
from launcher.ray_jobs import RayJobs
from pretrain.run_folder import RunFolder
submit_ray._numbers = lambda folder: set()  # all of them look at the history before any of them writes it
run = RunFolder(Path(sys.argv[1]))
print(*submit_ray.queue(run, RayJobs(sys.argv[2]), "launcher.on_ray", [run]))
"""


def test_submissions_at_the_same_moment_are_one_job(run, api):
    words = [sys.executable, "-c", QUEUED, str(run.path), api.address]
    at_once = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    told = [one.communicate(timeout=60)[0].split() for one in at_once]
    assert sorted(told) == [["it-s-a-run-01234567-1", "False"]] * 3 + [["it-s-a-run-01234567-1", "True"]]
    assert len(api.entrypoints) == 1


def test_a_job_whose_submission_nobody_lived_to_write_down_is_taken_up(run, api):
    jobs = RayJobs(api.address)
    api.jobs["it-s-a-run-01234567-1"] = ("RUNNING", "")
    assert queue(run, jobs, "launcher.on_ray", [run]) == ("it-s-a-run-01234567-1", False)
    assert events(run, "submit") == ["submitted as Ray job it-s-a-run-01234567-1"]


def test_a_job_that_nobody_wrote_down_and_that_is_over_does_not_keep_out_the_next(run, api):
    api.jobs["it-s-a-run-01234567-1"] = ("FAILED", "the head went away")
    assert queue(run, RayJobs(api.address), "launcher.on_ray", [run]) == ("it-s-a-run-01234567-2", True)


def test_all_runs_of_a_job_say_so(run, api, tmp_path):
    others = [RunFolder(tmp_path / name) for name in "ab"]
    for other in others:
        other.make()
    number, _ = queue(run, RayJobs(api.address), "launcher.ensemble_on_ray", [*others, run])
    for each in (*others, run):
        assert each.facts()["job"]["ray"] == number
        assert each.facts()["job"]["shared"] is True
        assert len(events(each, "submit")) == 1


# ---- submitting


def submit(config, *words, address=None, mode="submit", branch=(), allow=(), without=()):
    return submit_ray([str(config)], list(words), address, branch, allow, without, mode=mode)


def test_a_submitted_run_is_ready_and_a_second_command_follows_it(tiny, api, tmp_path, capsys):
    assert submit(tiny, address=api.address) == 0
    run = RunFolder(tmp_path / "runs" / "tiny")
    number = run.facts()["job"]["ray"]
    assert number in capsys.readouterr().out
    assert (run.path / "job.sh").stat().st_mode & 0o077 == 0
    assert TOKEN not in "".join(p.read_text("utf-8", "replace") for p in run.path.iterdir() if p.is_file())
    api.jobs[number] = ("RUNNING", "")

    def end():
        run.event("launch", "attempt 0: starting 1 rank")
        run.event("done", "trained to step 20", step=20)
        api.jobs[number] = ("SUCCEEDED", "")

    timer = threading.Timer(0.5, end)
    timer.start()
    assert submit(tiny, address=api.address) == 0
    timer.join()
    assert f"Ray job {number}: RUNNING already; following it" in capsys.readouterr().out
    assert len(api.entrypoints) == 1


@pytest.mark.parametrize(
    ("kind", "code", "told"), [("done", None, 0), ("stop", 75, 75), ("stop", 70, 70), ("stop", None, 1)]
)
def test_how_a_run_ended_is_the_code_of_who_follows_it(run, kind, code, told):
    run.event("submit", "submitted as Ray job a-1", job="a-1")
    run.event(kind, "the end", **({} if code is None else {"code": code}))
    assert code_of(run, RayJob("a-1", "FAILED", "")) == told


@pytest.mark.parametrize("message", ["", "\n", "the node died\nmore"])
def test_a_job_that_ended_before_its_run_began_is_told(run, message):
    run.event("stop", "of an earlier job", code=75)
    run.event("submit", "submitted as Ray job a-1", job="a-1")
    with pytest.raises(LeviathanError, match=r"ended before the run began.*see the job's own log") as told:
        code_of(run, RayJob("a-1", "FAILED", message))
    assert "\n" not in str(told.value)
    with pytest.raises(LeviathanError, match="ended before the run began"):
        code_of(run, None)


def test_a_dry_run_prints_the_script_asks_nobody_and_writes_nothing(tiny, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = leviathan("submit", "ray", tiny, "--ranks", 2, "--dry-run", "--address", "http://127.0.0.1:1")
    assert done.code == 0, done.err
    assert done.out.startswith("#!/bin/bash\n")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "options", "kind", "told"),
    [
        ((), {}, UsageError, "needs the dashboard of a cluster; give --address"),
        ((), {"address": "ray://head:10001"}, ConfigError, "is no address of a Ray dashboard"),
        ((), {"without": ["letters"]}, UsageError, "this run joins none"),
        ((), {"without": ["letters"], "mode": "print"}, UsageError, "this run joins none"),
        ((), {"without": ["letters"], "mode": "kuberay"}, UsageError, "this run joins none"),
        (("launch.ranks=2", "launch.ray.min_ranks=3"), {}, ConfigError, r"min_ranks is 3, and there are 2 ranks"),
        (("launch.ranks=0",), {}, ConfigError, "launch.ranks"),
        (("launch.ranks=2", "engine.expert_parallel=4"), {}, ConfigError, "expert"),
        (
            ("train.micro_rows=3", "launch.ranks=2"),
            {"address": "API"},
            ConfigError,
            "no number of ranks up to 2 will do: train.micro_rows is 3",
        ),
        (("launch.ranks=3",), {"address": "API"}, ConfigError, "not a multiple of 3 ranks; the nearest is 9"),
        ((), {"mode": "kuberay"}, ConfigError, "launch.ray.image is empty"),
        (("launch.ray.image=a/b:1", "launch.ray.memory=lots"), {"mode": "kuberay"}, ConfigError, "memory 'lots' is no"),
        (
            ("launch.ray.image=a/b:1", "launch.ray.claim=runs"),
            {"mode": "kuberay"},
            ConfigError,
            "no place for a volume",
        ),
        (("launch.ray.env_file=/none",), {"mode": "print"}, ConfigError, "there is no file /none"),
    ],
)
def test_what_cannot_be_submitted_is_refused_before_anything_is_written(
    tiny, api, tmp_path, words, options, kind, told
):
    options = {name: api.address if value == "API" else value for name, value in options.items()}
    with pytest.raises(kind, match=told) as refused:
        submit(tiny, *words, **options)
    assert type(refused.value) is kind
    assert not (tmp_path / "runs").exists()
    assert not api.jobs


def test_a_cluster_that_asks_nobody_gets_nothing(tiny, api, tmp_path):
    api.token = None
    with pytest.raises(ConfigError, match="asks nobody for a token"):
        submit(tiny, address=api.address)
    assert not (tmp_path / "runs").exists()
    assert not api.jobs


def test_an_ensemble_is_one_job_that_is_known_to_all_of_its_runs(shards, corpus, api, tmp_path, capsys):
    config = write_ensemble(tmp_path, shards, corpus)
    assert submit(config, address=api.address) == 0
    (number,) = api.jobs
    (entrypoint,) = api.entrypoints
    assert entrypoint.endswith(f"launcher.ensemble_on_ray {tmp_path}/runs/duo")
    for name in ("duo-letters", "duo-lists", "duo"):
        run = RunFolder(tmp_path / "runs" / name)
        assert run.facts()["job"]["ray"] == number
        assert (run.path / "job.sh").exists()
    assert submit(config, address=api.address) == 0
    assert f"ensemble duo is Ray job {number}: PENDING already" in capsys.readouterr().out
    assert len(api.entrypoints) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "kuberay"}, "a RayJob is one"),
        ({"allow": ["optim.lr"]}, "without --allow"),
        ({"without": ["x"]}, "'x'|x"),
    ],
)
def test_what_an_ensemble_cannot_be_is_refused(shards, corpus, api, tmp_path, options, told):
    config = write_ensemble(tmp_path, shards, corpus)
    with pytest.raises(LeviathanError, match=told):
        submit(config, address=api.address, **options)
    assert not (tmp_path / "runs").exists()
    assert not api.jobs


@pytest.mark.parametrize(("cores", "cpus"), [(0.5, "1"), (1.0, "1"), (1.4, "2"), (8.0, "8")])
def test_a_pod_is_large_enough_for_its_rank(tiny, tmp_path, capsys, cores, cpus):
    """Ray never places what asks for more than any node has."""
    image = ("launch.ray.image=a/b:1", f"launch.ray.cpus_per_rank={cores}")
    assert submit(tiny, *image, mode="kuberay") == 0
    job = yaml.safe_load(capsys.readouterr().out)
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"] == cpus
    assert (tmp_path / "runs" / "tiny" / "job.sh").exists()
