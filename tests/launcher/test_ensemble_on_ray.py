"""The graph of an ensemble within its job, over real processes: order, restarts, ends, and requests to leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher import ensemble_on_ray
from launcher.ensemble_on_ray import GRAPH, VERBS
from pretrain.run_folder import RunFolder, step_name
from tests.conftest import events, wait_until

SECONDS = 40
"""The longest a graph of these tests may take on two busy cores."""


DRIVE = """
import sys
from launcher import ensemble_on_ray
ensemble_on_ray._POLL_S = float(sys.argv[1])
sys.exit(ensemble_on_ray.main(sys.argv[2:]))
"""


class Graph:
    """Runs in phases, whose drivers do what a line of bash says. diary: who began, and what they said."""

    def __init__(self, folder: Path, *phases: dict[str, str]) -> None:
        self.whole, self.diary = RunFolder(folder / "whole"), folder / "diary"
        self.diary.touch()
        self.runs = {name: RunFolder(folder / name) for phase in phases for name in phase}
        self.whole.make()
        for phase in phases:
            for name, lines in phase.items():
                run = self.runs[name]
                run.make()
                tell = f'say() {{ echo "$@" >> {self.diary}; }}; N=$(ls {run.path} | grep -c began)'
                text = f"trap '' USR1\n{tell}\ntouch {run.path}/began$N\nsay {name}\n{lines}\n"
                (run.path / "job.sh").write_text(text)
        paths = [[str(self.runs[name].path) for name in phase] for phase in phases]
        (self.whole.path / GRAPH).write_text(json.dumps(paths))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, poll_s: float = 0.05) -> int:
        """Begin; return the number of the process. poll_s: how often it looks at its drivers."""
        self.process = subprocess.Popen([sys.executable, "-c", DRIVE, str(poll_s), str(self.whole.path)])
        return self.process.pid

    def end(self) -> int:
        """The exit code of the job; nothing that it started is left."""
        if self.process is None:
            self.start()
        assert self.process is not None
        try:
            code = self.process.wait(SECONDS)
        finally:
            self.process.kill()
        assert not self.processes(), self.said()
        return code

    def processes(self) -> list[psutil.Process]:
        """What works on any of the runs."""
        folder = str(self.whole.path.parent)
        return [p for p in psutil.process_iter(["cmdline"]) if folder in " ".join(p.info["cmdline"] or [])]

    def said(self) -> list[str]:
        return self.diary.read_text().split("\n")[:-1]


def test_a_phase_begins_when_all_of_the_one_before_are_done(tmp_path):
    graph = Graph(
        tmp_path, {"seed": "sleep 0.3; say seed-done"},
        {"a": "sleep 0.2; say a-done", "b": "sleep 0.6; say b-done"}, {"whole": "say whole-done"},
    )  # fmt: skip
    assert graph.end() == 0
    said = graph.said()
    assert said[:2] == ["seed", "seed-done"]
    assert sorted(said[2:4]) == ["a", "b"]
    assert said[4:] == ["a-done", "b-done", "whole", "whole-done"]


def test_a_killed_driver_is_started_again_and_others_do_not_notice(tmp_path):
    graph = Graph(tmp_path, {"a": "[ $N = 1 ] || kill -9 $$", "b": "sleep 0.2"}, {"whole": "true"})
    assert graph.end() == 0
    assert graph.said().count("a") == 2
    assert graph.said().count("b") == 1
    assert graph.said()[-1] == "whole"
    assert events(graph.runs["a"], "fault") == ["the driver of a died: SIGKILL"]
    assert not events(graph.runs["b"], "fault")


def test_a_driver_that_is_killed_again_and_again_is_given_up_and_what_follows_never_begins(tmp_path):
    graph = Graph(tmp_path, {"a": "kill -11 $$", "b": "sleep 0.1; say b-done"}, {"whole": "true"})
    assert graph.end() == 70
    assert graph.said().count("a") == 3
    assert "b-done" in graph.said()
    assert "whole" not in graph.said()
    (stop,) = [event for event in graph.runs["a"].history() if event["event"] == "stop"]
    assert stop["code"] == 70
    assert "3 attempts in a row ended without a new checkpoint" in stop["message"]
    assert "the driver of a died: SIGSEGV" in stop["message"]


def test_a_driver_that_is_killed_goes_on_as_long_as_checkpoints_advance(tmp_path):
    saves = f"mkdir -p {tmp_path}/a/checkpoints/step_00000000$((N + 1)); [ $N -ge 4 ] || kill -9 $$"
    graph = Graph(tmp_path, {"a": saves})
    assert graph.end() == 0
    assert graph.said().count("a") == 5
    assert (graph.runs["a"].checkpoints / step_name(5)).is_dir()


@pytest.mark.parametrize("code", [65, 70, 75, 78, 130, 1])
def test_a_driver_that_ends_by_itself_has_tried_all_there_is(tmp_path, code):
    graph = Graph(tmp_path, {"a": f"exit {code}", "b": "true"}, {"whole": "true"})
    assert graph.end() == code
    assert sorted(graph.said()) == ["a", "b"]


def test_a_run_that_was_asked_to_stop_before_its_turn_never_begins(tmp_path):
    graph = Graph(tmp_path, {"a": "sleep 0.3", "b": "say b-ran"}, {"whole": "true"})
    graph.runs["b"].stop_request.touch()
    assert graph.end() == 130
    assert graph.said() == ["a"]


def test_a_run_that_was_asked_to_stop_while_its_driver_was_killed_is_not_started_again(tmp_path):
    graph = Graph(tmp_path, {"a": f"touch {tmp_path}/a/stop.request; kill -9 $$"})
    assert graph.end() == 130
    assert graph.said() == ["a"]


LISTENS = """exec {python} -c '
import os, signal, sys, time
def say(words):
    with open("{diary}", "a") as file:
        print(words, file=file)
