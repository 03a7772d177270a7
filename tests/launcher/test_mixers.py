"""`leviathan mixers check | new`: verdicts for people and machines, and a file that is right as it is written."""

from __future__ import annotations

import json
import tomllib

import pytest

from configs.errors import ConfigError, UsageError
from launcher.mixers import TEMPLATES, check_all, check_mixer, new_mixer, score
from pretrain import mixer
from pretrain.certificate.issue import PROMISES, Verdict
from pretrain.certificate.trial import Candidate, Refused
from tests.conftest import ROOT, leviathan
from tests.small_run import small_config, train_small

LEAK = ("(1 - keep_D) * v_BTD", "(1 - keep_D) * v_BTD.roll(-1, 1)")


@pytest.fixture
def leaky(tmp_path):
    """A file of the user's own that looks at the next token."""
    path = tmp_path / "leaky.py"
    path.write_text((TEMPLATES / "mixer.py").read_text().replace(*LEAK))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_a_mixer_that_comes_along_gets_a_row_for_each_promise_and_exit_0():
    done = leviathan("mixers", "check", "attention")
    assert (done.code, done.err) == (0, "")
    rows = [line.split()[:2] for line in done.out.splitlines()]
    for promise in PROMISES:
        assert [promise.name, "kept"] in rows
    assert "from 512 to 2,048 tokens, forward and backward" in done.out
    assert done.out.rstrip().endswith(f"attention keeps {len(PROMISES)}/{len(PROMISES)} promises")


def test_a_wrong_file_is_refused_in_one_line_with_exit_1(leaky):
    done = leviathan("mixers", "check", leaky)
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: leaky breaks the promise `causal`: changing the tokens from 1 on moves an earlier")
    rows = [line.split()[:2] for line in done.out.splitlines()]
    assert ["causal", "broken"] in rows
    assert ["gradients", "kept"] in rows, "what follows is tried all the same"


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("atention",), 78, "no mixer is called 'atention'; did you mean 'attention'?"),
        (("nowhere.py",), 78, "the mixer file nowhere.py cannot be read; give a path to a .py file"),
        ((), 2, "`leviathan mixers check` takes one NAME or FILE, or --all; give one of them"),
        (("attention", "--all"), 2, "`leviathan mixers check` takes one NAME or FILE, or --all; give one of them"),
    ],
)
def test_words_that_name_no_mixer_are_one_line(words, code, told):
    done = leviathan("mixers", "check", *words)
    assert (done.code, done.err) == (code, f"error: {told}\n")


def test_a_form_that_an_option_chooses_has_a_certificate_of_its_own(capsys):
    check_mixer("correlation", ["corr=fft", "n_exp=1"], as_json=True)
    (growth,) = [row for row in json.loads(capsys.readouterr().out) if row["promise"] == "growth"]
    assert "the state T^0.00" in growth["told"], "it keeps a spectrum; the default form keeps every key"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["corr=ii"], r"the word 'corr=ii': correlation.corr is 'ii', .* did you mean 'iir'\?"),
        (["lags=2", "lagz=3"], r"the word 'lagz=3': unknown key 'correlation.lagz'; did you mean 'correlation.lags'\?"),
        (["iir"], "the word 'iir' is not key=value"),
    ],
)
def test_options_that_a_mixer_does_not_have_are_named(words, told):
    with pytest.raises(ConfigError, match=told):
        check_mixer("correlation", words, as_json=True)


