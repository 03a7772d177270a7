"""Parts that are found by name: one file and no other is imported, and a file of the user's own is a part like any."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.schema import Config
from launcher.prepare import prepare, resolve
from pretrain import channel, mixer
from pretrain.trained import load_trained
from tests.conftest import ROOT, events, losses
from tests.small_run import small_config, train_small

SCALED = """from configs.schema import Config as Options
from configs.schema import key
from pretrain.init import linear
from pretrain.mixer import TokenMixer, register


class Config(Options):
    scale: float = key(1.0, "match", "what values are multiplied with")


@register(Config)
class Scaled(TokenMixer):
    def __init__(self, config, site):
        super().__init__()
        self.scale, self.width, self.value = config.scale, site.width, linear(site.width, site.width)

    def forward(self, x_BTD, layout, state=None):
        return self.scale * self.value(x_BTD), state

    def initial_state(self, rows, like):
        return ()

    def flops_per_token(self, length):
        return 2 * self.width**2

    def state_bytes(self, length):
        return 0
"""
CHANNEL = """from pretrain.channel import register
from pretrain.channels.mlp import Config, Mlp


@register(Config)
class Mine(Mlp):
    pass
"""
TWELVE = ("optim.schedule=constant", "train.steps=12")


@pytest.fixture
def config(tmp_path: Path, shards: Path, corpus: Path) -> Path:
    """A run of a mixer of the user's own beside one that comes along."""
    own = write(tmp_path / "own/scaled.py", SCALED)
    path = small_config(tmp_path, shards, corpus)
    path.write_text(path.read_text().replace("{name: correlation}", f"{{file: {own}}}"))
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def start(*files: Path, words: tuple[str, ...] = ()):
    return prepare(files, ["engine.name=torch", *words], ranks=1, branch=(), allow=[])


