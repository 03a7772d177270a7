"""`leviathan data cluster`: text without labels becomes sources, one for each kind that is found in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console as Terminal
from rich.table import Table

from data_pipeline.clustering import CONFIG, Cluster, cluster
from data_pipeline.files import human_bytes
from launcher.prepare import resolve
from launcher.screen import Bar, make_table, make_terminal, one_line

_STEPS = {"learning", "grouping"}


def cluster_text(
    files: Sequence[str], words: Sequence[str], *, into: int, source: str | None, out: Path, ids: int | None, seed: int
) -> None:
    """Group the documents of a configuration's sources into `out`, with a bar for each pass and a table at the end."""
    config, _ = resolve(files, words)
    out, terminal = out.expanduser(), make_terminal()
    passes = _Passes(terminal)
    try:
        made = cluster(config.data, out, into=into, source=source, ids=ids, seed=seed, progress=passes.tell)
    except BaseException:
        passes.close(finished=False)
        raise
    passes.close()
    terminal.print()
    terminal.print(_about(made.clusters))
    empty = f"; {made.empty:,} empty ones are in none" if made.empty else ""
    damaged = f"; {made.unicode_errors:,} were not UTF-8" if made.unicode_errors else ""
    terminal.print(f"\n{made.documents:,} documents, each in one cluster{empty}{damaged}", soft_wrap=True)
    again = " ".join([*files, str(out / CONFIG), *words])
    terminal.print(f"Next: leviathan data build {again} | leviathan ensemble {again}", soft_wrap=True)


class _Passes:
    """A bar for the pass that is under way."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal, self._what, self._bar = terminal, "", Bar(terminal, "planning")

    def tell(self, what: str, done: float, total: float) -> None:
        """Show it; another pass closes the bar of the one before."""
        if what != self._what:
            self.close()
            show = (lambda steps: f"{steps:.3g} steps") if what in _STEPS else human_bytes
            self._what, self._bar = what, Bar(self._terminal, what, show=show)
        self._bar.update(done, total)

    def close(self, finished: bool = True) -> None:
        """End the bar."""
        self._bar.close(finished)


def _about(clusters: Sequence[Cluster]) -> Table:
    """What each cluster is: how much, of which sources, and how its most central document begins."""
    table = make_table("cluster", ">documents", ">text", ">tokens", ">distance", "sources", "most central document")
    for one in clusters:
        shares = sorted(one.shares.items(), key=lambda pair: -pair[1])
        of = ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)
        table.add_row(
            one.name, f"{one.documents:,}", human_bytes(one.text_bytes), f"{one.tokens:,}", f"{one.distance:.3f}", of,
            one_line(one.central, 120),
        )  # fmt: skip
    return table