def test_verdicts_for_machines(leaky, capsys):
    with pytest.raises(Refused):
        check_mixer(str(leaky), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [(row["mixer"], row["promise"]) for row in found] == [("leaky", promise.name) for promise in PROMISES]
    by_name = {row["promise"]: row for row in found}
    assert by_name["causal"]["kept"] is False
    assert by_name["rows"] == {
        "mixer": "leaky", "promise": "rows", "kept": True, "told": "largest difference of a row alone", "number": 0.0
    }  # fmt: skip


@pytest.fixture
def two(monkeypatch):
    """A registry of two names, whose verdicts are settled."""
    kept = [Verdict(promise.name, True, "fine", 0.0) for promise in PROMISES]
    verdicts = {"one": kept, "two": [*kept[:4], Verdict("forms", False, "it is bent; straighten it"), *kept[5:]]}
    monkeypatch.setattr(mixer.REGISTRY, "names", lambda: ["absent", "one", "two"])

    def certified(candidate: Candidate):
        if candidate.name == "absent":
            raise ConfigError("the mixer 'absent' needs tomorrow, which is not installed here")
        yield from verdicts[candidate.name]

    monkeypatch.setattr("launcher.mixers.certify", certified)


def test_all_mixers_get_a_row_each_and_one_that_is_broken_is_refused(two, capsys):
    with pytest.raises(Refused) as refused:
        check_all(as_json=False)
    assert str(refused.value) == "two breaks the promise `forms`: it is bent; straighten it"
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    whole = len(PROMISES)
    assert rows["mixer"] == [*(promise.name for promise in PROMISES), "kept"]
    assert rows["one"] == ["✓"] * whole + [f"{whole}/{whole}"]
    assert rows["two"] == ["✓"] * 4 + ["✗"] + ["✓"] * (whole - 5) + [f"{whole - 1}/{whole}"]
    assert "absent: not usable here: the mixer 'absent' needs tomorrow" in out


def test_the_score_counts_what_is_asked_for():
    assert score([Verdict("a", True, ""), Verdict("b", None, ""), Verdict("c", False, "")]) == "1/2"


def test_a_new_mixer_is_certified_as_it_is_written_and_trains(here, shards, corpus):
    new_mixer("my_own")
    assert sorted(path.name for path in here.iterdir()) == ["my_own.py", "my_own.yaml"]
    assert "NAME" not in (here / "my_own.yaml").read_text()
    check_mixer("my_own.py", as_json=False)
    (here / "base").mkdir()
    base = small_config(here / "base", shards, corpus)
    run = train_small(base, *overlay_of(here / "my_own.yaml"))
    losses = [row["loss"] for row in run.steps().values()]
    assert losses[-1] < losses[0]
    assert list(run.path.glob("mixers/*/my_own.py"))


def overlay_of(path):
    """The one line of a run's overlay, as a word of the command line."""
    (line,) = [line.strip() for line in path.read_text().splitlines() if line.strip().startswith("mixers:")]
    return ["model.mixers=" + line.removeprefix("mixers:").strip()]


def test_its_yaml_is_laid_over_a_configuration(here, shards, corpus):
    from launcher.prepare import resolve

    new_mixer("my_own")
    (here / "base").mkdir()
    config, _ = resolve([small_config(here / "base", shards, corpus), "my_own.yaml"], [])
    (part,) = config.model.mixers
    assert (part.name, part.file) == ("my_own", "my_own.py")
    assert (config.model.width, config.train.steps) == (96, 300)


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
def test_nothing_is_overwritten(here, suffix):
    (here / f"mine{suffix}").write_text("dear to me")
    with pytest.raises(UsageError, match=rf"mine\{suffix} would be overwritten; choose another name"):
        new_mixer("mine")
    assert [path.name for path in here.iterdir()] == [f"mine{suffix}"]
    assert (here / f"mine{suffix}").read_text() == "dear to me"


@pytest.mark.parametrize("name", ["../mine", "a/b", "Mine", "my-own", "1st", "", "mine.py", "attention"])
def test_names_that_could_not_be_moved_into_the_package_are_refused(here, name):
    with pytest.raises(UsageError, match=r"choose another name|is no name for a mixer"):
        new_mixer(name)
    assert list(here.iterdir()) == []


def test_the_templates_are_shipped():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert f"{TEMPLATES.name}/*" in setup["package-data"]["launcher"]
