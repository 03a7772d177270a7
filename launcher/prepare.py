"""From files and words to a run folder that is ready to start: everything resolved, checked and frozen."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, LeviathanError
from configs.load import Layers, build, load, read, to_yaml
from data_pipeline.files import write_whole
from launcher.branch import Origin, origin_of
from launcher.config import LaunchConfig
from launcher.runs import check_not_in_use
from pretrain.config import (
    PartConfig,
    RunConfig,
    check_expert_ranks,
    may_change,
    micro_rows,
    must_match,
    short_hash,
    total_steps,
)
from pretrain.registry import Registry
from pretrain.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
_ELSEWHERE = {"launch", "engine", "log"}
"""Sections that say where and how a run is done, not what is trained."""

Changes = dict[str, tuple[Any, Any]]
"""Keys by dotted path, each with what it was and what it is now."""


@dataclass(frozen=True)
class Prepared:
    """A run that can start."""

    config: RunConfig
    launch: LaunchConfig
    folder: RunFolder


def resolve(files: Sequence[str | Path], words: Sequence[str]) -> tuple[RunConfig, LaunchConfig]:
    """What the files and words say, checked; all mistakes at once. Raises ConfigError."""
    config, launch, layers = _parse(files, words)
    _check_parts(config, layers)
    return config, launch


def _parse(files: Sequence[str | Path], words: Sequence[str]) -> tuple[RunConfig, LaunchConfig, Layers]:
    """What the files and words say, options of mixers still unchecked: for that their files must be imported."""
    layers = read(files, words)
    launch_layers = Layers(layers.tree.pop("launch", {}), _below(layers, "launch"))
    mistakes: list[str] = []
    config = _attempt(mistakes, lambda: build(RunConfig, layers))
    launch = _attempt(mistakes, lambda: build(LaunchConfig, launch_layers, ("launch",)))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    assert config is not None and launch is not None
    return config, launch, layers


def _check_parts(config: RunConfig, layers: Layers) -> None:
    """Raise ConfigError with every mistake in the names and options of mixers, channel mixer and stack."""
    mistakes: list[str] = []
    for number, part in enumerate(config.model.mixers):
        _check_options(mistakes, layers, ("model", "mixers", number), part)
    _check_options(mistakes, layers, ("model", "channel"), config.model.channel)
    _check_options(mistakes, layers, ("model", "stack"), config.model.stack)
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def prepare(
    files: Sequence[str | Path], words: Sequence[str], *, ranks: int | None, branch: Sequence[str], allow: Sequence[str]
) -> Prepared:
    """A run folder for these files and words: a new one, or the one of an earlier start, to go on with.

    ranks: instead of launch.ranks. branch: what a new run begins from, see `origin_of`. allow: keys that may differ
    from the earlier start although they make it another run.
    """
    config, launch, layers = _parse(files, words)
    if ranks is not None:
        launch = launch.model_copy(update={"ranks": ranks})
    check_rows(config, launch.ranks)
    _check_parts(config, layers)
    folder, runs = run_folder(config, files), Path(config.run.dir).expanduser()
    begun = has_begun(folder)
    origin = origin_of(branch, config.model.ensemble.modules, runs, folder, begun) if branch else None
    if origin is not None and not begun and origin.get("step", 0) >= total_steps(config):
        raise ConfigError(
            f"the branch begins at step {origin['step']:,} and ends at step {total_steps(config):,}, so it would train"
            " nothing; raise train.steps, which counts from the origin's first step"
        )
    if origin is None or "run" not in origin:
        check_clusters(config, folder)
    return make_ready(config, launch, folder, origin=origin, allow=allow)


def make_ready(
    config: RunConfig, launch: LaunchConfig, folder: RunFolder, *, origin: Origin | None = None,
    allow: Sequence[str] = (), verb: str = "train",
) -> Prepared:  # fmt: skip
    """The folder of a run whose configuration is checked. origin: what a new run begins from. verb: of the command that
    goes on with it."""
    # before anything is written: the run that has the folder reads it at every restart
    check_not_in_use(folder)
    config, copies = own_mixers(config, folder)
    changes = changes_since(folder, config, allow) if has_begun(folder) else {}
    if changes:
        folder.event("change", f"configuration changed: {_shown(changes)}", changes=changes)
    folder.make()
    for target, code in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, code)
    new = {"run_id": uuid.uuid4().hex, "name": folder.name, "created": time.time()} if not folder.facts() else {}
    if origin is not None:
        new["from"] = origin
    facts = {"steps": total_steps(config), "ranks": launch.ranks, "verb": verb, "code": _code_version(folder)}
    folder.set_facts(**new, **facts)
    write_whole(folder.config, to_yaml(config).encode())
    write_whole(folder.launch, to_yaml(launch).encode())
    folder.stop_request.unlink(missing_ok=True)
    return Prepared(config, launch, folder)


def run_folder(config: RunConfig, files: Sequence[str | Path]) -> RunFolder:
    """Where a run of this configuration lies: under its name, or one of a file and a hash of what must not change: of
    the last file that says what is trained, so that the run is the same one wherever it is done."""
    name = config.run.name or f"{_naming(files)}-{short_hash(_placed(config, _by_content))}"
    return RunFolder(Path(config.run.dir).expanduser() / name)


def _naming(files: Sequence[str | Path]) -> str:
    """What the file is called after which a run is."""
    telling = [file for file in files if read([file]).tree.keys() - _ELSEWHERE]
    return Path((telling or files)[-1]).stem if files else "run"


def _by_content(file: Path) -> Path:
    """A name for a file of the user's own: the same wherever it lies, another once it says something else."""
    return Path(hashlib.sha256(file.read_bytes()).hexdigest()[:8], file.name) if file.is_file() else file


