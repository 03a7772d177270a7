"""What the verbs of the command line share: kinds of arguments, and how a list of them is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Words = Annotated[
    list[str], typer.Argument(metavar="CONFIG | KEY=VALUE", help="YAML files, later wins; then single values.")
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run under runs/, or the path of its folder.")]


def verbs(context: typer.Context) -> None:
    """Without a verb, say which there are."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Configuration files, and key=value words."""
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    return files, [word for word in words if word not in files]
