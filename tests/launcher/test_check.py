"""`leviathan check`: what a run would be, told before it starts, and everything that would stop it at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError, DataError
from data_pipeline.batch import Batch
from launcher import check as checks
from launcher.check import check_run
from pretrain.activations import activation_bytes
from pretrain.config import ModelConfig
from pretrain.init import initialise
from pretrain.models.build import build
from tests.conftest import leviathan
from tests.small_ensemble import write_ensemble
from tests.small_run import small_config, train_small


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def config(tmp_path: Path, shards: Path, corpus: Path) -> Path:
    return small_config(tmp_path, shards, corpus)


def line_of(out: str, name: str) -> str:
    return next(line for line in out.splitlines() if line.startswith(name))


def test_a_run_that_can_start_is_ready_and_nothing_is_written(config, tmp_path):
    done = leviathan("check", config, "--ranks", 2, "optim.lr=3e-4")
    assert (done.code, done.err) == (0, "")
    assert "run small in" in done.out.splitlines()[0]
    assert "(new), 2 ranks" in done.out.splitlines()[0]
    assert "10,352 (4,112 of them in embeddings)" in line_of(done.out, "parameters")
    assert "correlation, attention; channel mixer mlp" in line_of(done.out, "blocks")
    assert "12 of 256 tokens, 3.07k tokens in all" in line_of(done.out, "steps")
    assert "8 rows: 4 a rank, 4 at once (accumulation 1)" in line_of(done.out, "a step")
    assert "4 steps of warm-up to 3.00e-04, then cosine" in done.out
    assert done.out.splitlines()[-1] == f"ready: leviathan train {config} optim.lr=3e-4 --ranks 2"
    assert not (tmp_path / "runs").exists()


def test_epochs_of_each_source_and_their_excess_are_told(config, capsys):
    check_run([str(config)], ["train.steps=3000", "data.sources.letters.weight=3"], None)
    out = capsys.readouterr().out
    words = line_of(out, "letters").split()
    assert words[1] == "75.0%"
    assert int(words[4].replace(",", "")) == 18000
    assert float(words[5]) == pytest.approx(18000 / int(words[3].replace(",", "")), abs=0.01)
    assert "warning: the run reads source letters 14." in out


def test_modules_of_a_shape_of_their_own_are_told(shards, corpus, tmp_path, capsys):
    check_run([str(write_ensemble(tmp_path, shards, corpus))], ["model.ensemble.shapes.lists.depth=3"], ranks=1)
    told = "letters, lists: two models each, fusion mhc; lists is 16 wide, 3 deep"
    assert told in line_of(capsys.readouterr().out, "modules")


def test_every_mistake_is_told_at_once_with_the_worse_exit_code(config, capsys):
    with pytest.raises(ConfigError) as caught:
        check_run([str(config)], ["data.dir=/nowhere", "model.width=18", "train.micro_rows=3", "run.dir=/proc/x"], 2)
    lines = str(caught.value).splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["train.micro_rows", "no", "model.width"]
    out = capsys.readouterr().out
    assert "not ready: 3 problems" in out
    assert "ready: leviathan" not in out.replace("not ready", "")


def test_missing_shards_alone_are_a_mistake_of_the_data_and_the_model_is_shown_all_the_same(config, capsys):
    with pytest.raises(DataError, match="no shards in /nowhere"):
        check_run([str(config)], ["data.dir=/nowhere", "data.tokenizer=sp:4096"], None)
    assert "vocabulary 4,096" in capsys.readouterr().out


def test_a_row_longer_than_every_shard_is_told_for_each_source(config):
    with pytest.raises(DataError) as caught:
        check_run([str(config)], ["model.length=60000"], None)
    assert str(caught.value).count("has no shard of 60001 tokens") == 2


def test_a_checkpoint_that_does_not_fit_the_disk_is_told(config, monkeypatch):
    monkeypatch.setattr(checks, "free_bytes", lambda folder: 150_000)
    with pytest.raises(ConfigError, match=r"a checkpoint of this run needs 214\.6 kB .* has 150\.0 kB free"):
        check_run([str(config)], [], None)


def test_little_room_for_all_that_is_kept_is_a_warning(config, monkeypatch, capsys):
    monkeypatch.setattr(checks, "free_bytes", lambda folder: 2_000_000)
    check_run([str(config)], [], None)
    assert "warning: keeping 20 checkpoints while the next is written takes 4.5 MB" in capsys.readouterr().out


def test_memory_that_is_not_there_is_a_warning(config, monkeypatch, capsys):
    monkeypatch.setattr(checks, "_room", lambda config, world: ("this machine's CPU", 1_000_000))
    check_run([str(config)], [], None)
    out = capsys.readouterr().out
    assert "warning: a rank needs about 1." in out
    assert "this machine's CPU has 1.0 MB for each; lower train.micro_rows" in out
    assert "lower train.micro_rows, raise engine.zero, or set engine.activation_checkpointing=true" in out


def test_a_schedule_that_never_ends_its_warm_up_and_saves_nothing_is_a_warning(config, capsys):
    check_run([str(config)], ["optim.warmup_steps=12", "checkpoint.every=50"], None)
    out = capsys.readouterr().out
    assert "warning: optim.warmup_steps 12 is not less than the 12 steps of the run" in out
    assert "of these 12 steps only the last is saved" in out


def test_a_begun_run_is_compared_with_its_beginning(config, shards, tmp_path, capsys):
    folder = train_small(config, "train.steps=2")
    check_run([str(config)], ["engine.name=torch", "train.steps=30"], None)
    assert "(goes on), 1 rank" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"began with another configuration \(train\.batch_rows: 8 → 16\)"):
        check_run([str(config)], ["train.batch_rows=16"], None)
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    folder.set_facts(data_fingerprint="1" * 64)
    with pytest.raises(DataError, match="holds other shards than run small began with"):
        check_run([str(config)], [f"data.dir={copy}"], None)


def test_a_held_out_evaluation_without_held_out_text_is_told(corpus, tmp_path):
    config = small_config(tmp_path, tmp_path / "shards", corpus)
    assert leviathan("data", "build", config, "data.heldout=0", "--workers", 1).code == 0
    with pytest.raises(DataError, match=r"eval\.every is 5, but the shards hold no held-out text"):
        check_run([str(config)], ["data.heldout=0", "eval.every=5"], None)


def test_a_mixer_of_the_users_own_that_fails_is_a_sentence(config, tmp_path):
    mixer = tmp_path / "mine.py"
    mixer.write_text(
        "from configs.schema import Config\nfrom pretrain.mixer import TokenMixer, register\n"
        "@register(Config)\nclass Mine(TokenMixer):\n    pass\n"
    )
    with pytest.raises(ConfigError, match=r"the model cannot be built \(TypeError: .*abstract"):
        check_run([str(config)], [f"model.mixers=[{{file: {mixer}}}]"], None)


@pytest.mark.parametrize(("mixer", "channel"), [("attention", "mlp"), ("correlation", "mlp"), ("correlation", "moe")])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_counted_as_a_real_forward_pass_saves_them(mixer, channel, bf16):
    parts = f'"mixers": [{{"name": "{mixer}"}}], "channel": {{"name": "{channel}"}}'
    shape = ModelConfig.model_validate_json(f'{{"width": 32, "depth": 3, "length": 64, {parts}}}')
    model = build(shape, 97).to_empty(device="cpu").train()
    initialise(model, 0)
    if bf16:
        model = model.to(torch.bfloat16)
    ids = torch.zeros(4, 64, dtype=torch.long)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(Batch(ids, ids, ids, ids, torch.zeros(4, dtype=torch.long), 256, True))
    real = sum(storage.nbytes() for storage in saved.values())
    assert activation_bytes(shape, 97, 4, bf16=bf16, recompute=False) == pytest.approx(real, rel=0.01)
    assert activation_bytes(shape, 97, 4, bf16=bf16, recompute=True) < 0.6 * real


def test_shared_experts_are_checked_and_take_less_memory_each(shards, corpus, tmp_path, capsys):
    config = str(small_config(tmp_path, shards, corpus))
    moe = "model.channel={name: moe, options: {experts: 6}}"
    for words, said in (
        (["engine.expert_parallel=2"], "no experts to deal"),
        ([moe, "engine.expert_parallel=4"], "does not divide the 6 experts"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_run([config], words, 4)
    with pytest.raises(ConfigError, match="does not divide 4 ranks"):
        check_run([config], [moe, "engine.expert_parallel=3"], 4)
    capsys.readouterr()
    check_run([config], [moe, "engine.expert_parallel=2"], 4)
    assert "ready" in capsys.readouterr().out
