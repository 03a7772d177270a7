"""The certificate itself: all promises in their order, which of them a mixer's flags ask for, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.errors import ConfigError
from pretrain.certificate import costs, promises
from pretrain.certificate.trial import Candidate, Measured, Refused
from pretrain.mixer import REGISTRY
from pretrain.registry import line_of


@dataclass(frozen=True)
class Promise:
    """One promise. trial: what measures it. flag: of the mixer; where it is not set, the promise is not asked for."""

    name: str
    trial: Callable[[Candidate], Measured]
    flag: str | None = None

    @property
    def says(self) -> str:
        """The promise in a sentence."""
        return " ".join((self.trial.__doc__ or "").split())

    def asked_of(self, candidate: Candidate) -> bool:
        """Whether the mixer's flags promise it."""
        return self.flag is None or candidate.says(self.flag)

    def measure(self, candidate: Candidate) -> Measured:
        """What the trial finds. Raises Refused where the promise is not kept."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # everything is small: threads would only wait for each other
        try:
            return self.trial(candidate)
        finally:
            torch.set_num_threads(threads)


PROMISES = (
    # a cause stands before what follows from it, so that the first one broken is the one to mend
    Promise("causal", promises.causal, "causal"),
    Promise("prefix", promises.prefix, "causal"),
    Promise("rows", promises.rows),
    Promise("documents", promises.documents, "isolates"),
    Promise("forms", promises.forms),
    Promise("decoding", promises.decoding, "causal"),
    Promise("pieces", promises.pieces, "streams"),
    Promise("gradients", promises.gradients),
    Promise("meta", promises.meta),
    Promise("bf16", promises.bf16),
    Promise("vmap", promises.batched),
    Promise("FLOPs", costs.flops),
    Promise("state", costs.state, "causal"),
    Promise("growth", costs.growth),
)


@dataclass(frozen=True)
class Verdict:
    """What came of one promise. kept: None where it is not asked for. number: what was measured, if anything."""

    promise: str
    kept: bool | None
    told: str
    number: float | None = None


def certify(candidate: Candidate) -> Iterator[Verdict]:
    """A verdict for every promise, as it comes. Raises ConfigError for a mixer that there is not, or that cannot be
    built in the small model it is tried in."""
    for promise in PROMISES:
        yield verdict(promise, candidate)


def verdict(promise: Promise, candidate: Candidate) -> Verdict:
    """Try one promise. A mixer that raises is refused like one that computes what it should not."""
    try:
        if not promise.asked_of(candidate):
            return Verdict(promise.name, None, f"not promised: {promise.flag} = False")
        number, what = promise.measure(candidate)
    except Refused as reason:
        return Verdict(promise.name, False, str(reason))
    except ConfigError:
        raise
    except Exception as error:
        return Verdict(promise.name, False, _failure(error, candidate))
    return Verdict(promise.name, True, what, number)


def _failure(error: Exception, candidate: Candidate) -> str:
    """Where and how the mixer's own code failed."""
    code = REGISTRY.entry(candidate.name, candidate.file).part.__init__.__code__.co_filename
    first = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"it fails{line_of(error, Path(code))} ({first}); mend it"
