"""What ranks do in the tests of expert parallelism: tasks that `run_ranks` asks for."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.config import ModelConfig, OptimConfig, PartConfig
from pretrain.engine import Engine
from pretrain.layout import Layout
from tests.pretrain.engine_worker import LENGTH, batches, engine_of, files_of, whole_state
from tests.ranks import work

MOE = {"experts": 4, "shared": 1, "z_loss": 0.01}
ROWS_AT_ONCE = 2
"""Of every run: auxiliary losses are means over a micro-batch."""


def make(
    stage: str, ep: int = 1, precision: str = "fp32", recompute: bool = False, clip: float = 0.3, **options: object
) -> Engine:
    """An engine over a small mixture with biases and shared experts, clipped in every step."""
    by_loss = {"balance_loss": 0.05} if options.get("balance", "loss") == "loss" else {}
    model = ModelConfig(
        width=20, depth=2, length=LENGTH, bias=True, mixers=(PartConfig(name="attention", options={"heads": 2}),),
        channel=PartConfig(name="moe", options={**MOE, **by_loss, **options}),
    )  # fmt: skip
    # a larger epsilon: Adam would make steps of the rounding of gradients that are zero, as of a bias of keys
    optim = OptimConfig(lr=5e-3, clip=clip, eps=1e-4)
    more = {} if ep == 1 else {"expert_parallel": ep}
    engine = engine_of(stage, precision, ROWS_AT_ONCE, model, optim, **more)
    if recompute:
        engine.model.recompute()
    return engine


def train(engine: Engine, first: int, last: int) -> list[tuple[float, float | None, list[float]]]:
    """Loss, norm and measures of some steps."""
    rows = [engine.step(batches(step, ROWS_AT_ONCE), step, 1.0) for step in range(first, last)]
    return [(row.loss, row.grad_norm, list(row.measures)) for row in rows]


def logits(engine: Engine) -> list[float]:
    """Logits of rows that every rank reads, by the training form."""
    engine.model.eval()
    ids = torch.arange(3 * LENGTH).view(3, LENGTH) % 67
    with torch.no_grad():
        return engine.model.logits(ids, Layout.single(3, LENGTH)).float().flatten().tolist()


def runs(out: Path, cases: dict[str, dict[str, object]], steps: int = 4) -> object:
    """Train each case, save it, and go on."""
    results = {}
    for name, case in cases.items():
        engine = make(**case)
        rows = train(engine, 0, steps)
        state = whole_state(engine, out / name)
        results[name] = {
            "rows": rows,
            "state": state,
            "logits": logits(engine),
            "later": train(engine, steps, 2 * steps),
        }
    return results


def taken_over(out: Path, source: str, cases: dict[str, dict[str, object]], steps: int = 4) -> object:
    """Load into each case what every run at `source` saved, and go on."""
    results = {}
    for saved in sorted(Path(source).glob("*/checkpoints")):
        for name, case in cases.items():
            engine = make(**case)
            engine.load(files_of(saved.parent))
            pair = f"{saved.parent.name}>{name}"
            results[pair] = {
                "state": whole_state(engine, out / pair), "logits": logits(engine),
                "later": train(engine, steps, 2 * steps),
            }  # fmt: skip
    return results


if __name__ == "__main__":
    work(globals())
