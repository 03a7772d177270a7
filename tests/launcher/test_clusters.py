"""Text without labels to the end: clustered, built, a module for each, joined, judged without the clusters' file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from configs.errors import DONE, ConfigError
from data_pipeline.build import build
from data_pipeline.clustering import CLUSTERS, CONFIG
from data_pipeline.clusters import load
from launcher.check import check_run
from launcher.clusters import cluster_text
from launcher.ensemble import train_ensemble
from launcher.prepare import prepare, resolve
from launcher.several import Supervisors
from launcher.texts import evaluate_run
from pretrain.ensemble.relevance import judged
from pretrain.run_folder import RunFolder, read_lines
from pretrain.trained import load_trained
from tests.conftest import leviathan, losses
from tests.small_ensemble import STEPS, Here, trained, write_ensemble


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration whose only source is all text, mixed; its clusters; and the runs of both."""
    place = tmp_path_factory.mktemp("clusters")
    mixed = place / "mixed"
    mixed.mkdir()
    for number, path in enumerate(sorted((corpus / "letters").iterdir()) + sorted((corpus / "lists").iterdir())):
        shutil.copy(path, mixed / f"{number * 7 % 300:03d}.txt")
    config = write_ensemble(place, place / "shards", corpus)
    text = config.read_text().replace(f"letters: {{path: {corpus / 'letters'}}}", f"web: {{path: {mixed}}}")
    text = text.replace(f"    lists: {{path: {corpus / 'lists'}}}\n", "")
    config.write_text(text.replace("modules: [letters, lists], ", "").replace("fusion: mhc, ", ""))
    cluster_text([str(config)], [], into=2, source=None, out=place / "kinds", ids=None, seed=0)
    data = resolve([config, place / "kinds" / CONFIG], [])[0].data
    build(data, Path(data.dir), workers=1)
    return place


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same for one test, whose runs are its own; they are trained within this process."""
    here = Here()
    monkeypatch.setattr(Supervisors, "train", lambda *words, **more: here.train(*words, **more))
    shutil.copytree(whole, tmp_path / "here")
    for path in (tmp_path / "here" / "duo.yaml", tmp_path / "here" / "kinds" / CONFIG):
        path.write_text(path.read_text().replace(str(whole), str(tmp_path / "here")))
    return tmp_path / "here"


def files_of(place: Path) -> list[str]:
    return [str(place / "duo.yaml"), str(place / "kinds" / CONFIG)]


def test_an_ensemble_of_clusters_needs_their_file_no_more_once_it_has_begun(place, capsys):
    files, folder = files_of(place), RunFolder(place / "runs" / "duo")
    assert train_ensemble(files, [], ranks=None, without=[]) == DONE
    model = load_trained(folder).model
    clusters = load(place / "kinds" / CLUSTERS)
    assert torch.equal(model.nearest.table, torch.from_numpy(clusters.table_HE))
    assert torch.equal(model.nearest.centres, torch.from_numpy(clusters.centres_KE))
    (place / "kinds" / CLUSTERS).unlink()
    assert train_ensemble(files, [f"train.steps={STEPS + 2}"], ranks=None, without=[]) == DONE
    assert max(losses(folder)) == STEPS + 2
    again = load_trained(folder).model
    assert torch.equal(again.nearest.table, model.nearest.table)
    evaluate_run(str(folder.path), step=None, rows=16, device="cpu")
    record = list(read_lines(folder.evals))[-1]
    for source, modules in judged(record).items():
        # some fifteen bytes of a document, whose words are in both kinds of text
        assert modules[source].relevance > 0.6, record
    branch = prepare(files, ["run.name=branch", "train.steps=12"], ranks=None, branch=[str(folder.path)], allow=[])
    assert torch.equal(load_trained(trained(branch)).model.nearest.centres, model.nearest.centres)


def test_one_cluster_left_out_leaves_the_others_their_centres(place):
    assert train_ensemble(files_of(place), [], ranks=None, without=["c0"]) == DONE
    model = load_trained(RunFolder(place / "runs" / "duo")).model
    assert model.modules_named == ["c1"]
    assert torch.equal(model.nearest.centres, torch.from_numpy(load(place / "kinds" / CLUSTERS).centres_KE[1:]))


def test_what_is_missing_or_named_otherwise_is_told_before_any_module_is_trained(place):
    files, words = files_of(place), ["model.ensemble.modules=[c0,web]", "data.sources.web.path=docs"]
    for attempt in (
        lambda: train_ensemble(files, words, ranks=None, without=[]),
        lambda: check_run(files, words, None),
        lambda: prepare(files, words, ranks=None, branch=[], allow=[]),
    ):
        with pytest.raises(ConfigError, match="has the clusters c0, c1, and the module 'web' is none of them"):
            attempt()
    with pytest.raises(ConfigError, match="no module is called 'c1'"):
        train_ensemble(files, ["model.ensemble.modules=[c0]"], ranks=None, without=[])
    (place / "kinds" / CLUSTERS).unlink()
    for attempt in (
        lambda: train_ensemble(files, [], ranks=None, without=[]),
        lambda: check_run(files, [], None),
    ):
        with pytest.raises(ConfigError, match="there is no file of clusters"):
            attempt()
    assert not (place / "runs").exists()


def test_the_command_tells_what_each_cluster_is_and_what_comes_next(whole, tmp_path):
    config = whole / "duo.yaml"
    done = leviathan("data", "cluster", config, "--into", "2", "--out", tmp_path / "kinds", "--source", "web")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    for what in ("reading", "learning", "embedding", "grouping", "writing"):
        assert sum(line.startswith(f"{what}: ") for line in lines) == 1
    rows = [line.split() for line in lines if line.startswith(("c0 ", "c1 "))]
    assert sum(int(row[1]) for row in rows) == 300
    assert "300 documents, each in one cluster" in lines
    assert lines[-1].endswith(f"leviathan ensemble {config} {tmp_path / 'kinds' / CONFIG}")
    for words, told in (
        (("--into", "2", "--out", tmp_path / "kinds"), "kinds is already there; remove it, or give another --out"),
        (("--into", "1", "--out", tmp_path / "x"), "--into 1 makes no clusters; write 2 or more"),
        (("--into", "2", "--out", tmp_path / "x", "--source", "net"), "there is no source 'net'; data.sources has web"),
    ):
        done = leviathan("data", "cluster", config, *words)
        assert done.code == 2
        assert done.err.startswith("error: ")
        assert done.err.endswith(f"{told}\n")
