"""What is trained: the run's whole configuration, frozen before anything starts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from configs.errors import ConfigError
from configs.schema import Config, key, section, values
from data_pipeline.config import DataConfig
from pretrain.ensemble.config import EnsembleConfig, ModulesConfig, ShapeConfig

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class PartConfig(Config):
    """A mixer or channel mixer by name, with the options its own file declares."""

    name: str = key(..., "match", "name of its file; may be left out beside `file`")
    options: dict[str, Any] = key({}, "match", "options that the file declares")
    file: str | None = key(None, "match", "a .py file of your own that registers it, instead of one that comes along")

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_file(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("file"), str) and "name" not in values:
            return values | {"name": Path(values["file"]).stem}
        return values


class WrapConfig(Config):
    """The stack run over its own output, with the same weights (docs/WRAP.md)."""

    passes: int = key(1, "match", "times that the stack is run; 1: as it is", gt=0)
    loss: Literal["last", "mean_all"] = key("last", "match", "what is trained: the last pass, or all of them equally")
    checkpoint: bool = key(False, "record", "run a pass again in the backward pass to save memory")


class LogitsConfig(Config):
    """A feed-forward over the logits, added to them (docs/WRAP.md)."""

    hidden: int = key(0, "match", "its hidden width; 0: none", ge=0)
    rank: int = key(0, "match", "rank of its first matrix, for large vocabularies; 0: full", ge=0)
    freeze_backbone: bool = key(False, "match", "train nothing else")

    @model_validator(mode="after")
    def _is_there(self) -> LogitsConfig:
        if not self.hidden and (self.rank or self.freeze_backbone):
            raise ValueError("has rank or freeze_backbone, but no feed-forward; set model.logits.hidden to its width")
        return self


class ModelConfig(Config):
    """The model. Parameters of one mixer or channel mixer are its own `options`."""

    width: int = key(128, "match", "width D of the residual stream", gt=0)
    depth: int = key(4, "match", "blocks", gt=0)
    length: int = key(256, "match", "tokens T of a training row", gt=0)
    mixers: tuple[PartConfig, ...] = key(
        (PartConfig(name="correlation"),), "match", "token mixers, tiled over the depth; several make a hybrid"
    )
    channel: PartConfig = key(PartConfig(name="mlp"), "match", "the channel mixer of every block")
    stack: PartConfig = key(PartConfig(name="blocks"), "match", "what stands between embedding and head")
    wrap: WrapConfig = section(WrapConfig)
    logits: LogitsConfig = section(LogitsConfig)
    ensemble: EnsembleConfig = section(EnsembleConfig)
    norm: Literal["rmsnorm", "layernorm", "layernorm_plain"] = key(
        "rmsnorm", "match", "the norm before each mixer and at the end; `layernorm_plain` has no parameters"
    )
    positions: Literal["rope", "learned", "none"] = key("rope", "match", "how mixers know where a token stands")
    bias: bool = key(False, "match", "biases in linear layers and layernorms")
    tie: bool = key(True, "match", "whether the head shares the embedding's weights")
    dropout: float = key(
        0.0, "match", "share of a branch's outputs and of the embedding set to 0 in training", ge=0, lt=1
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        if not self.mixers:
            raise ValueError("has no mixers; name at least one under model.mixers")
        shaped = shaped_modules(self)
        if shaped and self.ensemble.fusion == "btx":
            raise ValueError(
                f"gives the module {shaped[0]!r} a shape of its own, but fusion btx makes all models one; leave"
                " model.ensemble.shapes empty, or choose mhc, posterior or uniform"
            )
        return self


class OptimConfig(Config):
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = key(
        "adamw", "match", "`muon`: Muon for matrices of the blocks, AdamW for the rest"
    )
    lr: float = key(1e-3, "record", "highest learning rate", gt=0)
    muon_lr: float = key(0.02, "record", "highest learning rate of Muon's matrices", gt=0)
    betas: tuple[float, float] = key((0.9, 0.95), "record", "AdamW's decay of the two moments")
    eps: float = key(1e-8, "record", "AdamW's epsilon", gt=0)
    weight_decay: float = key(0.1, "record", "decay of matrices; norms, embeddings, gains and biases have none", ge=0)
    clip: float = key(1.0, "record", "largest norm of the gradient; 0: no clipping", ge=0)
    schedule: Literal["cosine", "wsd", "constant", "inverse_sqrt"] = key(
        "cosine", "record", "learning rate after warm-up"
    )
    warmup_steps: int = key(100, "record", "steps of linear warm-up", ge=0)
    decay_steps: int = key(0, "record", "last steps in which `wsd` falls; 0: a tenth of train.steps", ge=0)
    final_lr: float = key(0.1, "record", "learning rate at the end, as a share of lr (cosine, wsd)", ge=0, le=1)


class TrainConfig(Config):
    """How long, and how much at once."""

    steps: int = key(1000, "record", "steps of the whole run", gt=0)
    tokens: int | None = key(None, "record", "tokens of the whole run, instead of steps", gt=0)
    batch_rows: int = key(16, "match", "rows of a global batch, over all ranks", gt=0)
    micro_rows: int | None = key(None, "record", "rows that a rank runs forward at once; empty: its whole share", gt=0)
    max_skips: int = key(3, "record", "steps in a row that may be skipped for a non-finite loss or gradient", ge=0)


class EngineConfig(Config):
    """What turns a loss into an update, and on which device."""

    name: Literal["deepspeed", "torch"] = key("deepspeed", "record", "`torch` is the reference: one rank, no sharding")
    zero: Literal[0, 1, 2, 3] = key(1, "record", "ZeRO stage: what is sharded over ranks")
    expert_parallel: int = key(
        1, "record", "ranks that share the experts of a mixture, each holding a part; 1: none do (ZeRO 0-2)", gt=0
    )
    precision: Literal["fp32", "bf16"] = key("fp32", "match", "arithmetic; masters and moments are always fp32")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "record", "`auto`: cuda where there is one")
    offload_optimizer: bool = key(False, "record", "keep the optimizer's state in host memory (ZeRO 1-3)")
    activation_checkpointing: bool = key(False, "record", "run blocks again in the backward pass to save memory")
    compile: bool = key(False, "record", "torch.compile the model")
    threads: int | None = key(
        None, "record", "CPU threads of a rank; empty: the cores of the host dealt to its ranks", gt=0
    )
    timeout_s: float = key(1800.0, "free", "longest wait for another rank", gt=0)


class CheckpointConfig(Config):
    """When state is saved and what is kept."""

    every: int = key(100, "record", "steps between checkpoints", gt=0)
    keep_last: int = key(2, "free", "newest checkpoints to keep", ge=1)
    keep_every: int | None = key(None, "free", "keep each checkpoint whose step is a multiple of this, for good", gt=0)
    max_failures: int = key(3, "free", "saves in a row that may fail before the run stops", gt=0)
    commit_timeout_s: float = key(600.0, "free", "longest wait for all ranks' files of one checkpoint", gt=0)


class EvalConfig(Config):
    """Loss on text that is never trained on."""

    every: int = key(0, "free", "steps between evaluations; 0: only by `leviathan eval`", ge=0)
    rows: int | None = key(256, "free", "held-out rows of each source; empty: all", gt=0)
    batch_rows: int = key(16, "free", "rows that a rank runs forward at once", gt=0)


class LogConfig(Config):
    """What is told, and where."""

    wandb: Literal["off", "offline", "online"] = key("off", "free", "Weights & Biases; metrics.jsonl is always written")
    wandb_project: str = key("leviathan", "free", "the project on Weights & Biases")
    wandb_entity: str | None = key(None, "free", "the team on Weights & Biases; empty: yours")
    wandb_group: str | None = key(None, "free", "runs shown together there; empty: an ensemble's under its name")
    peak_tflops: float | None = key(None, "free", "peak of one device, for MFU; empty: known GPUs, or measured", gt=0)


class RunSection(Config):
    """The run as a whole."""

    name: str | None = key(
        None, "free", "folder under `dir`; empty: named after the last file that says what is trained, and its hash",
        pattern=RUN_NAME,
    )  # fmt: skip
    dir: str = key("runs", "free", "folder of all runs")
    seed: int = key(0, "match", "everything random is derived from it", ge=0)


class RunConfig(Config):
    """Everything about what is trained; where it runs is `launch`."""

    run: RunSection = section(RunSection)
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    optim: OptimConfig = section(OptimConfig)
    train: TrainConfig = section(TrainConfig)
    modules: ModulesConfig = section(ModulesConfig)
    engine: EngineConfig = section(EngineConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    eval: EvalConfig = section(EvalConfig)
    log: LogConfig = section(LogConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.engine.name == "torch" and self.engine.offload_optimizer:
            raise ValueError("engine.offload_optimizer needs engine.name deepspeed; set one or the other")
        shared = self.engine.expert_parallel
        if shared > 1 and self.engine.name == "torch":
            raise ValueError(f"engine.expert_parallel {shared} needs engine.name deepspeed; set one or the other")
        if shared > 1 and self.engine.zero == 3:
            raise ValueError(
                f"engine.expert_parallel {shared} needs engine.zero 0, 1 or 2; set engine.expert_parallel=1: with"
                " engine.zero 3 experts are sharded like everything else"
            )
        if shared > 1 and self.engine.zero == 0 and self.engine.precision == "bf16":
            # there DeepSpeed 0.19 leaves experts' gradients out of the norm
            raise ValueError(f"engine.expert_parallel {shared} in bf16 needs engine.zero 1 or 2; set engine.zero=1")
        if shared > 1 and self.model.logits.freeze_backbone:
            raise ValueError(
                f"engine.expert_parallel {shared} trains experts, which model.logits.freeze_backbone freezes; set one"
                " or the other"
            )
        if self.optim.name == "muon" and self.engine.name == "deepspeed" and self.engine.zero:
            # ZeRO 1 to 3 give the optimizer flat pieces of parameters; Muon needs whole matrices
            raise ValueError(f"optim.name muon does not work with engine.zero {self.engine.zero}; set engine.zero=0")
        if self.engine.offload_optimizer and self.engine.zero == 0:
            raise ValueError("engine.offload_optimizer needs engine.zero 1, 2 or 3")
        shaped = shaped_modules(self.model)
        if shaped and self.modules.seed_steps:
            raise ValueError(
                f"modules.seed_steps {self.modules.seed_steps} has all models begin from one, but"
                f" model.ensemble.shapes gives the module {shaped[0]!r} a shape of its own; set one or the other"
            )
        return self


def shape_of(model: ModelConfig, module: str) -> tuple[int, int]:
    """Width and depth of a module's models."""
    own = model.ensemble.shapes.get(module, ShapeConfig())
    return own.width or model.width, own.depth or model.depth


