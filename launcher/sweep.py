"""A sweep: a run for each value of a key, or for each combination of several keys' values, under names that say which.

Each is a run of its own, with its own job, checkpoints and mending; all that joins them is how they were asked for.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from configs.errors import UsageError
from launcher.prepare import resolve, run_folder

_PIECE = re.compile(r"""[^,\[\]{}'"]+|'[^']*'|"[^"]*"|[,\[\]{}]|['"]""")
_MARK = "sweep."
_PLAIN = re.compile(r"[^A-Za-z0-9._]+")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that hold for all runs, and KEY=A,B,... of each `sweep.KEY=A,B,...`."""
    sweeps = [word.removeprefix(_MARK) for word in words if word.startswith(_MARK)]
    return [word for word in words if not word.startswith(_MARK)], sweeps


def runs_of(files: Sequence[str], words: Sequence[str], sweeps: Sequence[str]) -> list[list[str]]:
    """What to add to `words` for each run. sweeps: each KEY=A,B,...

    The name of a run is what it would be without the sweep, and then keys and values. Raises ConfigError or UsageError
    for a mistake in any of them, so that none is begun.
    """
    base, _ = resolve(files, words)
    name = run_folder(base, files).name
    keys = [_values(sweep) for sweep in sweeps]
    found: dict[str, list[str]] = {}
    for chosen in itertools.product(*keys):
        parts = [f"{key.split('.')[-1]}-{_PLAIN.sub('-', value).strip('-')}" for key, value in chosen]
        each = [*(f"{key}={value}" for key, value in chosen), f"run.name={'-'.join([name, *parts])}"]
        resolve(files, [*words, *each])
        twin = found.setdefault(each[-1], each)
        if twin is not each:
            raise UsageError(f"{' '.join(twin[:-1])} and {' '.join(each[:-1])} would be one run, {each[-1]}; drop one")
    return list(found.values())


def _values(sweep: str) -> list[tuple[str, str]]:
    """A key with each of its values; a comma within brackets or quotes does not part two."""
    key, _, text = sweep.partition("=")
    values, depth = [""], 0
    for piece in _PIECE.findall(text):
        depth += (piece in ("[", "{")) - (piece in ("]", "}"))
        if piece == "," and depth == 0:
            values.append("")
        else:
            values[-1] += piece
    values = [value.strip() for value in values]
    if not key or not all(values) or len(values) < 2:
        raise UsageError(f"sweep.{sweep} names no values to choose from; write for example sweep.optim.lr=1e-3,3e-4")
    return [(key, value) for value in values]
