"""Modules trained alone become an ensemble: what is read, what is drawn, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError, DataError, UsageError
from launcher.prepare import prepare, resolve
from pretrain.checkpoint_files import MANIFEST, newest_readable, open_files, own_hash
from pretrain.engine import PARAM, FragmentReader
from pretrain.ensemble.alone import module_run, without_modules
from pretrain.ensemble.combine import join
from pretrain.ensemble.config import EnsembleConfig
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.member_names import stacked_names
from pretrain.models.build import build
from pretrain.run_folder import RunFolder
from pretrain.trained import load_trained
from tests.conftest import events, losses
from tests.pretrain.ensembles import own_values
from tests.small_ensemble import ALONE_STEPS, MODULES, STEPS, train_joined, train_module, write_ensemble

VOCAB = 257


@pytest.fixture(scope="module")
def place(shards: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both modules' runs and the joint run, none of which any test changes."""
    folder = tmp_path_factory.mktemp("duo")
    config = write_ensemble(folder, shards, corpus)
    for module in MODULES:
        train_module(config, module)
    train_joined(config)
    return folder


@pytest.fixture
def config(place: Path, tmp_path: Path) -> Path:
    """The same for one test, which may do as it likes."""
    shutil.copytree(place / "runs", tmp_path / "runs")
    path = tmp_path / "duo.yaml"
    path.write_text((place / "duo.yaml").read_text().replace(str(place), str(tmp_path)))
    return path


def run_of(place: Path, name: str = "duo") -> RunFolder:
    return RunFolder(place / "runs" / name)


def origins(place: Path) -> dict[str, dict]:
    return {name: {"run": str(run_of(place, f"duo-{name}").path), "step": ALONE_STEPS} for name in MODULES}


def joined(place: Path) -> tuple[FragmentReader, torch.nn.Module]:
    config, _ = resolve([place / "duo.yaml"], [])
    tokenizer = run_of(place).facts()["tokenizer_sha256"]
    return join(origins(place), config.model, VOCAB, tokenizer, seed=0), build(config.model, VOCAB)


# ---- what a module alone is


def test_a_modules_run_is_the_ensembles_but_for_what_makes_it_a_module(place):
    whole, _ = resolve([place / "duo.yaml"], ["modules.lr=1e-2"])
    alone = module_run(whole, "lists")
    assert alone.run.name == "duo-lists"
    assert alone.model.ensemble.modules == ("lists",)
    assert alone.model.ensemble.fusion == "none"
    assert alone.model.model_copy(update={"ensemble": whole.model.ensemble}) == whole.model
    assert (alone.train.steps, alone.optim.lr) == (ALONE_STEPS, 1e-2)
    weights = {name: source.weight for name, source in alone.data.sources.items()}
    assert weights == {"letters": 0.05, "lists": 0.95}
    # another fusion is no other module
    other, _ = resolve([place / "duo.yaml"], ["modules.lr=1e-2", "model.ensemble.fusion=posterior"])
    assert module_run(other, "lists") == alone


def test_domains_say_whose_text_a_source_is_and_shares_keep_the_sources_weights(place):
    words = ["model.ensemble.modules=[one, two]", "model.ensemble.domains={letters: one, lists: one}"]
    whole, _ = resolve([place / "duo.yaml"], [*words, "data.sources.lists.weight=3"])
    sources = module_run(whole, "one").data.sources
    assert sources["lists"].weight == 3 * sources["letters"].weight
    with pytest.raises(ConfigError, match=r"no source of text is for the module 'two'; call one of letters, lists so"):
        module_run(whole, "two")


def test_a_name_that_becomes_too_long_is_told(place):
    whole, _ = resolve([place / "duo.yaml"], [f"run.name={'x' * 60}"])
    with pytest.raises(ConfigError, match=r"would be called 'x+-letters', which is too long"):
        module_run(whole, "letters")


def test_an_ensemble_without_a_module_is_that_of_the_others(place):
    whole, _ = resolve(
        [place / "duo.yaml"],
        [
            "model.ensemble.prior={letters: 3, lists: 1}",
            "model.ensemble.shapes={letters: {depth: 3}, lists: {width: 24}}",
        ],
    )
    assert (module_run(whole, "letters").model.depth, module_run(whole, "lists").model.width) == (3, 24)
    assert module_run(whole, "lists").model.ensemble.shapes == {}
    ensemble = without_modules(whole, ["letters"]).model.ensemble
    assert (ensemble.modules, ensemble.top, ensemble.prior) == (("lists",), 1, {"lists": 1.0})
    assert list(ensemble.shapes) == ["lists"]
    assert EnsembleConfig.model_validate(ensemble.model_dump()) == ensemble
    with pytest.raises(UsageError, match="no module 'letter'; this ensemble has letters, lists"):
        without_modules(whole, ["letter"])
    with pytest.raises(UsageError, match="keep at least one"):
        without_modules(whole, MODULES)


# ---- what joining reads


def test_every_modules_value_is_its_checkpoints_and_every_other_the_declared_first(place):
    reader, model = joined(place)
    drawn = build(resolve([place / "duo.yaml"], [])[0].model, VOCAB).to_empty(device="cpu")
    initialise(drawn, 0)
    files = {name: open_files(newest_readable(run_of(place, f"duo-{name}"))) for name in MODULES}
    members, read = stacked_names(model), 0
    for name, value in drawn.state_dict().items():
        for part, own in zip(members.get(name, [name]), value if name in members else [value]):
            found = reader.read(part, PARAM, 0, own.numel()).view(own.shape)
            owner = next((files[module] for module in MODULES if part in files[module].shapes), None)
            assert torch.equal(found, own if owner is None else owner.tensor(part)), part
            assert torch.count_nonzero(reader.read(part, "exp_avg", 0, 3)) == 0
            read += owner is not None
    assert read == sum(len(of.shapes) for of in files.values())
    assert reader.updates == 0


