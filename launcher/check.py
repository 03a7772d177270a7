"""`leviathan check`: everything that can be known of a run before it starts, and everything that would stop it.

Nothing is trained and nothing is written: the model is built without memory, shards are opened and their order asked.
What is wrong is told all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import psutil
import torch
from rich.table import Table

from configs.errors import ConfigError, DataError, LeviathanError
from data_pipeline import tokenizer as tokenizers
from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.files import free_bytes, human_bytes
from data_pipeline.order import Order
from data_pipeline.places import public
from launcher.prepare import changes_since, check_clusters, check_rows, has_begun, own_mixers, resolve, run_folder
from launcher.runs import check_not_in_use
from launcher.screen import cores, make_facts, make_table, make_terminal, told
from pretrain.activations import activation_bytes
from pretrain.amounts import short_number
from pretrain.config import RunConfig, micro_rows, shape_of, shaped_modules, tokens_per_step, total_steps
from pretrain.cost import cost_of, training_bytes
from pretrain.mixer import TokenMixer
from pretrain.model import Model
from pretrain.models.build import build
from pretrain.ops.expert_parallel import expert_parameters, shard_experts
from pretrain.optim import STATE_KEYS, lr_scale, param_groups
from pretrain.parallel import Ranks
from pretrain.run_folder import RunFolder

T = TypeVar("T")

_LEVELS = "▁▂▃▄▅▆▇█"
_SKETCH = 48
_MANY_EPOCHS = 4.0
"""Passes over the same text after which more of them teach noticeably less (Muennighoff et al., arXiv 2305.16264)."""


@dataclass
class Findings:
    """What is wrong, and what somebody should know. Problems stop a run; warnings do not."""

    problems: list[LeviathanError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def attempt(self, make: Callable[[], T]) -> T | None:
        """What `make` gives, or None and its mistake noted."""
        try:
            return make()
        except (ConfigError, DataError) as error:
            self.problems.append(error)
            return None

    def raise_problems(self) -> None:
        """Raise all problems as one error, of the configuration if any of them is, else of the data."""
        if self.problems:
            kind = ConfigError if any(isinstance(p, ConfigError) for p in self.problems) else DataError
            raise kind("\n".join(dict.fromkeys(line for p in self.problems for line in str(p).splitlines())))


def check_run(files: Sequence[str], words: Sequence[str], ranks: int | None) -> None:
    """Print what a run would be. Raises ConfigError or DataError with one line for each thing that would stop it."""
    config, launch = resolve(files, words)
    world, found, terminal = ranks or launch.ranks, Findings(), make_terminal()
    folder = run_folder(config, files)
    found.attempt(lambda: check_rows(config, world))
    found.attempt(lambda: check_clusters(config, folder))
    dataset = found.attempt(lambda: open_dataset(config.data))
    vocab = found.attempt(lambda: _vocab(config, dataset))
    model = found.attempt(lambda: _model(config, vocab)) if vocab is not None else None
    shared = config.engine.expert_parallel
    if vocab is not None and shared > 1:
        found.attempt(lambda: shard_experts(_model(config, vocab), shared, Ranks(0, world, 0, "here")))
    _check_folder(found, config, folder, dataset)
    tables: list[Table] = []
    if model is not None:
        tables.append(_about_model(config, model))
        tables.append(_about_memory(found, config, model, world))
    if dataset is not None:
        tables += _about_data(found, config, dataset)
    tables.append(_about_plan(found, config, world))
    if model is not None:
        tables.append(_about_disk(found, config, model, folder))
    state = "goes on" if has_begun(folder) else "new"
    terminal.print(f"run {folder.name} in {folder.path} ({state}), {world} {_plural(world, 'rank')}\n", soft_wrap=True)
    for table in tables:
        terminal.print(table)
        terminal.print()
    for warning in found.warnings:
        terminal.print(told(f"warning: {warning}", "yellow"), soft_wrap=True)
    if found.problems:
        terminal.print(told(f"not ready: {len(found.problems)} {_plural(len(found.problems), 'problem')}", "bold red"))
        found.raise_problems()
    extra = f" --ranks {ranks}" if ranks is not None else ""
    verb = "ensemble" if len(config.model.ensemble.modules) > 1 else "train"
    ready = f"ready: leviathan {verb} {' '.join([*files, *words])}{extra}"
    terminal.print(told(ready, "bold green"), soft_wrap=True)


def _vocab(config: RunConfig, dataset: Dataset | None) -> int:
    """The size of the vocabulary: the shards', or what the configuration says while there are none."""
    if dataset is not None:
        return dataset.tokenizer.vocab
    spec = config.data.tokenizer
    return int(spec.partition(":")[2]) if tokenizers.is_trained(spec) else tokenizers.make(spec, []).vocab


