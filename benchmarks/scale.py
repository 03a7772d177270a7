"""What thousands of ranks cost: a manifest of a million shards, and a simulation that is held to real runs here.

Real runs of 1, 2 and 4 ranks say how far the simulation is to be believed; published figures of clusters make it speak
of those. It says where a run breaks, and by what.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import simulate_clusters as clusters
from benchmarks import simulate_here as here
from benchmarks.common import Table
from benchmarks.scale_manifest import manifest
from benchmarks.simulate_clusters import Figures, Local, bottleneck
from benchmarks.simulate_run import OPENS_ALL, SHARED_LOOKS, Run
from launcher.beacons import Beacons

ERROR, TRAFFIC, LOST, START_S, HEARD, SPEED = 0.3, 1.2, 0.10, 300.0, 0.95, 0.9
DEFAULT_BUFFER, READ_EVERY_S = 212_992, 0.5
"""What Linux grants a socket unless told otherwise (net.core.rmem_max); how often a supervisor reads signs of life."""
_SEND = """
import socket, sys, time
from pretrain.beacon import RECORD
host, port, nonce = sys.argv[1].rsplit(":", 2)
world, pieces = int(sys.argv[2]), 256
sender, began = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), time.monotonic()
for rank in range(world):
    if rank % (world // pieces) == 0:
        time.sleep(max(0.0, began + rank / world - time.monotonic()))
    sender.sendto(RECORD.pack(bytes.fromhex(nonce), rank, 0.0, 1, 3, 0), (host, int(port)))
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3, help="readings of the manifest")
    parser.add_argument("--runs", type=int, default=1, help="real runs of each number of ranks")


def run(options: argparse.Namespace) -> Table:
    """Measure, simulate, and return the table."""
    table = Table("what thousands of ranks cost, simulated; the simulation against real runs on this machine")
    cost = manifest(table, options.shards, options.rounds)
    with tempfile.TemporaryDirectory() as name:
        config = here.configure(Path(name))
        facts = here.measure(config)
        _check(table, config, facts, options.runs)
    _beacons(table)
    alone, constants = facts["alone"], here.machine(facts, cores=1.0, ranks=1)
    local = Local(
        start_core_s=alone["start_cpu"], ready_core_s=alone["ready_cpu"], shard_core_s=cost.shard_s,
        save_core_s=constants.save_core_s, start_bytes=alone["start_bytes"], start_looks=alone["start_looks"],
        shard_bytes=cost.shard_bytes, spawn_s=facts["spawn_s"],
    )  # fmt: skip
    _clusters(table, local, options.shards)
    return table


def _check(table: Table, config: Path, facts: dict[str, object], runs: int) -> None:
    """Real runs beside simulated ones, and what ranks of one node read from its disk."""
    from_disk, step_s = {}, {}
    for ranks in (1, 2, 4):
        real = [here.real_run(config, ranks) for _ in range(runs)]
        job = here.job(ranks, facts)
        starts = [Run(here.machine(facts, one.cores[0], ranks), job).simulate() for one in real]
        steps = [Run(here.machine(facts, one.cores[1], ranks), job).simulate() for one in real]
        from_disk[ranks] = statistics.median(one.from_disk for one in real)
        step_s[ranks] = statistics.median(one.step_s for one in real)
        for what, predicted, measured, goal, at in (
            ("first step", [s.first_s for s in starts], [one.first_s for one in real], ERROR, 0),
            ("a step", [s.step_s for s in steps], [one.step_s for one in real], ERROR, 1),
            ("training blocked by a save", [s.blocked_s for s in steps], [one.blocked_s for one in real], None, 1),
            ("a save until durable", [s.durable_s for s in steps], [one.durable_s for one in real], None, 1),
        ):
            guess, truth = statistics.median(predicted), statistics.median(measured)
            cores = statistics.median(one.cores[at] for one in real)
            note = f"(predicted {guess:.3g} s, measured {truth:.3g} s, {cores:.1f} cores left to the run)"
            name = f"here, {ranks} rank{'s' * (ranks > 1)}: {what}, error of the prediction"
            table.add(name, abs(guess / truth - 1), "", goal=goal, note=note)
    if (os.cpu_count() or 1) >= 2:
        note = f"({step_s[1]:.3g} and {step_s[2]:.3g} s a step, equally many rows a rank)"
        table.add("here: speed of a rank, 2 ranks / 1", step_s[1] / step_s[2], "x", goal=SPEED, sense=">=", note=note)
    note = f"({from_disk[1] / 2**20:.1f} and {from_disk[4] / 2**20:.1f} MiB; the data was not in memory)"
    table.add("read from disk until the first step: 4 ranks of a node / 1 rank", from_disk[4] / max(1.0, from_disk[1]),
              "x", goal=TRAFFIC, note=note)  # fmt: skip