def shaped_modules(model: ModelConfig) -> list[str]:
    """The modules whose shape is not the model's own."""
    return [name for name in model.ensemble.modules if shape_of(model, name) != (model.width, model.depth)]


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of a global batch."""
    return config.train.batch_rows * config.model.length


def total_steps(config: RunConfig) -> int:
    """Steps of the whole run: stated, or enough for the stated tokens."""
    if config.train.tokens is None:
        return config.train.steps
    return -(-config.train.tokens // tokens_per_step(config))


def micro_rows(config: RunConfig, world: int) -> int:
    """Rows that one of `world` ranks runs forward at once."""
    share = max(1, config.train.batch_rows // world)
    return min(config.train.micro_rows or share, share)


def check_expert_ranks(size: int, world: int) -> None:
    """Raise ConfigError where not every one of `world` ranks finds `size` - 1 others to share experts with."""
    if world % size:
        raise ConfigError(
            f"engine.expert_parallel is {size}, which does not divide {world} ranks; start a multiple of {size}, or set"
            " it to 1"
        )


def must_match(config: RunConfig) -> dict[str, Any]:
    """Every key whose change would make it another run, with its value, by dotted path."""
    return {path: value for path, value, resume in values(config) if resume == "match"}


def may_change(config: RunConfig) -> dict[str, Any]:
    """Every key whose change is written into the run's history, with its value, by dotted path."""
    return {path: value for path, value, resume in values(config) if resume == "record"}


def short_hash(config: RunConfig) -> str:
    """Eight characters that differ between runs that must not be confused."""
    return hashlib.sha256(json.dumps(must_match(config), sort_keys=True).encode()).hexdigest()[:8]
