"""What a new run begins from: a checkpoint of another run, or one for each module of an ensemble (`--from`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from pretrain.run_folder import RunFolder

_SHOWN = 6

Origin = dict[str, Any]
"""{"run", "step"} of a branch; {"modules": {NAME: {"run", "step"}}} of an ensemble whose modules were trained alone;
{"models": {MODULE.a: {"run", "step"}, …}} of a module that has a seed."""


def origin_of(words: Sequence[str], modules: Sequence[str], runs: Path, folder: RunFolder, begun: bool) -> Origin:
    """What `--from` says: RUN or RUN@STEP, or of every module of an ensemble MODULE=RUN[@STEP].

    runs: where runs are looked for. folder: of the new run. begun: whether it has, so that its origin is settled.
    """
    named = dict(word.split("=", 1) for word in words if modules and "=" in word)
    if not named:
        if len(words) > 1:
            raise ConfigError(f"--from is given {len(words)} times, but a run has one origin; keep one")
        return _settled(words[0], folder.facts().get("from"), runs, folder, begun)
    lost, more = [name for name in named if name not in modules], [word for word in words if "=" not in word]
    if lost or more:
        raise ConfigError(
            f"--from {(lost + more)[0]} names no module; write MODULE=RUN for each of {', '.join(modules)}"
        )
    absent = [name for name in modules if name not in named]
    if absent:
        raise ConfigError(f"--from says nothing of the module {absent[0]}; give each module a run, {absent[0]}=RUN")
    known = (folder.facts().get("from") or {}).get("modules", {})
    return {"modules": {name: _settled(named[name], known.get(name), runs, folder, begun) for name in modules}}


def shown(origin: Origin) -> str:
    """An origin in a few words."""
    parts = origin.get("modules") or origin.get("models") or {"": origin}
    return ", ".join(f"{name}={part['run']}@{part['step']}".removeprefix("=") for name, part in parts.items())


def _settled(word: str, known: Origin | None, runs: Path, folder: RunFolder, begun: bool) -> Origin:
    """The run and step of one origin. known: what the run has begun from."""
    name, at, step = word.rpartition("@")
    name = name if at else word
    if at and not step.isdigit():
        raise ConfigError(f"--from {word}: {step!r} is no step; write RUN or RUN@STEP, for example {name}@1000")
    other = RunFolder.find(name, runs)
    if other.path.resolve() == folder.path.resolve():
        raise ConfigError(f"--from {word} names the run itself; give the branch another run.name")
    place = str(other.path.resolve())
    if begun:
        if known is None or known.get("run") != place or (at and int(step) != known["step"]):
            began = f"from {shown(known)}" if known else "from nothing"
            raise ConfigError(
                f"run {folder.name} has begun, {began}; go on with it without --from {word}, or give the branch"
                " another run.name"
            )
        return known
    steps = sorted(other.committed_steps())
    if not steps:
        raise ConfigError(f"--from {word}: run {other.name} has no checkpoint yet; branch when it has saved one")
    if at and int(step) not in steps:
        kept = ", ".join(map(str, steps[-_SHOWN:]))
        raise ConfigError(
            f"--from {word}: run {other.name} has no checkpoint of step {int(step)}, but of {kept}; name one of them"
            " (checkpoint.keep_every says which are kept)"
        )
    # a number even where none was asked for: the other run may go on before this one saves its first checkpoint
    return {"run": place, "step": int(step) if at else steps[-1]}
