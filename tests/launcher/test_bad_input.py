"""What a user can get wrong, through the real command line: a line for each mistake, an exit code, no traceback."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs.errors import DataError
from configs.load import to_yaml
from data_pipeline import tokenizer as tokenizers
from data_pipeline.build import build
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.dataset import open_dataset
from launcher.prepare import resolve
from pretrain.lease import Lease
from pretrain.run_folder import RunFolder, append_line
from tests.conftest import ROOT, Done, leviathan, tmpfs
from tests.small_run import small_config, train_small

CODES = (2, 65, 78)
HEAVY = {"torch", "deepspeed", "ray", "wandb", "webdataset"}


@pytest.fixture
def config(tmp_path: Path, shards: Path, corpus: Path) -> Path:
    return small_config(tmp_path, shards, corpus)


def line_of(path: Path, text: str) -> int:
    """The line of a file that holds `text`, from 1."""
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def change(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def refused(code: int, *words: object, mistakes: int = 1) -> str:
    """What the command line says when it refuses; every line is one mistake."""
    done = leviathan(*words)
    _is_refusal(done, code, mistakes)
    return done.err


def _is_refusal(done: Done, code: int, mistakes: int) -> None:
    assert done.code == code in CODES, done.out + done.err
    assert "Traceback" not in done.out + done.err
    lines = done.err.splitlines()
    assert len(lines) == mistakes, done.err
    assert all(line.startswith("error: ") for line in lines)


# ---- mistakes of configuration: told at once, without torch


def unknown_key(config: Path) -> tuple[list[object], str]:
    change(config, "warmup_steps: 4", "warmup_step: 4")
    where = f"{config}:{line_of(config, 'warmup_step')}"
    return [config], f"{where}: unknown key 'optim.warmup_step'; did you mean 'optim.warmup_steps'?"


def wrong_type(config: Path) -> tuple[list[object], str]:
    change(config, "depth: 2", "depth: two")
    return [config], f"{config}:{line_of(config, 'depth')}: model.depth is 'two' (text), not a whole number"


def duplicate_key(config: Path) -> tuple[list[object], str]:
    change(config, "  shard_mib: 0.05", "  shard_mib: 0.05\n  heldout: 0.2")
    second = line_of(config, "heldout: 0.2")
    return [config], f"{config}:{second}: key 'data.heldout' stands twice (first at {config}:{second - 2}); keep one"


def missing_file(config: Path) -> tuple[list[object], str]:
    return ["engine/zero4"], "no configuration file 'engine/zero4' here; did you mean 'engine/zero"


def unknown_mixer(config: Path) -> tuple[list[object], str]:
    change(config, "{name: correlation}", "{name: corelation}")
    where = f"{config}:{line_of(config, 'corelation')}"
    return [config], f"{where}: no mixer is called 'corelation'; did you mean 'correlation'?"


def rows_and_ranks(config: Path) -> tuple[list[object], str]:
    return [config, "--ranks", 3], "train.batch_rows is 8, not a multiple of 3 ranks; the nearest is 9"


def out_of_range(config: Path) -> tuple[list[object], str]:
    return [config, "optim.lr=-1"], "the word 'optim.lr=-1': optim.lr is -1; it must be > 0"


def not_a_number(config: Path) -> tuple[list[object], str]:
    return [config, "optim.lr=.nan"], "the word 'optim.lr=.nan': optim.lr is '.nan' (text), not a number"


def tabs(config: Path) -> tuple[list[object], str]:
    change(config, "  dir: ", "\tdir: ")
    return [config], f"{config}:{line_of(config, chr(9))}:"


def changed_model(config: Path) -> tuple[list[object], str]:
    folder = RunFolder(config.parent / "runs" / "small")
    folder.make()
    folder.config.write_text(to_yaml(resolve([config], [])[0]))
    append_line(folder.metrics, {"step": 5})
    return [config, "model.depth=3"], "run small began with another configuration (model.depth: 2 → 3);"


def muon_in_pieces(config: Path) -> tuple[list[object], str]:
    return [config, "optim.name=muon", "engine.zero=2"], "optim.name muon does not work with engine.zero 2; set"


def two_modules_and_no_fusion(config: Path) -> tuple[list[object], str]:
    return [config, "model.ensemble.modules=[one, two]"], "has 2 modules but fusion none; choose mhc,"


MISTAKES: list[tuple[int, Callable[[Path], tuple[list[object], str]]]] = [
    (78, unknown_key), (78, wrong_type), (78, duplicate_key), (2, missing_file), (78, unknown_mixer),
    (78, rows_and_ranks), (78, out_of_range), (78, not_a_number), (78, tabs), (78, changed_model),
    (78, muon_in_pieces), (78, two_modules_and_no_fusion),
]  # fmt: skip


@pytest.mark.parametrize(("code", "mistake"), MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_a_mistake_of_configuration_is_one_line_within_two_seconds_and_without_torch(config, code, mistake):
    words, told = mistake(config)
    command = [sys.executable, "-X", "importtime", "-m", "launcher", "train", *map(str, words)]
    before = cpu_of_children()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert cpu_of_children() - before <= 2.0
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    err = "\n".join(line for line in done.stderr.splitlines() if line not in imports)
    _is_refusal(Done(done.returncode, done.stdout, err, 0.0), code, 1)
    assert told in err
    assert imports
    assert not {line.rpartition("|")[2].strip().split(".")[0] for line in imports} & HEAVY


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_all_mistakes_of_a_file_are_told_together(config):
    change(config, "depth: 2", "depht: 2")
    change(config, "batch_rows: 8", "batch_rows: many")
    err = refused(78, "train", config, "launch.rank=2", mistakes=3)
    assert "did you mean 'model.depth'" in err
    assert "did you mean 'launch.ranks'" in err


def test_a_number_with_an_exponent_is_a_number(config):
    change(config, "lr: 5e-3", "lr: 3e-4")
    assert resolve([config], [])[0].optim.lr == 3e-4
    assert resolve([config], ["optim.lr=2E-5"])[0].optim.lr == 2e-5
    assert "optim.lr is '3e-4' (text), not a number" in refused(78, "train", config, "optim.lr='3e-4'")


# ---- mistakes that only the parts can see


def test_a_wrong_option_of_a_mixer_keeps_its_file_and_line(config):
    change(config, "{name: correlation}", "{name: correlation, options: {haeds: 2}}")
    err = refused(78, "train", config)
    where = f"{config}:{line_of(config, 'haeds')}"
    assert f"{where}: unknown key 'model.mixers[0].options.haeds'; did you mean 'model.mixers[0].options.heads'?" in err


def test_heads_that_do_not_divide_the_width_are_told_with_the_nearest_that_do(config):
    change(config, "{name: correlation}", "{name: correlation, options: {heads: 3}}")
    err = refused(78, "check", config)
    assert "model.width 16 is not a multiple of 3 heads; the nearest that fits is 2" in err


def test_a_run_that_finds_a_mistake_on_its_ranks_says_it_on_stderr_too(config):
    err = refused(65, "train", config, "model.length=60000")
    assert "has no shard of 60001 tokens" in err


def test_a_run_folder_in_use_is_refused(config):
    folder = RunFolder(config.parent / "runs" / "small")
    folder.make()
    lease = Lease(folder.path)
    lease.take()
    try:
        err = refused(78, "train", config)
    finally:
        lease.release()
    assert f"run folder {folder.path} is in use by process {os.getpid()} on " in err
    assert "stop it with `leviathan stop small` or choose another run.name" in err
    assert not folder.config.exists()


# ---- text and shards


def text_config(folder: Path, files: dict[str, bytes], policy: str = "replace") -> Path:
    (folder / "text").mkdir()
    for name, content in files.items():
        (folder / "text" / name).write_bytes(content)
    path = folder / "text.yaml"
    path.write_text(
        f"run: {{dir: {folder / 'runs'}}}\ndata:\n  dir: {folder / 'shards'}\n  unicode_errors: {policy}\n"
        f"  sources: {{odd: {{path: {folder / 'text'}}}}}\nmodel: {{length: 512, mixers: [{{name: attention}}]}}\n"
    )
    return path


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "holds none of .txt, .jsonl"),
        ({"a.txt": b" \n\t", "b.txt": b""}, "source 'odd' is empty: "),
    ],
    ids=["no files", "only whitespace"],
)
def test_a_corpus_without_text_is_told(tmp_path, files, told):
    assert told in refused(65, "data", "build", text_config(tmp_path, files), "--workers", 1)


def test_text_that_is_not_there_is_told_with_the_nearest_name(config, corpus):
    change(config, f"{corpus / 'letters'}", f"{corpus / 'leters'}")
    err = refused(65, "data", "build", config, f"data.dir={config.parent / 'new'}")
    assert f"no such file or folder: {corpus / 'leters'}; did you mean {corpus / 'letters'}?" in err


def test_a_corpus_shorter_than_a_row_is_told(tmp_path):
    config = text_config(tmp_path, {"a.txt": b"a few words"})
    data = resolve([config], [])[0].data
    build(data, Path(data.dir), workers=1)
    err = refused(65, "check", config)
    assert "source 'odd' has no shard of 513 tokens (the longest has 10), so not one row" in err


@pytest.mark.parametrize(("policy", "code"), [("replace", 0), ("skip", 0), ("fail", 65)])
def test_text_that_is_not_utf8_is_counted_and_handled_as_the_policy_says(tmp_path, policy, code):
    files = {f"{number}.txt": f"document {number}".encode() for number in range(5)}
    config = text_config(tmp_path, files | {"latin.txt": "caf\xe9".encode("latin-1")}, policy)
    done = leviathan("data", "build", config, "--workers", 1)
    assert done.code == code
    if code:
        _is_refusal(done, 65, 1)
        assert "document 'latin.txt' of source 'odd' is not UTF-8; save it as UTF-8" in done.err
        return
    row = next(line.split() for line in done.out.splitlines() if line.startswith("odd "))
    assert (row[1], row[-3]) == ({"replace": "6", "skip": "5"}[policy], "1")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.unlink(), "is missing, the manifest says"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1024]), "bytes, the manifest says"),
    ],
    ids=["missing", "truncated"],
)
def test_a_shard_that_is_not_whole_is_found_before_a_run_begins(config, shards, tmp_path, damage, told):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    damage(sorted(copy.glob("*.tar"))[3])
    err = refused(65, "check", config, f"data.dir={copy}")
    assert told in err
    assert "`leviathan data check` lists all that are wrong" in err


# ---- a tokenizer that is not the one of the shards


@pytest.fixture(scope="module")
def pieces(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the letters in sentencepiece pieces, and their configuration."""
    folder = tmp_path_factory.mktemp("pieces")
    data = DataConfig(dir=str(folder / "shards"), tokenizer="sp:290", heldout=0.1, sources={"letters": _source(corpus)})
    build(data, folder / "shards", workers=1)
    (folder / "p.yaml").write_text(
        f"run: {{name: p, dir: {folder / 'runs'}}}\ndata: {{dir: {folder / 'shards'}, tokenizer: 'sp:290',"
        f" heldout: 0.1, sources: {{letters: {{path: {corpus / 'letters'}}}}}}}\n"
        "model: {width: 16, depth: 1, length: 32, mixers: [{name: attention}]}\ntrain: {batch_rows: 8, steps: 5}\n"
    )
    return folder


