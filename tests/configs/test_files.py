"""The YAML files that come along."""

from __future__ import annotations

import pytest

from configs.load import PACKAGED, load
from configs.schema import leaves, resume_class
from launcher.config import LaunchConfig
from launcher.manual import manual
from launcher.prepare import resolve
from pretrain import mixer
from pretrain.config import RunConfig

FILES = sorted(PACKAGED.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGED)))
def test_each_file_is_right(path):
    resolve([path], [])


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != PACKAGED], ids=lambda p: str(p.relative_to(PACKAGED)))
def test_an_overlay_is_small(path):
    assert len(path.read_text().splitlines()) <= 15


def test_the_manual_of_all_keys_is_what_the_schema_says():
    assert (PACKAGED / "base.yaml").read_text() == manual(), "run `python -m launcher.manual > configs/base.yaml`"


def test_the_manual_changes_nothing():
    assert resolve([PACKAGED / "base.yaml"], []) == (RunConfig(), LaunchConfig())


@pytest.mark.parametrize("schema", [RunConfig, LaunchConfig])
def test_every_key_says_what_a_resume_may_do_with_it_and_what_it_is_for(schema):
    for path, info in leaves(schema):
        assert resume_class(info) in ("match", "record", "free"), ".".join(path)
        assert info.description and not info.description.endswith("."), ".".join(path)


def test_every_mixer_has_one_file_and_every_file_a_mixer():
    assert {p.stem for p in (PACKAGED / "mixers").glob("*.yaml")} == set(mixer.REGISTRY.names())


@pytest.mark.parametrize("name", mixer.REGISTRY.names())
def test_a_mixers_file_chooses_it(name):
    assert [m.name for m in load(RunConfig, [PACKAGED / "mixers" / f"{name}.yaml"]).model.mixers] == [name]