def has_begun(folder: RunFolder) -> bool:
    """Whether a run has taken a step, so that what it is trained on and with is settled."""
    return any(path.exists() and path.stat().st_size for path in (folder.metrics,)) or any(
        folder.checkpoints.glob("step_*")
    )


def check_rows(config: RunConfig, ranks: int) -> None:
    """Raise ConfigError where the global batch or the experts cannot be dealt to the ranks."""
    batch, micro = config.train.batch_rows, micro_rows(config, ranks)
    check_expert_ranks(config.engine.expert_parallel, ranks)
    if batch % ranks:
        near = max(1, round(batch / ranks)) * ranks
        raise ConfigError(f"train.batch_rows is {batch}, not a multiple of {ranks} ranks; the nearest is {near}")
    share = batch // ranks
    if share % micro:
        fits = max(d for d in range(1, micro + 1) if share % d == 0)
        raise ConfigError(
            f"train.micro_rows is {micro}, which does not divide the {share} rows of a rank; the nearest is {fits}"
        )


def check_clusters(config: RunConfig, folder: RunFolder) -> None:
    """Raise ConfigError or DataError where an ensemble that has not begun lacks the clusters it is to begin with, or
    modules are not these clusters. What has begun has them in its checkpoints."""
    ensemble = config.model.ensemble
    if ensemble.fusion == "clusters" and not has_begun(folder):
        from data_pipeline import clusters

        path = Path(ensemble.clusters.file or "").expanduser()
        clusters.check_names(ensemble.modules, clusters.load(path).facts.names, path, every=True)


def most_ranks(config: RunConfig, most: int) -> int:
    """The most ranks, up to `most`, to which the global batch can be dealt. Raises ConfigError where there are none."""
    reasons = []
    for ranks in range(most, 0, -1):
        try:
            check_rows(config, ranks)
            return ranks
        except ConfigError as error:
            reasons.append(str(error))
    raise ConfigError(f"no number of ranks up to {most} will do: {reasons[0]}")


def _below(layers: Layers, name: str) -> dict[Any, Any]:
    return {key[1:]: origin for key, origin in layers.origins.items() if key[:1] == (name,)}


def _attempt(mistakes: list[str], make: Any) -> Any:
    try:
        return make()
    except ConfigError as error:
        mistakes += str(error).splitlines()
        return None


