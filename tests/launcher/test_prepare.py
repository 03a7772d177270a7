"""What a run is called, and what is found wrong with it before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError
from launcher.prepare import resolve, run_folder

MIXER = """
from pretrain.mixer import TokenMixer, register


@register()
class Nothing(TokenMixer):
    \"\"\"y = x.\"\"\"

    def forward(self, x_BTD, layout, state=None):
        return x_BTD, state
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration, where commands are called."""
    (tmp_path / "my.yaml").write_text("data: {sources: {stdlib: {path: stdlib}}}\nmodel: {width: 32}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def name_of(*files: str, words: tuple[str, ...] = ()) -> str:
    config, _ = resolve(files, words)
    return run_folder(config, files).name


def test_a_run_has_the_same_name_wherever_it_is_done(here):
    (here / "cluster.yaml").write_text("launch: {nodes: 2, ranks: 16}\nengine: {zero: 2}\n")
    name = name_of("my.yaml")
    assert name.startswith("my-")
    assert name_of("my.yaml", "cluster.yaml") == name
    assert name_of("cluster.yaml", "my.yaml") == name
    assert name_of("my.yaml", "engine/zero3", words=("log.wandb=offline",)) == name


def test_what_is_trained_otherwise_has_another_name(here):
    (here / "deep.yaml").write_text("model: {depth: 3}\n")
    names = [name_of("my.yaml"), name_of("my.yaml", "engine/bf16"), name_of("my.yaml", words=("run.seed=1",))]
    assert len(set(names)) == 3
    assert all(name.startswith("my-") for name in names)
    assert name_of("my.yaml", "deep.yaml").startswith("deep-")
    assert name_of("my.yaml", words=("run.name=mine",)) == "mine"
    assert name_of("engine/zero3").startswith("zero3-"), "the last one, where none says what is trained"


@pytest.mark.parametrize("key", ["mixers", "channel", "stack"])
def test_a_part_of_the_users_own_makes_another_run_once_it_says_something_else_but_not_elsewhere(here, key):
    config, _ = resolve(["my.yaml"], [])
    parts = config.model.model_dump()
    own = here / "own.py"
    own.write_text(MIXER)

    def name(file: Path) -> str:
        part = {"name": "own", "file": str(file), "options": {}}
        told = config.model.__class__.model_validate(parts | {key: (part,) if key == "mixers" else part})
        return run_folder(config.model_copy(update={"model": told}), ["my.yaml"]).name

    before = name(own)
    moved = here / "elsewhere" / "own.py"
    moved.parent.mkdir()
    moved.write_text(MIXER)
    assert name(moved) == before
    own.write_text(MIXER + "# once more\n")
    assert name(own) != before


@pytest.mark.parametrize(
    "word",
    [
        "model.channel={name: moe, options: {bias_step: 0.1}}",
        "model.mixers=[{name: correlation, options: {lgas: 2}}]",
        "model.stack={name: quartik}",
        "model.channel={file: nowhere.py}",
    ],
)
def test_a_mistake_in_a_word_is_told_with_the_word_once(here, word):
    with pytest.raises(ConfigError) as error:
        resolve(["my.yaml"], [word])
    assert str(error.value).startswith(f"the word {word!r}: ")
    assert str(error.value).count("the word") == 1
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: {stack: {name: quartik}}", "my.yaml:1: no stack is called 'quartik'; did you mean 'quartic'?"),
        (
            "model: {stack: {name: quartic, options: {edge_widht: 8}}}",
            "my.yaml:1: unknown key 'model.stack.options.edge_widht'",
        ),
        (
            "model:\n  channel: {name: moe, options: {bias_step: 0.1}}",
            "my.yaml:2: model.channel.options bias_step does nothing",
        ),
    ],
)
def test_a_mistake_in_a_part_is_told_with_its_line_before_anything_is_made(here, text, told):
    (here / "my.yaml").write_text(text + "\n")
    with pytest.raises(ConfigError) as error:
        resolve(["my.yaml"], [])
    assert told in str(error.value)
    assert sorted(path.name for path in here.iterdir()) == ["my.yaml"]
