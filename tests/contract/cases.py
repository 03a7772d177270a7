"""What the contract tests run over: every registered mixer, alone and in a small model, in float64."""

from __future__ import annotations

from pretrain import mixer
from pretrain.certificate.trial import (
    LENGTH,
    ROWS,
    VOCAB,
    WIDTH,
    Candidate,
    noise,
    packed,
    piece,
    shaken,
    tokens,
)
from pretrain.mixer import Positions, TokenMixer
from pretrain.model import Model

__all__ = ["CASES", "IDS", "LENGTH", "ROWS", "VOCAB", "WIDTH"]
__all__ += ["make_mixer", "make_model", "noise", "packed", "piece", "shaken", "tokens"]

# options beyond a mixer's defaults that are worth the whole contract; a mixer without an entry is run as it is
VARIANTS: dict[str, list[dict[str, object]]] = {
    "attention": [{}, {"heads": 4, "kv_heads": 2}, {"heads": 4, "kv_heads": 1}],
    "correlation": [
        {},
        {"lags": 1},
        {"lags": 7, "lag_init": "uniform"},
        {"lags": 3, "lag_init": "delta"},
        {"lag_channelwise": True, "qk_norm": True},
        {"corr": "iir"},
        {"corr": "prefix_mean"},
        {"corr": "lagbank", "window": 8},
        {"corr": "lagbank", "window": 20},
        {"corr": "fft"},
        {"corr": "fft", "n_exp": 1, "qk_norm": True},
        {"corr": "fft_self"},
        {"corr": "seed_fft"},
        {"corr": "seed_ema"},
    ],
    "involution": [
        {},
        {"kernel": 7, "softmax": True, "delta": True},
        {"kernel": 5, "dilation": 2, "dilation_growth": 3},
    ],
    "elita": [{}, {"heads": 2, "value_width": 5, "features": 3, "pos_scale": 9.0}],
}
CASES = [(name, options) for name in mixer.REGISTRY.names() for options in VARIANTS.get(name, [{}])]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items()) or 'default'}" for name, options in CASES]


def make_mixer(name: str, options: dict[str, object]) -> TokenMixer:
    """A mixer in float64 with random parameters, none of them zero."""
    return Candidate(name, options).mixer()


def make_model(name: str, options: dict[str, object], positions: Positions = "rope") -> Model:
    """A two-block model in float64 with random parameters, none of them zero."""
    return Candidate(name, options).model(positions)
