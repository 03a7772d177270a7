"""`leviathan data …`: its verbs, which import what they need when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from configs.errors import UsageError
from launcher.cli_words import Run, Words, split, verbs

data = typer.Typer(invoke_without_command=True, help="Build shards, check them, look into them, ask what a step read.")
data.callback()(verbs)

Folder = Annotated[str, typer.Argument(metavar="DIR", help="A folder of shards: data.dir.")]


@data.command("build")
def data_build(
    words: Words,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that work; left out: one a core.")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Replace shards of another build in data.dir.")] = False,
    on: Annotated[Literal["here", "ray"], typer.Option(help="Who works: processes here, or a Ray cluster.")] = "here",
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Of the Ray cluster, for example 10.0.0.1:6379.")
    ] = None,
) -> None:
    """Make the shards of a configuration in data.dir; goes on where an earlier build was stopped."""
    if on == "ray" and not address:
        raise UsageError("--on ray needs the address of a cluster; give --address, or set RAY_ADDRESS")
    from launcher.data import build_shards

    files, values = split(words)
    build_shards(files, values, workers, rebuild, address if on == "ray" else None)


@data.command("check")
def data_check(
    folder: Folder,
    length: Annotated[
        int | None, typer.Option(min=1, help="Also tell how many tokens rows of this length waste.")
    ] = None,
) -> None:
    """Read every byte of a folder of shards and compare it with the manifest; list all that is wrong."""
    from launcher.data import check_shards

    check_shards(folder, length)


@data.command("show")
def data_show(
    folder: Folder,
    source: Annotated[str | None, typer.Option(help="One source; left out: all of them.")] = None,
    split: Annotated[Literal["train", "heldout"], typer.Option(help="Text to train on, or held-out text.")] = "train",
    count: Annotated[int, typer.Option(min=1, help="Documents of each source, spread evenly.")] = 3,
) -> None:
    """Print documents as the tokenizer gives them back."""
    from launcher.data import show_samples

    show_samples(folder, source, split, count)


@data.command("explain")
def data_explain(
    run: Run, step: Annotated[int, typer.Option(help="The step, counted from 1 as the trainer prints it.")]
) -> None:
    """Name the documents that the rows of a step came from; also of a step that is still to come."""
    from launcher.data import explain_step

    explain_step(run, step)


@data.command("cluster")
def data_cluster(
    words: Words,
    into: Annotated[int, typer.Option(metavar="K", help="How many clusters, of equal shares of tokens.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for them.")],
    source: Annotated[str | None, typer.Option(help="One source; left out: all of them.")] = None,
    ids: Annotated[
        int | None, typer.Option(min=1, max=8, help="Token ids in an n-gram.", show_default="by tokenizer")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed finds the same clusters.")] = 0,
) -> None:
    """Find kinds of text where there are no labels: clusters of documents, each a source and a module."""
    from launcher.clusters import cluster_text

    files, values = split(words)
    cluster_text(files, values, into=into, source=source, out=out, ids=ids, seed=seed)
