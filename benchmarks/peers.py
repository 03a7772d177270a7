"""Peers, measured in the same run where they are installed."""

from __future__ import annotations

import time

import torch

from benchmarks.common import Table, interval
from benchmarks.shapes import SIZES, VOCAB


def transformers_step(table: Table, size: str) -> None:
    """The bare step of the transformers library's GPT-2 of the same shape."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed here, so it is not measured; `pip install transformers` in a copy")
        return
    shape = SIZES[size]
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=shape.length, n_embd=shape.width, n_layer=shape.depth, n_head=shape.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, VOCAB, (shape.rows, shape.length))
    seconds = []
    for _ in range(8):
        began = time.process_time()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - began)
    spread = interval(seconds[2:])
    table.add(f"transformers {transformers.__version__} GPT-2, bare loop", spread.median, "CPU s a step", spread=spread)