def refusal(call: Callable[[], object]) -> str:
    """The one sentence with which a call is refused."""
    with pytest.raises(ConfigError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- parts that come along


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A registry of its own: two parts that work, one that needs what is not installed."""
    text = "from some_parts import REGISTRY, Config\n{}\n@REGISTRY.register(Config)\nclass Part:\n    pass\n"
    for name, line in (("one", ""), ("two", ""), ("needy", "import a_library_of_tomorrow")):
        write(tmp_path / "some_parts" / f"{name}.py", text.format(line))
    init = "from pathlib import Path\nfrom configs.schema import Config\nfrom pretrain.registry import Registry\n"
    write(tmp_path / "some_parts/__init__.py", init + "REGISTRY = Registry('part', Path(__file__).parent, __name__)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import some_parts

    yield some_parts.REGISTRY
    for name in [name for name in sys.modules if name.partition(".")[0] == "some_parts"]:
        del sys.modules[name]


def test_only_the_file_that_is_asked_for_is_imported(parts):
    entry = parts.entry("one")
    assert (entry.name, entry.config, entry.part.__module__) == ("one", Config, "some_parts.one")
    assert parts.entry("one") is entry
    assert [name for name in sys.modules if name.startswith("some_parts.")] == ["some_parts.one"]
    assert parts.names() == ["needy", "one", "two"]


def test_a_part_whose_library_is_missing_breaks_nothing_but_itself(parts):
    for _ in range(2):
        told = refusal(lambda: parts.entry("needy"))
        assert told.startswith("the part 'needy' needs a_library_of_tomorrow, which is not installed here; install it")
    assert parts.entry("two").name == "two"


def test_a_model_of_one_mixer_imports_no_other():
    code = """import sys; from pretrain.config import ModelConfig; from pretrain.models.build import build
build(ModelConfig.model_validate_json('{"mixers": [{"name": "attention"}], "channel": {"name": "swiglu"}}'), 9)
print(*(n for n in sys.modules if n.startswith(("pretrain.mixers.", "pretrain.channels."))))"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert set(done.stdout.split()) == {"pretrain.mixers.attention", "pretrain.channels.swiglu"}


@given(st.sampled_from([*mixer.REGISTRY.names(), *channel.REGISTRY.names()]), st.data())
def test_a_name_with_a_slip_is_answered_with_the_one_that_was_meant(name, data):
    at = data.draw(st.integers(1, len(name) - 1))
    slip = name[:at] + data.draw(st.sampled_from(["", "x", name[at] * 2])) + name[at + 1 :]
    registry = mixer.REGISTRY if name in mixer.REGISTRY.names() else channel.REGISTRY
    if slip not in registry.names():
        with pytest.raises(ConfigError, match=rf"^no \w+ is called '{slip}'; did you mean '{name}'\?$"):
            registry.entry(slip)


def test_a_name_like_no_other_is_answered_with_all_there_are():
    told = refusal(lambda: mixer.REGISTRY.entry("zzz"))
    assert told == f"no mixer is called 'zzz'; there is {', '.join(mixer.REGISTRY.names())}"


# ---- files of the user's own


def test_a_file_never_stands_for_another_of_its_name(tmp_path):
    packaged = mixer.REGISTRY.entry("attention").part
    own = write(tmp_path / "a/attention.py", SCALED)
    other = write(tmp_path / "b/attention.py", SCALED)
    found = [mixer.REGISTRY.entry("attention", str(path)).part for path in (own, other, own)]
    assert found[0] is found[2] and len({packaged, *found}) == 3
    assert mixer.REGISTRY.entry("attention").part is packaged
    write(other, "")
    with pytest.raises(ConfigError, match=r"b/attention\.py registers no mixer; decorate its class"):
        mixer.REGISTRY.entry("attention", str(other))


def test_a_file_is_read_as_it_stands_there_now(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    own = write(tmp_path / "mine.py", SCALED)
    before = own.stat()
    assert mixer.REGISTRY.entry("mine", str(own)).config().scale == 1.0
    own.write_text(SCALED.replace("key(1.0", "key(2.0"))
    os.utime(own, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = mixer.REGISTRY.entry("mine", str(own)).config
    assert (found().scale, found.__annotations__["scale"]) == (2.0, float)
    assert list(tmp_path.iterdir()) == [own]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\nclass Mine(\n", "fails in line 2 (SyntaxError: '(' was never closed"),
        ("\nimport a_library_of_tomorrow\n", "fails in line 2 (ModuleNotFoundError: No module named 'a_library_of_to"),
        (
            "def f():\n    import json; json.loads('')\nf()\n",
            "fails in line 2 (JSONDecodeError: Expecting",
        ),
        ("raise ValueError('one\\ntwo')\n", "fails in line 1 (ValueError: one)"),
        ("raise SystemExit(3)\n", "fails in line 1 (SystemExit: 3)"),
        ("from pretrain.mixer import register\n", "registers no mixer; decorate its class with @register(Config)"),
        ("", "registers no mixer; decorate its class with @register(Config)"),
        (None, "cannot be read; give a path to a .py file"),
    ],
)
def test_a_file_that_gives_no_mixer_is_a_sentence_as_often_as_it_is_asked(config, text, told):
    own = config.parent / "own/scaled.py"
    own.unlink() if text is None else own.write_text(text)
    for _ in range(2):
        refused = refusal(lambda: resolve([config], []))
        line = next(n for n, line in enumerate(config.read_text().splitlines(), 1) if "scaled.py" in line)
        assert refused.startswith(f"{config}:{line}: the mixer file {own} {told}")


def test_an_option_is_judged_by_the_file_and_told_where_it_is_written(config):
    words = [f"model.mixers=[{{file: {config.parent / 'own/scaled.py'}, options: {{scael: 2}}}}]"]
    with pytest.raises(ConfigError, match=r"scael: 2.*: unknown key 'model\.mixers.*scael'; did you mean '.*scale'\?"):
        resolve([config], words)


def test_a_run_goes_on_with_its_copy_when_the_original_is_gone(config, tmp_path):
    straight = losses(train_small(config, *TWELVE, "run.name=straight"))
    run = train_small(config, *TWELVE, "train.steps=6")
    (copy,) = run.path.glob("mixers/*/*")
    assert (copy.name, copy.read_text()) == ("scaled.py", SCALED)
    shutil.rmtree(tmp_path / "own")
    start(run.config, words=TWELVE)
    command = [sys.executable, "-m", "pretrain.run", run.path]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=90, check=True)
    assert events(run, "resume") == ["resumed from step_000000006"]
    assert losses(run) == straight
    assert len(set(straight.values())) == 12
    assert load_trained(run).step == 12


@pytest.mark.parametrize("kind", ["mixers", "channel"])
def test_a_changed_file_is_another_mixer(config, tmp_path, kind):
    own = tmp_path / "own/scaled.py"
    words = ()
    if kind == "channel":
        own = write(tmp_path / "own/mine.py", CHANNEL)
        words = (f"model.channel={{file: {own}}}",)
    run = train_small(config, "train.steps=2", *words)
    assert sorted(path.name for path in run.path.glob("mixers/*/*.py")) == ["mine.py", "scaled.py"][kind == "mixers" :]
    start(config, words=words)
    own.write_text(own.read_text() + "# changed\n")
    told = refusal(lambda: start(config, words=words))
    assert told.startswith(f"run small began with another configuration (model.{kind}: ")
    assert own.name in told and "give this one another run.name" in told


def test_a_run_whose_folder_was_moved_goes_on_with_the_copy_there(config, tmp_path):
    run = train_small(config, "train.steps=2")
    shutil.move(run.path.parent, tmp_path / "elsewhere")
    prepared = start(config, words=("train.steps=2", f"run.dir={tmp_path / 'elsewhere'}"))
    (copy,) = prepared.folder.path.glob("mixers/*/*.py")
    assert prepared.config.model.mixers[0].file == str(copy)
    assert load_trained(prepared.folder).step == 2
    copy.write_text("harm")
    start(config, words=("train.steps=2", f"run.dir={tmp_path / 'elsewhere'}"))
    assert copy.read_text() == SCALED