def _check_options(mistakes: list[str], layers: Layers, key: tuple[str | int, ...], part: PartConfig) -> None:
    """Have a part's own configuration judge its options. That needs its file and so torch: only where it matters."""
    kind, folder = {"channel": ("channel mixer", "channels"), "stack": ("stack", "stacks")}.get(
        str(key[-1]), ("mixer", "mixers")
    )
    if part.file is None:
        parts = Registry[Any](kind, ROOT / "pretrain" / folder, f"pretrain.{folder}")
        if part.name not in parts.names():
            # names are a list of files: a wrong one is told without importing any
            wrong: list[str] = []
            _attempt(wrong, lambda: parts.entry(part.name))
            mistakes += [f"{layers.origin((*key, 'name'))}: {line}" for line in wrong]
            return
        if not part.options:
            return
    from pretrain import channel, mixer, stack

    registries: dict[str, Registry[Any]] = {
        "mixers": mixer.REGISTRY,
        "channels": channel.REGISTRY,
        "stacks": stack.REGISTRY,
    }
    place = layers.origin((*key, "name"))
    try:
        try:
            entry = registries[folder].entry(part.name, part.file)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        below = layers.under((*key, "options")) if part.options else Layers()
        build(entry.config, below, (*key, "options"))
    except ConfigError as error:
        mistakes += str(error).splitlines()
    except LeviathanError:
        raise
    except Exception as error:
        text = f"the options of the {kind} {part.name!r} cannot be checked ({type(error).__name__}: {error})"
        mistakes.append(f"{place}: {text.splitlines()[0]}")


def changes_since(folder: RunFolder, config: RunConfig, allow: Sequence[str] = ()) -> Changes:
    """What a run's configuration has become since it began, key by key. Raises ConfigError for what must not change."""
    # the folder of a run may have been moved, so files are compared by their content's hash and their name alone
    old, config = (_placed(c, lambda file: Path(*file.parts[-2:])) for c in (load(RunConfig, [folder.config]), config))
    differs = _difference(must_match(old), must_match(config))
    refused = {path: change for path, change in differs.items() if path not in allow}
    if refused:
        raise ConfigError(
            f"run {folder.name} began with another configuration ({_shown(refused)}); go on with the old one, give this"
            f" one another run.name, or allow it with --allow {next(iter(refused))}"
        )
    return differs | _difference(may_change(old), may_change(config))


def _shown(changes: Changes) -> str:
    return "; ".join(f"{path}: {_show(was)} → {_show(now)}" for path, (was, now) in changes.items())


def _difference(old: dict[str, Any], new: dict[str, Any]) -> Changes:
    absent = "absent"
    return {
        path: (old.get(path, absent), new.get(path, absent))
        for path in dict.fromkeys([*old, *new])
        if old.get(path, absent) != new.get(path, absent)
    }


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def own_mixers(config: RunConfig, folder: RunFolder) -> tuple[RunConfig, dict[Path, bytes]]:
    """The configuration as the run folder has it: parts of the user's own lie there, in a folder named by their
    content, so that every node has them and a changed one is another mixer. Also what to write there, by path."""
    copies: dict[Path, bytes] = {}

    def place(file: Path) -> Path:
        code = file.read_bytes()
        target = (folder.path / "mixers" / hashlib.sha256(code).hexdigest()[:8] / file.name).resolve()
        copies[target] = code
        return target

    return _placed(config, place), copies


def _placed(config: RunConfig, place: Callable[[Path], Path]) -> RunConfig:
    """The configuration with every file of the user's own where `place` says."""

    def move(part: PartConfig) -> PartConfig:
        return part if part.file is None else part.model_copy(update={"file": str(place(Path(part.file)))})

    model = config.model
    parts = {"mixers": tuple(map(move, model.mixers)), "channel": move(model.channel), "stack": move(model.stack)}
    return config.model_copy(update={"model": config.model.model_copy(update=parts)})


def _code_version(folder: RunFolder) -> dict[str, Any]:
    """The commit that runs, and what differs from it, kept as code.patch."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": None}
    patch = git("diff", "HEAD") or ""
    if patch:
        write_whole(folder.path / "code.patch", patch.encode())
    return {"commit": commit.strip(), "dirty": bool(patch)}