def _source(corpus: Path) -> SourceConfig:
    return SourceConfig(path=str(corpus / "letters"))


def another_model(folder: Path, size: int) -> None:
    """A tokenizer of `size` pieces made from other text, saved whole."""
    text = [
        " ".join(f"wave {n} breaks on stone {n * 7}" for n in range(start, start + 60)) for start in range(0, 3000, 60)
    ]
    tokenizers.make(f"sp:{size}", text).save(folder)


def one_piece(folder: Path) -> None:
    """One letter of one piece is another, and the header agrees with the file."""
    path = folder / tokenizers.MODEL
    model = path.read_bytes()
    assert b"harbour" in model
    edited = tokenizers.PieceTokenizer("sp:290", model.replace(b"harbour", b"harbeur", 1), "here")
    edited.save(folder)


@pytest.mark.parametrize(
    ("swap", "before_a_run"),
    [
        (lambda folder: another_model(folder, 290), True),
        (lambda folder: another_model(folder, 280), False),
        (one_piece, False),
    ],
    ids=["same size", "other size", "one piece edited"],
)
def test_a_tokenizer_that_is_not_the_one_of_the_shards_is_refused(pieces, tmp_path, swap, before_a_run):
    copy = tmp_path / "shards"
    shutil.copytree(pieces / "shards", copy)
    swap(copy)
    words = ("check", pieces / "p.yaml", f"data.dir={copy}") if before_a_run else ("data", "check", copy)
    err = refused(65, *words)
    assert f"the tokenizer in {copy} " in err
    assert "is not the one its shards were made with" in err


