"""A trained model out of a run's checkpoint, for evaluation and text: plain torch, one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from configs.load import load
from data_pipeline.dataset import Dataset, open_dataset
from pretrain.checkpoint_files import newest_readable, open_files
from pretrain.config import RunConfig
from pretrain.engine import PARAM
from pretrain.evaluate import HeldOut, evaluate
from pretrain.init import materialise
from pretrain.member_names import by_model_names
from pretrain.model import Model
from pretrain.models.build import build
from pretrain.parallel import Ranks
from pretrain.run_folder import RunFolder


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, with what it was trained on. step: of the checkpoint it is from."""

    model: Model
    config: RunConfig
    dataset: Dataset
    step: int


def load_trained(folder: RunFolder, step: int | None = None, device: str = "cpu") -> Trained:
    """The newest valid checkpoint of a run, or the one of `step`, in fp32. Raises DataError where there is none."""
    config = load(RunConfig, [folder.config])
    found = newest_readable(folder, step)
    dataset = open_dataset(config.data)
    model = materialise(build(config.model, dataset.tokenizer.vocab), device)
    model.know_sources(list(config.data.sources))
    reader = by_model_names(open_files(found), model)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(reader.read(name, PARAM, 0, value.numel()).view(value.shape))
    return Trained(model.eval(), config, dataset, found.step)


def evaluate_trained(
    trained: Trained, *, rows: int | None, batch_rows: int, alive: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The figures of the model on its run's held-out text; `rows` of each source, or all."""
    config, dataset = trained.config, trained.dataset
    heldout = HeldOut(dataset.manifest, dataset.shards, list(config.data.sources), config.model.length, rows)
    with torch.no_grad():
        figures = evaluate(
            lambda batch: trained.model(batch.to(trained.model.device)),
            heldout,
            dataset.tokenizer.byte_lengths,
            Ranks(0, 1, 0, "here"),
            batch_rows=batch_rows,
            alive=alive,
            told_by=trained.model.figures,
        )
    return {"step": trained.step, "attempt": 0, **figures}
