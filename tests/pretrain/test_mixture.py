"""All models of an ensemble become one mixture of experts (`fusion: btx`), and the seed they must have begun from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from configs.load import Layers
from configs.load import build as checked
from launcher import ensemble
from launcher.ensemble import train_ensemble
from launcher.prepare import resolve
from launcher.several import Supervisors
from pretrain.checkpoint_files import newest_readable, open_files
from pretrain.config import ModelConfig
from pretrain.engine import PARAM
from pretrain.ensemble import combine
from pretrain.ensemble.combine import join
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.models.build import build
from pretrain.models.language_model import LanguageModel
from pretrain.run_folder import RunFolder
from pretrain.trained import load_trained
from tests.conftest import events, losses
from tests.small_ensemble import MODULES, Here, write_ensemble

VOCAB, SEED_STEPS = 257, 4
BTX = ("model.ensemble.fusion=btx", f"modules.seed_steps={SEED_STEPS}")
MEMBERS = [f"{module}.{which}" for module in MODULES for which in ("a", "b")]


def run_of(place: Path, name: str) -> RunFolder:
    return RunFolder(place / "runs" / name)


def train(place: Path, *words: str) -> list[str]:
    """The names of the runs that one command trains, in order."""
    here = Here()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervisors, "train", lambda *given, **more: here.train(*given, **more))
        assert train_ensemble([str(place / "duo.yaml")], [*BTX, *words], ranks=None, without=()) == 0
    return here.trained


@pytest.fixture(scope="module")
def place(shards: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seed, modules that learn nothing more, and the mixture after one step."""
    folder = tmp_path_factory.mktemp("btx")
    write_ensemble(folder, shards, corpus)
    assert train(folder, "modules.lr=1e-30", "train.steps=1") == ["duo-seed", "duo-letters", "duo-lists", "duo"]
    return folder


def mixture(place: Path):
    """The mixture as its training begins."""
    config, _ = resolve([place / "duo.yaml"], BTX)
    origins = {name: {"run": str(run_of(place, f"duo-{name}").path), "step": 6} for name in MODULES}
    reader = join(origins, config.model, VOCAB, run_of(place, "duo").facts()["tokenizer_sha256"], seed=0)
    model = build(config.model, VOCAB).to_empty(device="cpu")
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(reader.read(name, PARAM, 0, value.numel()).view(value.shape))
            assert torch.count_nonzero(reader.read(name, "exp_avg", 0, 2)) == 0
    return model.eval(), config.model, reader