def test_an_edited_tokenizer_file_alone_is_refused(pieces, tmp_path):
    copy = tmp_path / "shards"
    shutil.copytree(pieces / "shards", copy)
    model = (copy / tokenizers.MODEL).read_bytes()
    (copy / tokenizers.MODEL).write_bytes(model.replace(b"harbour", b"harbeur", 1))
    assert "is not the one that was saved: found a model with sha256 " in refused(65, "data", "check", copy)


def test_shards_of_another_tokenizer_than_configured_are_refused(config):
    with pytest.raises(DataError, match=r"data\.tokenizer is 'sp:300', but the shards in"):
        open_dataset(resolve([config], ["data.tokenizer=sp:300"])[0].data)


# ---- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    with tmpfs(tmp_path / "disk", "128k") as place:
        yield place


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_checkpoint_that_does_not_fit_the_disk_is_told_before_step_one(config, small_disk, verb):
    err = refused(78, verb, config, f"run.dir={small_disk}", "engine.name=torch")
    assert "a checkpoint of this run needs 214.6 kB (a fifth of it spare), but" in err
    assert "free; free some, or set run.dir to a larger disk" in err
    assert (
        not (small_disk / "small" / "metrics.jsonl").exists()
        or not (small_disk / "small" / "metrics.jsonl").read_bytes()
    )


def test_a_place_that_may_not_be_written_is_told(config):
    if os.geteuid() != 0:
        pytest.skip("asks as root, who may write everywhere but in a place like /proc")
    err = refused(78, "data", "build", config, "data.dir=/proc/nothing", "--workers", 1)
    assert "data.dir /proc/nothing cannot be written" in err


def test_a_branch_from_a_run_or_a_step_that_is_not_there_is_told(config):
    folder = train_small(config, "train.steps=2", "checkpoint.every=1")
    assert json.loads((folder.path / "run.json").read_bytes())["steps"] == 2
    runs = f"run.dir={folder.path.parent}"
    assert "there is small" in refused(2, "train", config, runs, "run.name=b", "--from", "smal")
    assert "'x' is no step" in refused(78, "train", config, runs, "run.name=b", "--from", "small@x")