def _beacons(table: Table) -> None:
    """How many ranks a supervisor hears that reads twice a second, through a socket of Linux's default size."""
    world = clusters.RANKS[-1]
    listener = Beacons("127.0.0.1", world)
    listener._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DEFAULT_BUFFER)
    sender = subprocess.Popen([sys.executable, "-c", _SEND, listener.next_attempt(), str(world)])
    began = time.process_time()
    while sender.poll() is None:
        time.sleep(READ_EVERY_S)
        listener.beats()
    heard = sum(beat is not None for beat in listener.beats().values())
    spent = time.process_time() - began
    listener.close()
    note = f"({heard:,} of {world:,} that tell once a second; {spent:.2f} CPU s for that second)"
    table.add("ranks that a supervisor hears", heard / world, "", goal=HEARD, sense=">=", note=note)


def _clusters(table: Table, local: Local, shards: int) -> None:
    machine = clusters.h100(local)
    alone = Run(machine, clusters.large_job(1, shards)).simulate().step_s
    of = {}
    for ranks in clusters.RANKS:
        job = clusters.large_job(ranks, shards)
        of[ranks] = clusters.figures(machine, job, alone)
        _figures(table, of[ranks])
    largest = clusters.RANKS[-1]
    job = clusters.large_job(largest, shards)
    other = clusters.figures(machine, replace(job, shared_looks=not SHARED_LOOKS), alone)
    name, share = bottleneck(other.start)
    what = "if every rank looked at all shards" if SHARED_LOOKS else "if ranks shared the look at all shards"
    table.add(f"H100, {largest:,} ranks: launch to first step, {what}", other.start.first_s, "s",
              note=f"({share:.0%} of it {name}; {other.lost:.3f} lost to failures)")  # fmt: skip
    other = clusters.figures(machine, replace(job, opens_all=not OPENS_ALL), alone)
    name, share = bottleneck(other.again)
    what = "each its own file" if OPENS_ALL else "every file of the checkpoint"
    table.add(f"H100, {largest:,} ranks: to start again, if ranks opened {what}", other.again.first_s, "s",
              note=f"({share:.0%} of it {name}; {other.lost:.3f} lost to failures)")  # fmt: skip
    nodes = [-(-ranks // machine.ranks_per_node) for ranks in (8, largest)]
    few, many = (of[ranks].start.start_bytes / count for ranks, count in zip((8, largest), nodes))
    note = f"({few / 2**30:.2f} and {many / 2**30:.2f} GiB a node)"
    # the simulation is told so; what ranks of a node really read is measured above
    table.add("H100: bytes from storage until the first step, a node: 16,384 ranks / 8", many / few, "x", note=note)
    step = of[512].start.step_s / of[64].start.step_s
    note = f"(llm-foundry measured {clusters.PUBLISHED_64_TO_512:.3f} with FSDP; nodes here are equally fast)"
    table.add("H100: speed of a rank, 512 ranks / 64", 1 / step, "x", note=note)


def _figures(table: Table, of: Figures) -> None:
    """The rows of one number of ranks."""
    name, share = bottleneck(of.start)
    last = of.ranks == clusters.RANKS[-1]
    start = f"H100, {of.ranks:,} rank{'s' * (of.ranks > 1)}"
    table.add(f"{start}: launch to first step", of.start.first_s, "s", goal=START_S if last else None,
              note=f"({share:.0%} of it {name})")  # fmt: skip
    table.add(f"{start}: a step", of.start.step_s, "s",
              note=f"(efficiency {of.efficiency:.3f}; data asks {_rate(of.data_rate)} of storage)")  # fmt: skip
    table.add(f"{start}: a save, until durable", of.start.durable_s, "s",
              note=f"(training is blocked for {of.start.blocked_s:.3g} s)")  # fmt: skip
    name, share = bottleneck(of.again)
    table.add(f"{start}: lost to failures", of.lost, "", goal=LOST if last else None,
              note=f"(one in {of.mtbf_s / 3600:,.1f} h; {of.again.first_s:,.0f} s to start again, {share:.0%} of it"
              f" {name}; a save every {of.interval_s:,.0f} s)")  # fmt: skip


def _rate(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:,.3g} GB/s"