def _model(config: RunConfig, vocab: int) -> Model:
    """The model without memory. A mixer file of the user's own may raise anything; that is a mistake of its author."""
    try:
        return build(config.model, vocab)
    except LeviathanError:
        raise
    except Exception as error:
        raise ConfigError(f"the model cannot be built ({type(error).__name__}: {error}); see its mixers") from None


def _about_model(config: RunConfig, model: Model) -> Table:
    cost, shape = cost_of(model), config.model
    blocks = [shape.mixers[layer % len(shape.mixers)].name for layer in range(shape.depth)]
    table = make_facts("model")
    table.add_row("parameters", f"{cost.parameters:,} ({cost.embedding_parameters:,} of them in embeddings)")
    table.add_row("shape", f"width {shape.width}, rows of {shape.length:,} tokens, vocabulary {model.vocab:,}")
    modules = shape.ensemble.modules
    if modules:
        told = f"{', '.join(modules)}: two models each, fusion {shape.ensemble.fusion}"
        own = {name: shape_of(shape, name) for name in shaped_modules(shape)}
        table.add_row("modules", "; ".join([told, *(f"{m} is {w} wide, {d} deep" for m, (w, d) in own.items())]))
    if modules or any(isinstance(module, TokenMixer) for module in model.modules()):
        table.add_row("blocks", f"{_runs(blocks)}; channel mixer {shape.channel.name}, {shape.norm}, {shape.positions}")
    again = f", run {shape.wrap.passes} times" if shape.wrap.passes > 1 else ""
    table.add_row("stack", f"{shape.stack.name}{again}")
    tokens = total_steps(config) * tokens_per_step(config)
    whole = f"{cost.flops_per_token * tokens:.2e}"
    table.add_row("training", f"{short_number(cost.flops_per_token)} FLOPs a token, {whole} in all")
    table.add_row("decoding", f"{human_bytes(cost.state_bytes)} of state for {shape.length:,} tokens (bf16)")
    return table


