"""Strict YAML, merging, and what is said of every mistake."""

from __future__ import annotations

import contextlib
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import model_validator

from configs.errors import ConfigError, UsageError
from configs.load import build, find, load, read, to_yaml
from configs.schema import Config, key, leaves, resume_class, section, values


class Optim(Config):
    lr: float = key(1e-3, "record", "rate", gt=0)
    name: Literal["adamw", "muon"] = key("adamw", "match", "which")
    betas: tuple[float, float] = key((0.9, 0.95), "match", "moments")


class Source(Config):
    weight: float = key(1.0, "record", "share")


class Run(Config):
    optim: Optim = section(Optim)
    sources: dict[str, Source] = key({}, "match", "of text")
    steps: int | None = key(None, "match", "how long", gt=0)


def mistakes(tmp_path, text, *words):
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        load(Run, [path], words)
    return str(error.value).replace(f"{tmp_path}/", "").splitlines()


def test_files_merge_left_to_right_and_words_win(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 3\noptim: {lr: 1, name: muon}\n")
    (tmp_path / "b.yaml").write_text("optim: {lr: 2}\nsources: {a: {weight: 2}}\n")
    run = load(Run, [tmp_path / "a.yaml", tmp_path / "b.yaml"], ["optim.betas=[0.8, 0.9]", "sources.b.weight=3"])
    assert run.optim == Optim(lr=2.0, name="muon", betas=(0.8, 0.9))
    assert run.steps == 3
    assert {name: s.weight for name, s in run.sources.items()} == {"a": 2.0, "b": 3.0}


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1E3", 1000.0), (".5", 0.5), ("-2", -2), ("1_000", 1000)])
def test_numbers_are_numbers(text, value):
    assert read([], [f"x={text}"]).tree == {"x": value}


@pytest.mark.parametrize(
    "text", ["no", "yes", "on", "off", "0x10", "1:30", "2026-01-01", "'3'", ".inf", ".nan", "1e999"]
)
def test_nothing_else_is_guessed(text):
    assert read([], [f"x={text}"]).tree == {"x": text.strip("'")}


def test_all_mistakes_are_told_at_once_with_file_and_line(tmp_path):
    text = (
        "optim:\n  lr: fast\n  nmae: adamw\n  name: adam\nsources:\n  a: {weight: no, wieght: 3}\nsteps: 1.5\nlr: 4\n"
    )
    assert sorted(mistakes(tmp_path, text)) == [
        "a.yaml:2: optim.lr is 'fast' (text), not a number",
        "a.yaml:3: unknown key 'optim.nmae'; did you mean 'optim.name'?",
        "a.yaml:4: optim.name is 'adam', not one of adamw, muon; did you mean 'adamw'?",
        "a.yaml:6: sources.a.weight is 'no' (text), not a number",
        "a.yaml:6: unknown key 'sources.a.wieght'; did you mean 'sources.a.weight'?",
        "a.yaml:7: steps is 1.5 (a number), not a whole number",
        "a.yaml:8: unknown key 'lr'; did you mean 'optim.lr'?",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2\n", "a.yaml:2: key 'a' stands twice (first at a.yaml:1); keep one"),
        ("optim:\n  lr: 1\n  lr: 2\n", "a.yaml:3: key 'optim.lr' stands twice (first at a.yaml:2); keep one"),
        ("a: &x 1\nb: *x\n", "a.yaml:1: anchors, aliases and tags are not used here; write the value out"),
        ("a: !!python/object/apply:os.system [ls]\n", "a.yaml:1: anchors, aliases and tags"),
        ("\ta: 1\n", "a.yaml:1:1: not valid YAML"),
        ("a: [1,\n", "not valid YAML"),
        ("- a\n", "a.yaml:1: the file holds a list, not `key: value` lines"),
        ("optim: 3\n", "a.yaml:1: optim is 3 (a whole number), not a section"),
        ("optim: {lr: 0}\n", "a.yaml:1: optim.lr is 0; it must be > 0"),
        ("optim: {lr: true}\n", "a.yaml:1: optim.lr is True (true/false), not a number"),
        ("optim: {betas: [0.9]}\n", "optim.betas[1]"),
        ("steps: -3\n", "a.yaml:1: steps is -3; it must be > 0"),
        ("steps: 99999999999999999999999999999999999999999999\n", "steps is"),
        (b"\xff\xfe\x00", "a.yaml: byte 0 is not UTF-8; save the file as UTF-8 text"),
        (b"a: \x00\n", "not valid YAML"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("x: 1\n" * 300_000, "is no configuration"),
    ],
)
def test_a_bad_file_is_refused_with_what_found_and_do(tmp_path, text, says):
    lines = mistakes(tmp_path, text)
    assert any(says in line for line in lines), lines
    assert all(len(line) < 400 for line in lines)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("optim.rl=1", "the word 'optim.rl=1': unknown key 'optim.rl'; did you mean 'optim.lr'?"),
        ("optim.lr=fast", "the word 'optim.lr=fast': optim.lr is 'fast' (text), not a number"),
        ("optim.lr", "the word 'optim.lr' is not key=value; write for example optim.lr=3e-4"),
        ("=3", "is not key=value"),
        ("optim.lr=[1", "not valid YAML"),
    ],
)
def test_a_bad_word_is_named(tmp_path, word, says):
    assert says in mistakes(tmp_path, "", word)[0]


