"""Text from a model: token by token through its decoding form, which keeps a state instead of reading all again."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.errors import UsageError
from data_pipeline.tokenizer import Tokenizer
from pretrain.model import Model
from pretrain.parallel import derive_seed


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the likeliest. top_k: only among the k likeliest (0: all). top_p: only among the fewest
    likeliest that hold this much probability (nucleus sampling, arXiv 1904.09751). seed: the draw is a function of it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"temperature {self.temperature}, top-k {self.top_k}, top-p {self.top_p}: the first two must not be"
                " negative, the last lies above 0 and at most at 1"
            )


def generate(model: Model, tokenizer: Tokenizer, prompt: str, *, tokens: int, sampling: Sampling) -> Iterator[str]:
    """Pieces of text that go on from `prompt`, at most `tokens` tokens of it; ends where the model ends the document.

    Every piece is whole characters: bytes that do not yet make one are held back.
    """
    ids = _begin(tokenizer, prompt)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    generator = torch.Generator().manual_seed(derive_seed(sampling.seed, "generate"))
    with torch.no_grad():
        feed = torch.tensor([ids], device=model.device)
        state = model.initial_state(1)
        for _ in range(tokens):
            logits, state = model.decode(feed, state)
            token = choose(logits[0, -1].double().cpu(), sampling, generator)
            if token == tokenizer.eod:
                break
            yield decoder.decode(tokenizer.decode_bytes([token]))
            feed = torch.tensor([[token]], device=feed.device)
    yield decoder.decode(b"", final=True)


def _begin(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens that a text begins with. Raises UsageError where a tokenizer leaves nothing of the prompt."""
    # a document never begins with its end, so that is no start for a text; some tokenizers know no line end either
    for text in (prompt, "\n", ".") if not prompt.strip() else (prompt,):
        if ids := tokenizer.encode(text).tolist():
            return ids
    raise UsageError(f"the tokenizer leaves nothing of the prompt {prompt!r}; give one with a letter")


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token by the rule of `sampling`. logits_V: fp64 on the CPU."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    if sampling.top_k and sampling.top_k < len(logits_V):
        least = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, float("-inf"))
    odds_V = logits_V.softmax(-1)
    if sampling.top_p < 1:
        odds, order = odds_V.sort(descending=True)
        # a token stays while those before it hold less than top_p, so the likeliest always does
        beyond = odds.cumsum(-1) - odds >= sampling.top_p
        odds_V = odds_V.index_fill(0, order[beyond], 0.0)
    return int(torch.multinomial(odds_V, 1, generator=generator))