def _runs(names: list[str]) -> str:
    """`12 × (correlation, attention)` for twelve times these two."""
    for size in range(1, len(names) + 1):
        if names == (names[:size] * (len(names) // size + 1))[: len(names)] and len(names) % size == 0:
            unit = names[0] if size == 1 else f"({', '.join(names[:size])})"
            return f"{len(names) // size} × {unit}" if size < len(names) else ", ".join(names)
    return ", ".join(names)


def _about_memory(found: Findings, config: RunConfig, model: Model, world: int) -> Table:
    """What one rank holds, beside what this machine has."""
    engine, rows = config.engine, micro_rows(config, world)
    state = training_bytes(cost_of(model).parameters, engine, world, expert_parameters(model))
    try:
        kept: int | None = activation_bytes(
            config.model, model.vocab, rows, bf16=engine.precision == "bf16", recompute=engine.activation_checkpointing
        )
    except Exception as error:  # a mixer of the user's own need not run without memory
        kept = None
        found.warnings.append(f"activations could not be counted ({type(error).__name__}: {error})")
    table = make_facts("memory of one rank")
    sharding = f"{engine.name}, ZeRO-{engine.zero}" if engine.name != "torch" else "torch"
    table.add_row("weights, gradients, optimizer", f"{human_bytes(state)} ({sharding}, {engine.precision})")
    if kept is not None:
        how = "blocks run again" if engine.activation_checkpointing else "everything kept"
        table.add_row("activations", f"{human_bytes(kept)} for {rows} {_plural(rows, 'row')} at once ({how}; counted)")
    place, there = _room(config, world)
    table.add_row("there is", f"{human_bytes(there)} a rank on {place}")
    if state + (kept or 0) > there:
        found.warnings.append(
            f"a rank needs about {human_bytes(state + (kept or 0))}, and {place} has {human_bytes(there)} for each;"
            " lower train.micro_rows, raise engine.zero, or set engine.activation_checkpointing=true"
        )
    return table


def _room(config: RunConfig, world: int) -> tuple[str, int]:
    """What a rank runs on here, and the memory it may have."""
    if config.engine.device != "cpu" and torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        return f"its {facts.name}", int(facts.total_memory)
    return "this machine's CPU", psutil.virtual_memory().total // world


def _about_data(found: Findings, config: RunConfig, dataset: Dataset) -> list[Table]:
    """What there is of each source, and how often the run will read it."""
    data, manifest = config.data, dataset.manifest
    orders = {name: found.attempt(partial(_order, config, dataset, name)) for name in data.sources}
    table = make_table(
        "source", ">share", ">tokens", ">rows an epoch", ">rows of the run", ">epochs", ">held-out tokens",
        title=f"data in {public(data.dir)}: {manifest.table.num_rows:,} shards, tokenizer {manifest.tokenizer.spec}",
    )  # fmt: skip
    weights = {name: source.weight for name, source in data.sources.items()}
    rows = total_steps(config) * config.train.batch_rows
    whole = None if None in orders.values() else found.attempt(partial(_order, config, dataset, *weights))
    counts = whole.counts(rows) if whole is not None else [None] * len(weights)
    for (name, order), count in zip(orders.items(), counts):
        epoch = order.epoch_rows(0) if order is not None else 0
        epochs = count / epoch if count is not None and epoch else None
        table.add_row(
            name, f"{weights[name] / sum(weights.values()):.1%}", f"{manifest.total('tokens', name, 'train'):,}",
            f"{epoch:,}", "–" if count is None else f"{count:,}", "–" if epochs is None else f"{epochs:.2f}",
            f"{manifest.total('tokens', name, 'heldout'):,}",
        )  # fmt: skip
        if epochs is not None and epochs > _MANY_EPOCHS:
            found.warnings.append(
                f"the run reads source {name} {epochs:.1f} times; beyond {_MANY_EPOCHS:.0f} passes the same text"
                " teaches less each time, so give it more text, a lower weight, or fewer steps"
            )
    heldout = sum(manifest.total("tokens", name, "heldout") for name in weights)
    if config.eval.every and heldout < 2:
        found.problems.append(
            DataError(f"eval.every is {config.eval.every}, but the shards hold no held-out text; set eval.every=0")
        )
    return [table]


def _order(config: RunConfig, dataset: Dataset, *names: str) -> Order:
    weights = {name: config.data.sources[name].weight for name in names}
    return Order(
        dataset.manifest, length=config.model.length, seed=config.run.seed, weights=weights, window=config.data.window
    )


def _about_plan(found: Findings, config: RunConfig, world: int) -> Table:
    """Steps, how a step is cut, and the learning rate over the run."""
    train, steps, optim = config.train, total_steps(config), config.optim
    batch_tokens, micro = tokens_per_step(config), micro_rows(config, world)
    share = max(1, train.batch_rows // world)
    table = make_facts("plan")
    table.add_row("steps", f"{steps:,} of {batch_tokens:,} tokens, {short_number(steps * batch_tokens)} tokens in all")
    if train.batch_rows % world == 0 and share % micro == 0:
        pieces = f"{micro} at once (accumulation {share // micro})"
        table.add_row("a step", f"{train.batch_rows} rows: {share} a rank, {pieces}")
    scale = lr_scale(optim, steps)
    at = [scale(round(n * (steps - 1) / (_SKETCH - 1))) for n in range(_SKETCH)]
    top = max(at)
    sketch = "".join(_LEVELS[min(len(_LEVELS) - 1, int(value / top * len(_LEVELS)))] for value in at)
    table.add_row("learning rate", sketch)
    warmup = f"{optim.warmup_steps:,} steps of warm-up to {optim.lr * top:.2e}, then {optim.schedule}"
    table.add_row("", f"{optim.name}: {warmup}, {optim.lr * scale(steps - 1):.2e} at the end")
    if optim.warmup_steps >= steps:
        found.warnings.append(f"optim.warmup_steps {optim.warmup_steps} is not less than the {steps} steps of the run")
    if config.checkpoint.every > steps:
        found.warnings.append(
            f"checkpoint.every is {config.checkpoint.every}, so of these {steps} steps only the last is saved"
        )
    _check_device(found, config, world)
    return table


def _check_device(found: Findings, config: RunConfig, world: int) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.engine.device == "cuda" and not count:
        found.warnings.append("engine.device is cuda, and torch sees no GPU here: this machine cannot run it")
    elif config.engine.device != "cpu" and 0 < count < world:
        found.warnings.append(f"{world} ranks need {world} GPUs, this machine has {count}")
    elif not count and world > cores():
        found.warnings.append(f"{world} ranks share {cores()} cores of this machine")
    if config.engine.name == "torch" and world > 1:
        found.problems.append(
            ConfigError(f"engine.name torch runs one rank, not {world}; set engine.name=deepspeed or launch.ranks=1")
        )


def _about_disk(found: Findings, config: RunConfig, model: Model, folder: RunFolder) -> Table:
    """The size of a checkpoint beside what the disk has."""
    size = sum(
        4 * parameter.numel() * (1 + len(STATE_KEYS[group["kind"]]))
        for group in param_groups(model, config.optim)
        for parameter in group["params"]
    )
    free, keep = free_bytes(folder.checkpoints), config.checkpoint.keep_last
    need = int(1.2 * size) + 65536  # what the store asks for before it writes one
    table = make_facts("checkpoints")
    table.add_row("each", f"{human_bytes(size)}, every {config.checkpoint.every:,} steps; the last {keep} are kept")
    table.add_row("disk", f"{human_bytes(free)} free in {folder.checkpoints}")
    if need > free:
        found.problems.append(
            ConfigError(
                f"a checkpoint of this run needs {human_bytes(need)} (a fifth of it spare), but {folder.checkpoints}"
                f" has {human_bytes(free)} free; free some, or set run.dir to a larger disk"
            )
        )
    elif (keep + 1) * need > free:
        found.warnings.append(
            f"keeping {keep} checkpoints while the next is written takes {human_bytes((keep + 1) * need)}, and"
            f" {human_bytes(free)} are free; lower checkpoint.keep_last, or set run.dir to a larger disk"
        )
    return table


def _check_folder(found: Findings, config: RunConfig, folder: RunFolder, dataset: Dataset | None) -> None:
    """Whether the run folder is another run's, or held by somebody."""
    found.attempt(lambda: check_not_in_use(folder))
    if not has_begun(folder):
        return
    found.attempt(lambda: changes_since(folder, own_mixers(config, folder)[0]))
    known = folder.facts().get("data_fingerprint")
    if dataset is not None and known not in (None, dataset.manifest.fingerprint):
        found.problems.append(
            DataError(
                f"{public(config.data.dir)} holds other shards than run {folder.name} began with; give data.dir the old"
                " ones, or this run another run.name"
            )
        )


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"