def test_joint_training_begins_anew_and_says_from_what(place):
    run = run_of(place)
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    (told,) = events(run, "join")
    assert told == "begins with " + ", ".join(f"{module} (duo-{module}, step {ALONE_STEPS})" for module in MODULES)
    assert newest_readable(run).facts["data"]["rows"] == 8 * STEPS
    assert open_files(newest_readable(run)).updates == STEPS


@pytest.mark.parametrize("shape", [None, "{width: 24, depth: 1}"], ids=["equal", "one of another shape"])
def test_frozen_modules_stay_bit_by_bit_what_they_were_alone(config, shape):
    place, runs = config.parent, {name: f"duo-{name}" for name in MODULES}
    words = ("run.name=frozen", *([f"model.ensemble.shapes.lists={shape}"] if shape else []))
    if shape:
        runs["lists"] = train_module(config, "lists", *words).name
    branch = tuple(f"{name}={run}" for name, run in runs.items())
    run = train_joined(config, *words, "model.ensemble.freeze=modules", branch=branch)
    whole = load_trained(run)
    ids = torch.randint(0, VOCAB, (3, 32), generator=torch.Generator().manual_seed(0))
    layout = Layout.single(3, 32)
    with torch.no_grad():
        assert whole.model.fusion.out.weight.any(), "the fusion was trained"
        whole.model.fusion.out.weight.zero_()
        mine = own_values(whole.model)
        for module in MODULES:
            whole.model.without([name for name in MODULES if name != module])
            alone = load_trained(run_of(place, runs[module]))
            for name, p in own_values(alone.model).items():
                assert torch.equal(mine[name], p), name
            assert torch.equal(whole.model.logits(ids, layout), alone.model.logits(ids, layout))


def test_the_joint_run_goes_on_without_the_runs_of_its_modules(config):
    steady = train_joined(config, "run.name=steady", f"train.steps={STEPS + 4}", "optim.schedule=constant")
    train_joined(config, "run.name=moved", "optim.schedule=constant")
    for module in MODULES:
        shutil.rmtree(run_of(config.parent, f"duo-{module}").path)
    moved = train_joined(config, "run.name=moved", f"train.steps={STEPS + 4}", "optim.schedule=constant", branch=())
    assert losses(moved) == losses(steady)
    assert events(moved, "resume") == [f"resumed from step_{STEPS:09d}"]


def test_a_module_of_another_ensemble_can_be_joined(config):
    run = train_joined(config, "run.name=third", branch=("letters=duo@3", f"lists=duo-lists@{ALONE_STEPS}"))
    assert run.facts()["from"]["modules"]["letters"]["run"].endswith("runs/duo")
    assert sorted(losses(run)) == list(range(1, STEPS + 1))


# ---- what is refused


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("model.width=32", "has width 16, expected 32; train it as a part of this ensemble, or say in"),
        (
            "model.ensemble.shapes.letters.width=8",
            "has width 16, expected 8; train it as a part of this ensemble, or say",
        ),
        ("model.depth=3", "has depth 2, expected 3"),
        ("model.ensemble.couple_every=2", "has modules.letters.a.models.layers.0.couplings.gate (1,), expected absent"),
        ("model.ensemble.couple_lags=2", "(2, 4, 1), expected (2, 2, 1)"),
    ],
)
def test_a_module_of_another_shape_is_told_by_name(config, word, told):
    with pytest.raises(ConfigError) as refused:
        train_joined(config, "run.name=other", word)
    assert str(refused.value).startswith(f"the module letters ({run_of(config.parent, 'duo-letters').path}/checkpoints")
    assert told in str(refused.value)


def test_a_module_of_another_tokenizer_or_with_a_flipped_bit_is_refused(config):
    path = run_of(config.parent, "duo-lists").checkpoints / f"step_{ALONE_STEPS:09d}"
    manifest = json.loads((path / MANIFEST).read_bytes())
    changed = {k: v for k, v in manifest.items() if k != "sha256"}
    changed["data"] = manifest["data"] | {"tokenizer": "f00d" * 16}
    (path / MANIFEST).write_text(json.dumps(changed | {"sha256": own_hash(changed)}))
    with pytest.raises(DataError, match=r"the module lists \(.*\) was trained with another tokenizer: f00df00df00d"):
        train_joined(config, "run.name=other")
    (path / MANIFEST).write_text(json.dumps(manifest))
    file = path / manifest["files"][0]["name"]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"has no valid checkpoint .*sha256"):
        train_joined(config, "run.name=another")


def test_words_of_from_that_make_no_sense_are_told(config):
    for branch, told in (
        (("letters=duo-letters",), "says nothing of the module lists; give each module a run, lists=RUN"),
        (
            ("letters=duo-letters", "list=duo-lists"),
            "--from list names no module; write MODULE=RUN for each of letters",
        ),
        (("letters=duo-letters", "duo-lists"), "--from duo-lists names no module"),
        (("duo", "duo-lists"), "--from is given 2 times, but a run has one origin"),
        (
            ("letters=duo-letters", "lists=duo-letters"),
            r"lists .* holds nothing of that name; name a run that",
        ),
    ):
        with pytest.raises(ConfigError, match=told):
            train_joined(config, "run.name=other", branch=branch)
    with pytest.raises(ConfigError, match=r"run duo has begun, from .*duo-letters@6; go on with it without --from"):
        prepare([config], [], ranks=1, branch=["letters=duo-letters@3", "lists=duo-lists"], allow=[])
