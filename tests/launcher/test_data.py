"""`leviathan data`: what is built is told, what is damaged is found, what a step read can be asked."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs.errors import DataError, UsageError
from configs.load import load
from data_pipeline.dataset import open_dataset
from data_pipeline.inspect_shards import load_manifest
from data_pipeline.loader import Loader
from data_pipeline.order import Order
from launcher.data import check_shards, explain_step, show_samples
from launcher.screen import Bar, Terminal, harmless, one_line
from pretrain.checkpoint_files import read_manifest
from pretrain.config import RunConfig
from pretrain.explain import explain
from pretrain.run_folder import RunFolder, step_name
from tests.conftest import data_of, leviathan
from tests.small_run import small_config, train_small

EOD = 256


@pytest.fixture(scope="module")
def run(shards: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of 10 steps that went on to 12 with three times as many letters."""
    config = small_config(tmp_path_factory.mktemp("data"), shards, corpus)
    train_small(config, "train.steps=10")
    return train_small(config, "data.sources.letters.weight=3")


def damaged(shards: Path, folder: Path, change) -> Path:
    """A copy of the shards with one of them changed."""
    shutil.copytree(shards, folder / "copy")
    change(sorted((folder / "copy").glob("*.tar")))
    return folder / "copy"


def test_a_build_tells_progress_what_it_made_and_what_comes_next(corpus, tmp_path):
    config = small_config(tmp_path, tmp_path / "shards", corpus)
    (corpus / "letters" / "again.txt").write_text((corpus / "letters" / "000.txt").read_text())
    (corpus / "letters" / "empty.txt").write_text(" \n")
    (corpus / "letters" / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    try:
        done = leviathan("data", "build", config, "--workers", "1")
    finally:
        for name in ("again", "empty", "latin"):
            (corpus / "letters" / f"{name}.txt").unlink()
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    for phase in ("scanning", "encoding"):
        assert any(line.startswith(f"{phase}: 75.") and line.endswith("B/s") for line in lines)
    row = next(line.split() for line in lines if line.startswith("letters "))
    assert row[1] == "151"
    assert row[6:9] == ["1", "1", "1"], "one duplicate, one empty, one that is not UTF-8"
    assert f"leviathan train {config}" in lines[-1]


def test_a_build_that_was_finished_says_so_and_other_shards_are_not_overwritten(shards, corpus, tmp_path):
    config = small_config(tmp_path, shards, corpus)
    again = leviathan("data", "build", config, "--workers", "1")
    assert again.code == 0
    assert "these shards were built before" in again.out
    other = leviathan("data", "build", config, "data.heldout=0.2", "--workers", "1")
    assert other.code == 78
    assert "holds shards of another build (heldout: 0.1 there, 0.2 now)" in other.err


def test_sound_shards_are_called_sound_and_the_waste_of_a_length_is_counted(shards, capsys):
    check_shards(str(shards), 100)
    out = capsys.readouterr().out
    assert "all 8 shards, the tokenizer and the manifest are sound" in out
    manifest = load_manifest(shards)
    tokens = manifest.column("tokens")[manifest.rows_of("letters", "train")].tolist()
    unread = sum(n - max(len(range(0, n - 100, 100)) * 100 + 1, 0) for n in tokens)
    line = next(line.split() for line in out.splitlines() if line.startswith("letters"))
    assert line[1:4] == [str(sum((n - 1) // 100 for n in tokens)), f"{sum(tokens):,}", str(unread)]


def test_everything_that_is_damaged_is_listed_with_exit_code_65(shards, tmp_path):
    def damage(paths: list[Path]) -> None:
        content = bytearray(paths[0].read_bytes())
        content[2000] ^= 1
        paths[0].write_bytes(content)
        paths[1].write_bytes(paths[1].read_bytes()[:-512])
        paths[2].unlink()

    folder = damaged(shards, tmp_path, damage)
    done = leviathan("data", "check", folder)
    assert done.code == 65
    lines = done.err.splitlines()
    assert len(lines) == 3
    for name in sorted(path.name for path in shards.glob("*.tar"))[:3]:
        assert sum(line.startswith(f"error: shard {folder / name} is damaged") for line in lines) == 1


def test_samples_cannot_steer_the_terminal(tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(3):
        (text / f"{number}.txt").write_text(f"red \x1b[31m {number} \u202e and \x07 [bold]brackets[/]\nnext line\n")
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{dir: {tmp_path / 's'}, sources: {{odd: {{path: {text}}}}}}}")
    assert leviathan("data", "build", config, "--workers", "1").code == 0
    show_samples(str(tmp_path / "s"), None, "train", 2)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "red \\x1b[31m 0 \\u202e and \\x07 [bold]brackets[/]\nnext line" in out
    show_samples(str(tmp_path / "s"), "odd", "heldout", 2)
    assert "── odd · " in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"no source 'old'.* did you mean 'odd'"):
        show_samples(str(tmp_path / "s"), "old", "train", 2)


def test_shards_that_are_far_away_are_not_read_in_full():
    with pytest.raises(UsageError, match=r"s3:.* is far away"):
        check_shards("s3://bucket/shards", None)
    with pytest.raises(DataError, match="no shards in /nowhere"):
        check_shards("/nowhere", None)


@pytest.mark.parametrize("step", [1, 7, 11, 12])
def test_explain_names_exactly_what_the_loader_gave_the_step(run, corpus, step):
    config = load(RunConfig, [run.config])
    dataset = open_dataset(config.data)
    known = read_manifest(run.checkpoints / step_name(12))["data"]["weights"]
    assert [row for row, _ in known] == [0, 80]
    order = Order(dataset.manifest, length=32, seed=0, weights=known[0][1], changes=[(row, w) for row, w in known[1:]])
    loader = Loader(order, dataset.shards, batch_rows=8, micro_rows=8, rank=0, world=1)
    (batch,) = next(loader.steps(step - 1, 1))
    told = explain(run, step)
    assert (told.number, told.first_row, told.count) == (step, 8 * (step - 1), 8)
    rows = list(told.rows)
    assert [row.number for row in rows] == list(range(8 * (step - 1), 8 * step))
    for number, row in enumerate(rows):
        assert row.source == order.names[int(batch.source_B[number])]
        read = np.concatenate([_tokens(corpus / row.source / part.name, part) for part in row.parts])
        assert read[:32].tolist() == batch.tokens_BT[number].tolist()
        assert len(read) == 33
        assert row.text == bytes(read[:32][read[:32] != EOD].astype(np.uint8)).decode()


def _tokens(path: Path, part) -> np.ndarray:
    whole = np.append(np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int64), EOD)
    return whole[part.first : part.first + part.tokens]


def test_explain_speaks_of_steps_as_the_trainer_does_and_of_those_to_come(run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    explain_step(str(run.path), 12)
    out = capsys.readouterr().out
    assert "step 12 of small read rows 88 to 95, each 32 tokens" in out
    assert f"its loss was {run.steps()[12]['loss']:.4f} (letters " in out
    assert out.count("letters-train-") == 6, "three of four rows since the weights changed"
    explain_step(str(run.path), 13)
    assert "step 13 of small has not been taken yet (the run is at 12); it will read rows 96 to 103" in (
        capsys.readouterr().out
    )
    with pytest.raises(UsageError, match="small has no step 0: its first is 1"):
        explain_step(str(run.path), 0)


def test_explain_refuses_shards_that_the_run_was_not_trained_on(run, tmp_path):
    copy = RunFolder(tmp_path / "small")
    shutil.copytree(run.path, copy.path)
    copy.set_facts(data_fingerprint="0" * 64)
    with pytest.raises(DataError, match="holds other shards than small was trained on"):
        explain(copy, 3)


def test_a_branch_is_explained_from_where_it_began(run, tmp_path):
    branch = RunFolder(tmp_path / "runs" / "branch")
    branch.make()
    shutil.copy(run.config, branch.config)
    branch.set_facts(created=0.0, **{"from": {"run": str(run.path), "step": 10}})
    assert list(explain(branch, 11).rows) == list(explain(run, 11).rows)
    with pytest.raises(UsageError, match="branch has no step 10: its first is 11; steps up to 10 are those of"):
        explain(branch, 10)


def test_progress_off_a_terminal_is_a_line_now_and_then_with_rate_and_time_left():
    now = [0.0]
    terminal = Terminal(file=io.StringIO(), width=100)
    with Bar(terminal, "encoding", clock=lambda: now[0]) as bar:
        for second in range(21):
            now[0] = float(second)
            bar.update(second * 1e6, 40e6)
    lines = terminal.file.getvalue().splitlines()
    assert lines[0] == "encoding  12%  5.0 MB of 40.0 MB  1.0 MB/s  left 35 s"
    assert lines[-1] == "encoding: 20.0 MB in 20 s, 1.0 MB/s"
    assert len(lines) == 5


def test_progress_does_not_count_what_was_done_before_as_speed():
    now = [0.0]
    terminal = Terminal(file=io.StringIO(), width=100)
    with Bar(terminal, "encoding", clock=lambda: now[0]) as bar:
        now[0] = 10.0
        bar.update(30e6, 40e6, kept=20e6)
    assert terminal.file.getvalue().splitlines() == [
        "encoding  75%  30.0 MB of 40.0 MB  1.0 MB/s  left 10 s",
        "encoding: 30.0 MB in 10 s, 1.0 MB/s, 20.0 MB of it done before",
    ]


def test_progress_on_a_terminal_is_a_bar_that_leaves_one_line():
    terminal = Terminal(file=io.StringIO(), width=100, force_terminal=True)
    with Bar(terminal, "encoding") as bar:
        bar.update(1e6, 2e6)
        assert bar._live is not None
        bar._live.refresh()
    text = terminal.file.getvalue()
    assert "50%" in text
    assert "1.0 MB of 2.0 MB" in text
    assert text.rstrip().splitlines()[-1].endswith("MB/s")


def test_text_is_made_harmless_and_short():
    assert harmless("a\x1b\x9b\u2066\x00b\tc\n") == "a\\x1b\\x9b\\u2066\\x00b\tc\n"
    assert one_line("a\n\n  b" + "c" * 50, 10) == "a bcccccc…"


def test_ranks_share_the_look_at_shards_and_together_miss_none(shards, corpus, tmp_path):
    """Whichever shard is gone, one rank of three finds it, and only one."""
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    (tmp_path / "a.yaml").write_text(data_of(copy, corpus))
    data = load(RunConfig, [tmp_path / "a.yaml"]).data
    for gone in sorted(copy.glob("*.tar"))[:5]:
        gone.rename(tmp_path / "aside")
        found = []
        for rank in range(3):
            try:
                open_dataset(data, rank, 3)
            except DataError as error:
                found.append(str(error))
        assert len(found) == 1
        assert gone.name in found[0]
        (tmp_path / "aside").rename(gone)
