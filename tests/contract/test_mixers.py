"""Every mixer, every promise of its certificate. A new mixer is tested with no edit here."""

from __future__ import annotations

import pytest

from pretrain.certificate.costs import flops
from pretrain.certificate.issue import PROMISES
from pretrain.certificate.trial import Candidate
from tests.contract.cases import CASES, IDS


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("promise", PROMISES, ids=[promise.name for promise in PROMISES])
def test_it_keeps_the_promise(promise, name, options):
    candidate = Candidate(name, options)
    if not promise.asked_of(candidate):
        pytest.skip(f"{name} does not promise it: {promise.flag} is False")
    promise.measure(candidate)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("correlation", {"lags": 40}),
        ("correlation", {"corr": "lagbank", "window": 40}),
        ("involution", {"kernel": 40}),
        ("involution", {"kernel": 20, "dilation": 3}),
    ],
)
def test_operations_are_stated_rightly_where_a_mixer_reaches_beyond_the_row(name, options):
    flops(Candidate(name, options))
    mix = Candidate(name, options).mixer()
    assert mix.flops_per_token(16) < mix.flops_per_token(64), "what lies before the row costs nothing"