def test_blame_falls_on_the_file_that_was_read_last(tmp_path):
    (tmp_path / "base.yaml").write_text("optim: {lr: 1}\n")
    (tmp_path / "mine.yaml").write_text("\noptim:\n  lr: quick\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:3: optim\.lr is 'quick'"):
        load(Run, [tmp_path / "base.yaml", tmp_path / "mine.yaml"])


def test_what_spans_sections_is_not_blamed_on_the_file_that_was_read_last(tmp_path):
    class Whole(Run):
        @model_validator(mode="after")
        def _fits(self):
            raise ValueError("does not fit together")

    for name, text in (("a", "steps: 3\n"), ("b", "optim: {lr: 1}\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^defaults: does not fit together$"):
        load(Whole, [tmp_path / "a.yaml", tmp_path / "b.yaml"])


def test_a_missing_file_names_the_nearest_that_comes_along():
    with pytest.raises(UsageError, match="no configuration file 'dmeo' here; did you mean 'demo'"):
        find("dmeo")
    with pytest.raises(UsageError):
        find("../configs/demo")


def test_what_is_written_is_read_back_equal(tmp_path):
    run = Run(optim=Optim(lr=3e-5), sources={"a": Source(weight=0.1)}, steps=7)
    path = tmp_path / "r.yaml"
    path.write_text(to_yaml(run))
    assert load(Run, [path]) == run


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError):
        Run().steps = 3


def test_leaves_and_values_open_up_what_users_name():
    assert {".".join(path): resume_class(info) for path, info in leaves(Run)} == {
        "optim.lr": "record", "optim.name": "match", "optim.betas": "match",
        "sources.*.weight": "record", "steps": "match",
    }  # fmt: skip
    run = Run(sources={"a": Source(weight=2.0)})
    assert ("sources.a.weight", 2.0, "record") in list(values(run))


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
))  # fmt: skip
def test_no_value_brings_anything_but_a_configuration_or_a_sentence(value):
    from configs.load import Layers

    for name in ("optim", "sources", "steps"):
        with contextlib.suppress(ConfigError):
            build(Run, Layers({name: value}))


@given(st.binary(max_size=200))
def test_no_bytes_bring_anything_but_a_configuration_or_a_sentence(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("y") / "a.yaml"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        load(Run, [path])


@pytest.mark.parametrize("text", ["---", "...", "--- a", "%a"])
def test_a_word_that_yaml_would_read_as_something_else_is_refused(text):
    with pytest.raises(ConfigError, match=r"put it in quotes|not valid YAML"):
        read([], [f"run.name={text}"])