def leave(number, frame):
    say("asked-{name}-%d" % number)
    sys.exit(75)
signal.signal(signal.SIG{signal}, leave)
say("ready-{name}")
time.sleep(60)
' {diary}"""


def listening(folder, name, kind):
    return LISTENS.format(python=sys.executable, diary=folder / "diary", name=name, signal=kind)


@pytest.mark.parametrize("kind", ["TERM", "USR1", "INT"])
def test_a_request_reaches_every_driver_and_nothing_is_started_after_it(tmp_path, kind):
    graph = Graph(tmp_path, {n: listening(tmp_path, n, kind) for n in ("a", "b")}, {"whole": "true"})
    process = graph.start()
    wait_until(lambda: {"ready-a", "ready-b"} <= set(graph.said()), SECONDS)
    os.kill(process, getattr(signal, f"SIG{kind}"))
    assert graph.end() == 75
    number = int(getattr(signal, f"SIG{kind}"))
    assert sorted(graph.said()[4:]) == [f"asked-a-{number}", f"asked-b-{number}"]


def test_a_request_that_comes_while_drivers_only_begin_is_not_lost(tmp_path):
    """A shell that has not yet read its first line would die of it; one that has would never hear it."""
    graph = Graph(tmp_path, {"a": f"sleep 1; {listening(tmp_path, 'a', 'USR1')}"}, {"whole": "true"})
    process = graph.start()
    wait_until(lambda: graph.said() == ["a"], SECONDS)
    os.kill(process, signal.SIGUSR1)
    assert graph.end() == 75
    assert graph.said() == ["a", "ready-a", "asked-a-10"]


def test_a_driver_that_dies_of_the_request_is_not_started_again(tmp_path):
    graph = Graph(tmp_path, {"a": f"exec -a {tmp_path}/a sleep 60"}, {"whole": "true"})
    process = graph.start()
    wait_until(lambda: graph.said() == ["a"], SECONDS)
    os.kill(process, signal.SIGTERM)
    assert graph.end() == 75
    assert graph.said() == ["a"]
    assert not events(graph.runs["a"], "fault")


def test_a_request_between_two_attempts_is_heeded(tmp_path):
    graph = Graph(tmp_path, {"a": "kill -9 $$"}, {"whole": "true"})
    process = graph.start()
    wait_until(lambda: events(graph.runs["a"], "fault"), SECONDS)
    os.kill(process, signal.SIGTERM)
    assert graph.end() == 75
    assert "whole" not in graph.said()


def graph_with_shards(folder, lines):
    """A run and, before it, what builds its shards: by a line of bash, told how often it was begun before."""
    graph = Graph(folder, {"whole": "true"})
    (graph.whole.path / VERBS).write_text(json.dumps({"data": ["data", "build", "x"]}))
    script = graph.whole.path / "job.sh"
    begins = f"N=$(grep -c build {graph.diary}); echo build >> {graph.diary}"
    builds = f'if [ "$1" = launcher ]; then {begins}; {lines}; exit; fi\n'
    script.write_text(builds + script.read_text())
    return graph


def test_a_build_that_is_killed_is_tried_again(tmp_path):
    graph = graph_with_shards(tmp_path, "[ $N = 1 ] || kill -9 $$")
    assert graph.end() == 0
    assert graph.said() == ["build", "build", "whole"]
    assert events(graph.whole, "fault") == ["leviathan data build died: SIGKILL"]


def test_a_build_that_is_killed_again_and_again_is_given_up(tmp_path):
    graph = graph_with_shards(tmp_path, "kill -9 $$")
    assert graph.end() == 137
    assert graph.said() == ["build"] * 3
    assert events(graph.whole, "stop") == ["stopped: its shards could not be built (exit 137)"]


def test_a_build_that_fails_by_itself_is_not_tried_again(tmp_path):
    graph = graph_with_shards(tmp_path, "exit 65")
    assert graph.end() == 65
    assert graph.said() == ["build"]


def test_a_request_ends_a_build_for_good(tmp_path):
    graph = graph_with_shards(tmp_path, "sleep 60")
    process = graph.start()
    wait_until(lambda: graph.said() == ["build"], SECONDS)
    os.kill(process, signal.SIGTERM)
    assert graph.end() == 75
    assert graph.said() == ["build"]


def test_drivers_die_with_the_job(tmp_path):
    """As every driver does: it has the kernel see to that."""
    lines = (
        f"exec {sys.executable} -c 'from pretrain.run import die_with_parent; die_with_parent();"
        f' import time; open("{tmp_path}/diary", "a").write("bound\\n"); time.sleep(60)\' {tmp_path}'
    )
    graph = Graph(tmp_path, {"a": lines})
    process = graph.start()
    wait_until(lambda: "bound" in graph.said(), SECONDS)
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: not graph.processes(), 10)


def test_it_waits_without_using_the_processor(tmp_path):
    graph = Graph(tmp_path, {"a": "sleep 4"})
    process = graph.start(poll_s=ensemble_on_ray._POLL_S)
    wait_until(lambda: graph.said() == ["a"], SECONDS)
    used = psutil.Process(process).cpu_times()
    time.sleep(2)
    now = psutil.Process(process).cpu_times()
    assert now.user + now.system - used.user - used.system < 0.2
    assert graph.end() == 0
