"""The documentation is held to the code: generated parts, the example mixer, commands, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import publish
from launcher.tables import TABLES, filled
from pretrain.certificate.issue import PROMISES, verdict
from pretrain.certificate.trial import Candidate
from tests.conftest import ROOT, leviathan
from tests.small_run import small_config, train_small

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
over_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str = "") -> list[str]:
    """What stands between fences of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@over_pages
def test_generated_parts_are_what_would_be_generated(page):
    tables = publish.tables(publish.read(publish.KEPT)) if page == publish.PAGE else TABLES
    assert filled(page.read_text(), tables) == page.read_text(), "run `make docs`"


@over_pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@over_pages
def test_every_command_that_is_named_exists(page):
    """A verb and its options, wherever the page shows them."""
    for verb, rest in re.findall(
        r"leviathan ((?:(?:data|mixers|submit) )?[a-z]+)([^`\n#|]*)", "\n".join(_commands(page))
    ):
        told = _help(verb)
        for option in re.findall(r"(?<= )--[a-z][a-z-]*", rest):
            assert option in told, f"{page.name}: `leviathan {verb}` has no {option}"


def _commands(page: Path) -> list[str]:
    text = page.read_text()
    spans = re.findall(r"`(leviathan [^`]+)`", text)
    return spans + [line.strip() for block in blocks(page) for line in block.splitlines() if "leviathan " in line]


def _help(verb: str) -> str:
    if verb not in _HELP:
        done = leviathan(*verb.split(), "--help")
        assert done.code == 0, f"there is no `leviathan {verb}`"
        _HELP[verb] = done.out
    return _HELP[verb]


_HELP: dict[str, str] = {}


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The mixer of ADDING_A_MIXER, as a file of the user's own."""
    (code,) = blocks(ROOT / "docs/ADDING_A_MIXER.md", "python")
    path = tmp_path_factory.mktemp("own") / "ema.py"
    path.write_text(code)
    return path


@pytest.mark.parametrize(
    "promise",
    # it is a loop over time, and growth is counted up to 4,096 tokens
    [pytest.param(p, id=p.name, marks=pytest.mark.e2e if p.name == "growth" else []) for p in PROMISES],
)
@pytest.mark.timeout(400)
def test_the_example_mixer_keeps_every_promise(example, promise):
    assert verdict(promise, Candidate("ema", file=str(example))).kept


def test_the_example_mixer_trains_in_a_run(example, tmp_path, shards, corpus):
    config = small_config(tmp_path, shards, corpus)
    run = train_small(config, f"model.mixers=[{{file: {example}, options: {{spread: 1.0}}}}, {{name: attention}}]")
    losses = [row["loss"] for row in run.steps().values()]
    assert losses[-1] < losses[0]
    assert list(run.path.glob("mixers/*/ema.py"))


def test_a_mixer_that_forgets_to_forget_is_caught(example, tmp_path):
    """The certificate would refuse the example without the line that resets it at a document's start."""
    text = example.read_text()
    assert "(layout.pos_BT[:, t, None] > 0)" in text
    leaky = tmp_path / "leaky.py"
    leaky.write_text(text.replace("(layout.pos_BT[:, t, None] > 0)", "1"))
    (documents,) = [promise for promise in PROMISES if promise.name == "documents"]
    assert verdict(documents, Candidate("leaky", file=str(leaky))).kept is False


def test_the_yaml_of_the_readme_is_right(tmp_path):
    from launcher.prepare import resolve

    (text,) = blocks(ROOT / "README.md", "yaml")
    (tmp_path / "my.yaml").write_text(text)
    config, launch = resolve([tmp_path / "my.yaml"], [])
    assert (config.model.depth, launch.ranks) == (6, 2)


def test_shards_are_read_as_the_page_says(shards, monkeypatch):
    import numpy as np
    import webdataset

    (code,) = blocks(ROOT / "docs/DATA.md", "python")
    (first,) = sorted(shards.glob("letters-train-00000-00.tar"))
    space = {"np": np, "webdataset": webdataset}
    exec(code.replace("shards/demo/python-train-00000-00.tar", str(first)), space)
    assert space["tokens"].dtype == np.uint16
    assert len(space["tokens"]) > 100
