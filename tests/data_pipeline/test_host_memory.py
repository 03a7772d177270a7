"""Memory that a step frees stays with the process, unless the user has told the C library something else."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from torch import nn
from data_pipeline.host_memory import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
layers = [(nn.Linear(64, wide), nn.GELU(), nn.Linear(wide, 64)) for wide in (64, 256, 192, 320)]
network = nn.Sequential(*(part for layer in layers for part in layer))
x = torch.randn(4096, 64)
def step():
    network(x).square().sum().backward()
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
FEW = 5_000
"""Pages for ten steps: four times as many where memory goes back, a fifth where it stays."""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")


def faults(how: str, **env: str) -> tuple[str, int]:
    """What was told, and pages that ten steps had to be given."""
    command = [sys.executable, "-c", STEPS, how]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120, check=True)
    told, pages = done.stdout.split()
    return told, int(pages)


def test_steps_find_the_memory_again_that_the_last_one_freed():
    given_back, (told, kept) = faults("leave")[1], faults("keep")
    assert told == "True"
    assert given_back > FEW > kept


def test_what_a_user_asked_of_the_c_library_holds():
    told, pages = faults("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert told == "False"
    assert pages > FEW
