"""The folder of a run: lines that survive crashes, what is found by which name, and whose it is."""

from __future__ import annotations

import json
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UsageError
from pretrain.run_folder import RunFolder, append_line, counted, read_lines, step_name


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "runs" / "mine")
    run.make()
    return run


def made(runs, *names):
    for name in names:
        RunFolder(runs / name).make()
        RunFolder(runs / name).set_facts(name=name)


# ---- lines

texts = st.text(max_size=20)
records = st.dictionaries(texts, st.one_of(texts, st.integers(), st.floats(allow_nan=False), st.none()), max_size=4)


@given(lines=st.lists(st.tuples(records, st.none() | st.floats(0, 1, exclude_max=True)), max_size=8))
@settings(deadline=None)
def test_every_whole_line_is_read_back_whatever_was_torn_before_it(lines, tmp_path_factory):
    """A crash or a power cut may leave any beginning of a line: it is lost, and nothing else is."""
    path = tmp_path_factory.mktemp("lines") / "events.jsonl"
    whole = []
    for record, torn in lines:
        append_line(path, record)
        line = len(json.dumps(record)) + 1
        kept = line if torn is None else int(torn * line)
        os.truncate(path, path.stat().st_size - line + kept)
        if kept >= line - 1:
            whole.append(record)
        assert list(read_lines(path)) == whole


def test_a_line_of_zeros_as_a_file_system_may_leave_it_is_passed_over(tmp_path):
    path = tmp_path / "lines"
    append_line(path, {"step": 1})
    with open(path, "ab") as file:
        file.write(bytes(500))
    append_line(path, {"step": 2})
    assert list(read_lines(path)) == [{"step": 1}, {"step": 2}]


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert list(read_lines(tmp_path / "absent")) == []


def test_lines_of_several_writers_do_not_mix(tmp_path):
    path = tmp_path / "lines"
    append_line(path, {})

    def write(writer):
        for n in range(200):
            append_line(path, {"writer": writer, "n": n, "text": "x" * (37 * n % 301)})

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    rows = list(read_lines(path))[1:]
    for writer in range(4):
        assert [row["n"] for row in rows if row["writer"] == writer] == list(range(200))
    assert len(rows) == 800 == sum(bool(line) for line in path.read_bytes().splitlines()) - 1


def test_an_event_says_when_in_which_life_and_what(folder, monkeypatch):
    folder.event("start", "it begins", step=3)
    monkeypatch.setenv("LEVIATHAN_ATTEMPT", "2")
    RunFolder(folder.path).event("stop", "it ends")
    first, last = folder.history()
    assert first.pop("time") <= last.pop("time")
    assert first == {"attempt": 0, "event": "start", "message": "it begins", "step": 3}
    assert last == {"attempt": 2, "event": "stop", "message": "it ends"}


def test_a_step_done_again_counts_as_it_was_done_last_and_steps_are_in_order(folder):
    for attempt, steps in enumerate([(1, 2, 3, 4), (3, 4, 5), (2, 3)]):
        for step in steps:
            append_line(folder.metrics, {"step": step, "attempt": attempt})
    with open(folder.metrics, "ab") as file:
        file.write(b'{"step": 4, "attempt": 2')
    steps = folder.steps()
    assert list(steps) == [1, 2, 3, 4, 5]
    assert [row["attempt"] for row in steps.values()] == [0, 2, 2, 1, 1]


# ---- names


def test_a_run_is_found_by_its_name_and_by_its_path(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    made(runs, "mine")
    assert RunFolder.find("mine", runs).path == runs / "mine"
    assert RunFolder.find(str(runs / "mine"), tmp_path / "elsewhere").path == runs / "mine"
    monkeypatch.chdir(tmp_path)
    assert RunFolder.find("mine").name == RunFolder.find("runs/mine", tmp_path / "elsewhere").name == "mine"


def test_a_name_that_is_unknown_is_told_with_those_that_are_known(tmp_path):
    runs = tmp_path / "runs"
    with pytest.raises(UsageError, match=r"no run called 'mine' in .*runs/; there is none yet; start one with"):
        RunFolder.find("mine", runs)
    made(runs, "b", "a")
    (runs / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no run called 'empty' in .*; there is a, b$"):
        RunFolder.find("empty", runs)
    made(runs, *(f"n{number}" for number in range(9)))
    with pytest.raises(UsageError, match=r"; there is n1, n2, n3, n4, n5, n6, n7, n8$"):
        RunFolder.find("x", runs)


def test_committed_steps_are_those_of_whole_folders_newest_first(folder):
    for name in (step_name(5), step_name(20), step_name(1_000_000_000), "step_000000030.draft-1-0",
                 "step_000000007.deleted", "step_000000008.invalid-0", "other"):  # fmt: skip
        (folder.checkpoints / name).mkdir()
    (folder.checkpoints / step_name(99)).touch()
    assert folder.committed_steps() == [1_000_000_000, 20, 5]


def test_facts_are_added_one_by_one_and_there_are_none_before_the_run_begins(folder):
    assert folder.facts() == {}
    folder.set_facts(name="mine", steps=5)
    folder.set_facts(steps=9)
    assert RunFolder(folder.path).facts() == {"name": "mine", "steps": 9}
    assert sorted(p.name for p in folder.path.iterdir()) == ["checkpoints", "logs", "run.json"]


# ---- whose it is


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_run_is_its_owners_alone_and_the_process_keeps_its_umask(tmp_path, umask):
    run, before = RunFolder(tmp_path / "deep" / "runs" / "mine"), os.umask(umask)
    try:
        run.make()
        run.event("start", "it begins")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    for path in (run.path, run.checkpoints, run.logs):
        assert path.stat().st_mode & 0o777 == 0o700
    assert run.events.stat().st_mode & 0o077 == 0


def test_making_a_folder_again_changes_nothing_in_it(folder):
    folder.event("start", "it begins")
    folder.make()
    assert [event["event"] for event in folder.history()] == ["start"]


def test_one_is_counted_as_one_and_anything_else_as_many():
    assert [counted(number, "rank") for number in (0, 1, 2, 16384)] == ["0 ranks", "1 rank", "2 ranks", "16,384 ranks"]