def test_two_models_of_a_module_begin_from_the_seeds_end_and_half(place):
    seed = run_of(place, "duo-seed")
    assert set(seed.committed_steps()) >= {SEED_STEPS, SEED_STEPS // 2}
    (told,) = events(run_of(place, "duo-lists"), "join")
    assert told == "begins with lists.a (duo-seed, step 4), lists.b (duo-seed, step 2)"
    files = open_files(newest_readable(run_of(place, "duo-lists")))
    for which, step in (("a", SEED_STEPS), ("b", SEED_STEPS // 2)):
        began = open_files(newest_readable(seed, step))
        for name in began.shapes:
            there = "models." + name.replace("blocks.0", "layers.0.blocks").replace("blocks.1", "layers.1.blocks")
            now = files.tensor(f"modules.lists.{which}.{there}")
            torch.testing.assert_close(now, began.tensor(name), rtol=0, atol=1e-20)


def test_two_wrapped_models_of_a_module_begin_from_their_seed_too(shards, corpus, tmp_path):
    write_ensemble(tmp_path, shards, corpus)
    words = ("model.ensemble.fusion=mhc", "model.wrap.passes=2", "modules.lr=1e-30", "train.steps=1")
    assert train(tmp_path, *words) == ["duo-seed", "duo-letters", "duo-lists", "duo"]
    began = open_files(newest_readable(run_of(tmp_path, "duo-seed"), SEED_STEPS))
    files = open_files(newest_readable(run_of(tmp_path, "duo-lists")))
    assert any(name.startswith("blocks.shifts.") for name in began.shapes)
    for name in began.shapes:
        there = re.sub(r"^blocks\.inner\.(\d+)", r"layers.\1.blocks", name.replace("blocks.shifts", "shifts"))
        now = files.tensor(f"modules.lists.a.models.{there}")
        torch.testing.assert_close(now, began.tensor(name), rtol=0, atol=1e-20)


def test_experts_are_the_models_and_all_else_is_their_mean(place):
    model, _, reader = mixture(place)
    assert isinstance(model, LanguageModel)
    assert reader.updates == 0
    files = {name: open_files(newest_readable(run_of(place, f"duo-{name}"))) for name in MODULES}
    parts = [(files[member.split(".")[0]], f"modules.{member}.models.") for member in MEMBERS]
    fresh = build(resolve([place / "duo.yaml"], BTX)[0].model, VOCAB).to_empty(device="cpu")
    initialise(fresh, 0)
    seen = set()
    for name, value in model.state_dict().items():
        there = name.replace("blocks.0", "layers.0.blocks").replace("blocks.1", "layers.1.blocks")
        if "router" in name:
            assert torch.equal(value, fresh.state_dict()[name])
        elif "experts" in name:
            of_each = [of.tensor(prefix + there.replace("experts.", "") + ".weight") for of, prefix in parts]
            assert torch.equal(value, torch.stack(of_each))
        else:
            of_each = [of.tensor(prefix + there) for of, prefix in parts]
            torch.testing.assert_close(value, torch.stack(of_each).mean(0), rtol=0, atol=1e-7)
        seen.add(name.split(".")[-2])
    assert {"router", "experts", "embed", "qkv"} <= seen


@pytest.mark.parametrize("channel", ["mlp", "swiglu"])
def test_equal_models_make_a_mixture_that_is_each_of_them_whatever_the_router_says(channel):
    """FF_e the same for all e and gates that add up to 1: every mixture of them is one of them."""
    keys = {"width": 16, "depth": 2, "length": 24, "channel": {"name": channel}, "bias": True}
    single = checked(ModelConfig, Layers({**keys}))
    whole = checked(ModelConfig, Layers({**keys, "ensemble": {"modules": list(MODULES), "fusion": "btx"}}))
    one = build(single, VOCAB).to_empty(device="cpu").double()
    initialise(one, 3)
    files = {name: Same(one) for name in MODULES}
    model = build(whole, VOCAB).to_empty(device="cpu").double()
    reader = combine._mixed(files, whole, build(whole, VOCAB), seed=5)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(reader.read(name, PARAM, 0, value.numel()).view(value.shape))
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    layout = Layout.single(2, 24)
    torch.testing.assert_close(model.logits(ids, layout), one.logits(ids, layout), rtol=0, atol=1e-6)
    # pieces that lie across experts are read as they stand in the whole
    up = model.state_dict()["blocks.0.channel.experts.up"].flatten()
    size = up.numel() // 4
    piece = reader.read("blocks.0.channel.experts.up", PARAM, size - 3, 2 * size + 5)
    assert torch.equal(piece, up[size - 3 : 2 * size + 5])


class Same:
    """A module's checkpoint whose two models are one single model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._state = model.state_dict()

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        _, _, _, _, rest = name.split(".", 4)
        single = rest.replace("layers.0.blocks", "blocks.0").replace("layers.1.blocks", "blocks.1")
        return self._state[single].flatten()[start:stop]


def test_the_mixture_is_a_language_model_like_any_other(place):
    run = run_of(place, "duo")
    trained = load_trained(run)
    assert isinstance(trained.model, LanguageModel)
    assert sorted(losses(run)) == [1]
    (row,) = run.steps().values()
    assert sum(value for name, value in row["model"].items() if "load" in name) == pytest.approx(2)


def test_the_same_command_trains_neither_seed_nor_modules_again(place):
    assert train(place, "modules.lr=1e-30", "train.steps=2") == ["duo"]


def test_what_cannot_be_averaged_is_refused(place, shards, corpus, tmp_path):
    plain = write_ensemble(tmp_path, shards, corpus)
    with pytest.raises(ConfigError, match=r"must have begun from one seed; set modules\.seed_steps"):
        ensemble.plan_ensemble([str(plain)], ["model.ensemble.fusion=btx"], None, ())
    words = ["model.ensemble.modules=[seed]", "model.ensemble.domains={letters: seed}", "model.ensemble.top=1"]
    with pytest.raises(ConfigError, match="a module is called seed"):
        ensemble.plan_ensemble([str(plain)], [*words, "modules.seed_steps=2"], None, ())
    shaped = "model.ensemble.shapes.lists.width=24"
    with pytest.raises(ConfigError, match="'lists' a shape of its own, but fusion btx makes all models one; leave"):
        resolve([plain], [*BTX, shaped])
    with pytest.raises(ConfigError, match=r"seed_steps 2 has all models begin from one, .*'lists' a shape of its own"):
        resolve([plain], ["modules.seed_steps=2", shaped])
    config, _ = resolve([place / "duo.yaml"], BTX)
    origins = {name: {"run": str(run_of(place, f"duo-{name}").path), "step": 6} for name in MODULES}
    facts = run_of(place, "duo-lists").facts()
    run_of(place, "duo-lists").set_facts(**{"from": {}})
    try:
        with pytest.raises(ConfigError, match=r"letters began from .*duo-seed, lists began from nothing; set"):
            join(origins, config.model, VOCAB, run_of(place, "duo").facts()["tokenizer_sha256"], seed=0)
    finally:
        run_of(place, "duo-lists").set_facts(**{"from": facts["from"]})
    for word, told in (
        ("model.channel={name: moe}", "the channel mixer moe cannot become experts"),
        ("model.wrap.passes=2", "set model.wrap.passes to 1"),
    ):
        config, _ = resolve([place / "duo.yaml"], [*BTX, word])
        with pytest.raises(ConfigError, match=told):
            build(config.model, VOCAB)
