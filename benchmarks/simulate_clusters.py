"""Machines that are not at hand, from figures that others have published, each with its source.

What no source tells of (what Python's imports cost, a manifest, a hash) is taken from this machine's measurements;
what is assumed is called so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from benchmarks.simulate_run import BLOCK, Habits, Job, Machine, Outcome, Run, best_interval, lost_to_failures

RANKS = (1, 8, 64, 512, 2048, 4096, 16384)
SHARD_MIB, WINDOW, SOURCES = 256, 64, 2
PARAMETERS, LENGTH, ROWS = 1.007e9, 2048, 8  # models/attention-1b (README.md)

# DGX H100 user guide: 8 GPUs, two Xeon Platinum 8480C of 56 cores, 8 ConnectX-7 of 400 Gb/s for computing;
# NVIDIA H100 datasheet: NVLink 900 GB/s and PCIe Gen5 128 GB/s, both directions together
GPUS, CORES, NVLINK, RAILS, PCIE = 8, 112, 450e9, 8 * 50e9, 64e9
# NCCL, src/graph/tuning.cc, hardware latencies of the Simple protocol: a ring's hop over NVLink, a hop over the network
NVLINK_HOP_S, NETWORK_HOP_S = 3.4e-6, 14e-6
# llm-foundry, scripts/train/benchmarking/README.md: MPT 1B, rows of 2,048 tokens, bf16, 64 H100
TOKENS_PER_S = 44_402
# llm-foundry, the same table: 512 H100 reach 39,837 tokens a second each
PUBLISHED_64_TO_512 = 39_837 / 44_402
# Llama 3 (arXiv 2407.21783), 3.3.1: a file system that sustains 2 TB/s; 3.3.4: 419 unexpected interruptions of 16,384
# GPUs in 54 days
STORAGE = 2e12
MTBF_OF_A_GPU_S = 54 * 86400 * 16384 / 419
# assumed, for no published figure fits: the DGX SuperPOD H100 reference architecture says that one node can read more
# than 40 GB/s, which takes what Python's reads are not (GPUDirect)
NODE_READ, NODE_WRITE = 8e9, 4e9
# Dell HPC Lustre storage with InfiniBand EDR, mdtest: 12 threads look at 34,000 files a second and make 13,800; 240
# look at 544,000 and make 29,000
LOOK_S, LOOKS, MAKE_S, MAKES = 12 / 34_000, 544_000, 12 / 13_800, 29_000
# MegaScale (NSDI 2024), 3.5: 2,048 GPUs form their groups in under 5 s, more than 10,000 in under 30 s
MEET_S = 5 / 2048
# of Slurm 22.05 with its daemons on one machine: `srun` of one task takes 0.1 to 0.3 s
FAN_OUT_S = 0.2
SETTLE_S = 5.0
"""Seconds until a supervisor knows that a rank is gone: silent for four, looked at twice a second."""
HORIZON_S = 54 * 86400.0


@dataclass(frozen=True)
class Local:
    """What is taken from this machine: seconds of a core to start a rank, to make it ready, to decode a manifest (a
    shard) and to save a byte; bytes that a rank's imports read and files they look at; bytes of a manifest, a shard;
    seconds to start a process."""

    start_core_s: float
    ready_core_s: float
    shard_core_s: float
    save_core_s: float
    start_bytes: float
    start_looks: float
    shard_bytes: float
    spawn_s: float


@dataclass(frozen=True)
class Figures:
    """What a run of so many ranks is like. lost: share of its time, with checkpoints every `interval_s`."""

    ranks: int
    start: Outcome
    again: Outcome
    efficiency: float
    data_rate: float  # bytes a second that steps ask of storage
    mtbf_s: float
    interval_s: float
    lost: float


def h100(local: Local) -> Machine:
    """Nodes of eight H100 with a network of their own and a file system for all."""
    # DeepSpeed sums gradients in buckets of at most 500 million, then gathers parameters, both in bf16 (ZeRO-1)
    buckets = math.ceil(PARAMETERS / 5e8)
    return Machine(
        name="H100", ranks_per_node=GPUS, cores=CORES, spawn_s=local.spawn_s, fan_out_s=FAN_OUT_S,
        start_core_s=local.start_core_s, start_bytes=local.start_bytes, start_looks=local.start_looks,
        ready_core_s=local.ready_core_s,
        meet_core_s=MEET_S, shard_core_s=local.shard_core_s, shard_bytes=local.shard_bytes,
        looks=LOOKS, look_s=LOOK_S, makes=MAKES, make_s=MAKE_S,
        read=STORAGE, node_read=NODE_READ, write=STORAGE, node_write=NODE_WRITE,
        step_s=ROWS * LENGTH / TOKENS_PER_S, first_step_s=ROWS * LENGTH / TOKENS_PER_S, on_cores=False, jitter=(1.0,),
        reduces=(*(2 * PARAMETERS / buckets for _ in range(buckets)), 8.0, 8.0, 8.0, 8.0),
        gathers=(2 * PARAMETERS, 8.0),
        hop_s=NVLINK_HOP_S, far_hop_s=NETWORK_HOP_S, near=NVLINK, far=RAILS, byte_core_s=0.0,
        copy=PCIE, save_core_s=local.save_core_s,
    )  # fmt: skip


def large_job(ranks: int, shards: int) -> Job:
    """A model of a billion parameters on that many ranks, each with as many rows as the others' sources give one."""
    return Job(
        ranks=ranks, shards=shards, rows=ROWS, row_bytes=2.0 * LENGTH, sources=SOURCES,
        window=float(WINDOW * SOURCES * SHARD_MIB * BLOCK), state_bytes=12 * PARAMETERS, steps=8, save_at=5,
    )  # fmt: skip


def figures(machine: Machine, job: Job, alone_s: float) -> Figures:
    """Simulate a run, and its start after a failure. alone_s: a step of one rank."""
    start = Run(machine, job).simulate()
    again = Run(machine, replace(job, resumes=True, steps=job.save_at)).simulate()
    mtbf = MTBF_OF_A_GPU_S / job.ranks
    restart = SETTLE_S + again.first_s
    # a save begins only when the last one is durable
    interval = max(best_interval(start.blocked_s, mtbf), start.durable_s)
    lost = lost_to_failures(Habits(interval, start.blocked_s, start.durable_s, restart), mtbf, HORIZON_S)
    step = max(start.step_s, start.data_s)
    return Figures(job.ranks, start, again, alone_s / step, start.data_bytes / step, mtbf, interval, lost)


def bottleneck(outcome: Outcome) -> tuple[str, float]:
    """The part of a start that takes longest, and its share."""
    name = max(outcome.phases, key=lambda phase: outcome.phases[phase])
    return name, outcome.phases[name] / outcome.first_s
