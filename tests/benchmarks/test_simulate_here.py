"""The simulation against a real run of two ranks: coarse here, for tests run on machines that do other things too."""

from __future__ import annotations

import pytest

from benchmarks import simulate_here as here
from benchmarks.simulate_run import Run

pytestmark = [pytest.mark.e2e, pytest.mark.alone, pytest.mark.timeout(600)]


def test_a_run_of_two_ranks_takes_as_long_as_its_parts_say(tmp_path):
    config = here.configure(tmp_path)
    facts = here.measure(config)
    real = here.real_run(config, 2)
    predicted = Run(here.machine(facts, real.cores[0], 2), here.job(2, facts)).simulate()
    assert predicted.first_s == pytest.approx(real.first_s, rel=0.5)
    # all collectives of a step were heard: gradients are summed, parameters gathered
    calls = facts["two"]["collectives"]
    assert calls["all_reduce"][1] >= 4 * facts["two"]["parameters"]
    assert calls["all_gather_into_tensor"][1] >= 4 * facts["two"]["parameters"]
    # two ranks of one node got the data from the disk once
    shards = sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.tar"))
    assert real.from_disk < 1.6 * shards
