"""The life of a run in virtual time: its ranks start, meet, step and save on nodes that share storage and a network.

What each rank does, and in which order, follows the code: launcher/on_local.py or on_slurm.py starts it,
pretrain/session.py makes it ready, pretrain/trainer.py is its loop, pretrain/checkpoint.py saves. What each thing costs
is a `Machine`.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import dataclass, field

from benchmarks.simulate import Clock, Door, Gate, Process, Rounds, Shared, Use
from pretrain.checkpoint import NOTES_AT_ONCE

BLOCK = 1 << 20
"""Bytes of a shard that are read and checked at once (data_pipeline/shards.py)."""
SHARED_LOOKS = True
"""Whether ranks share the look at all shards' sizes, or each looks at all (data_pipeline/dataset.py)."""
OPENS_ALL = False
"""Whether a rank that goes on opens every file of a checkpoint, or its own (pretrain/checkpoint_files.py)."""
NOTE_WAIT_S = 0.02
"""Rank 0 looks so often whether all notes of a checkpoint are there (pretrain/checkpoint.py)."""


@dataclass(frozen=True)
class Machine:
    """What things cost. Seconds of a core are for one thread; bytes and operations a second are of all nodes together,
    `node_` of one node, `look_s` of one process."""

    name: str
    ranks_per_node: int
    cores: float
    spawn_s: float  # to start a rank of a node, one after the other
    fan_out_s: float  # to reach another 16 nodes from each that was reached
    start_core_s: float  # of a rank: interpreter and imports
    start_bytes: float  # that imports read; a node keeps them
    start_looks: float  # files that imports look at, a node once
    ready_core_s: float  # model, engine, first values
    meet_core_s: float  # of a rank, for every other rank that it meets
    shard_core_s: float  # to decode a manifest, a shard
    shard_bytes: float  # of a manifest, a shard
    looks: float  # of storage: files opened or looked at a second
    look_s: float
    makes: float  # of storage: files made, renamed or removed a second
    make_s: float
    read: float
    node_read: float
    write: float
    node_write: float
    step_s: float  # forward, backward and update of a rank
    first_step_s: float
    on_cores: bool  # whether steps are computed by the node's cores
    jitter: tuple[float, ...]  # of a step, as factors that are drawn from
    reduces: tuple[float, ...]  # bytes of each all-reduce of a step
    gathers: tuple[float, ...]  # bytes of each all-gather, or reduce-scatter, of a step
    hop_s: float  # of a ring within a node
    far_hop_s: float  # of a ring or a tree between nodes
    near: float  # bytes a second of a ring within a node
    far: float  # bytes a second of a ring over nodes, of each of its ranks
    byte_core_s: float  # of a rank, for every byte that it moves through a ring
    copy: float  # bytes a second of a rank's state into a snapshot
    save_core_s: float  # to hash, judge and hand over a byte of a snapshot; two threads share it


@dataclass(frozen=True)
class Job:
    """What is run. rows: of a rank in a step. row_bytes: of its tokens on disk. window: bytes of the shards that are
    shuffled together. state_bytes: of all ranks together."""

    ranks: int
    shards: int
    rows: int
    row_bytes: float
    window: float
    sources: int
    state_bytes: float
    steps: int = 12
    save_at: int = 6
    shared_looks: bool = SHARED_LOOKS
    opens_all: bool = OPENS_ALL
    resumes: bool = False


@dataclass
class Outcome:
    """What came of it, in seconds of virtual time. phases: of the start, by name, of the rank that took longest."""

    first_s: float = 0.0
    step_s: float = 0.0
    blocked_s: float = 0.0
    durable_s: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    start_bytes: float = 0.0
    start_looks: float = 0.0
    data_bytes: float = 0.0  # that all nodes read in a step
    data_s: float = 0.0  # that storage needs for them


class Run:
    """A run of a job on a machine."""

    def __init__(self, machine: Machine, job: Job, seed: int = 0) -> None:
        self.machine, self.job, self.clock = machine, job, Clock()
        m, c = machine, self.clock
        self.nodes = math.ceil(job.ranks / m.ranks_per_node)
        self._cores = [Shared(c, m.cores, 1.0) for _ in range(self.nodes)]
        self._looks, self._makes = Shared(c, m.looks, 1 / m.look_s), Shared(c, m.makes, 1 / m.make_s)
        self._read, self._write = Shared(c, m.read, m.node_read), Shared(c, m.write, m.node_write / m.ranks_per_node)
        self._code, self._tables = ([Door(c) for _ in range(self.nodes)] for _ in range(2))
        self._rounds, self._notes = Rounds(c, job.ranks), Gate(c, job.ranks)
        self._exchange, self._gathering = self._cost(m.reduces, m.gathers), self._cost((), m.gathers)
        self._agreement = self._cost((8.0, 4.0), ())
        self._random = random.Random(seed)
        self._phases: dict[str, float] = defaultdict(float)
        self._ends: dict[int, float] = {}
        self.outcome = Outcome()

    def simulate(self) -> Outcome:
        """From the launch until the checkpoint is durable and all steps are done."""
        for number in range(self.job.ranks):
            self.clock.start(self._rank(number))
        self.clock.run()
        out, job = self.outcome, self.job
        # of steps after the first that no save is beside
        quiet = [self._ends[s] - self._ends[s - 1] for s in range(2, job.save_at)]
        out.first_s, out.step_s = self._ends[1], sum(quiet) / len(quiet)
        out.phases = dict(self._phases)
        out.data_bytes = self.data_bytes()
        out.data_s = out.data_bytes / min(self.machine.read, self.nodes * self.machine.node_read)
        return out

    def data_bytes(self) -> float:
        """What all nodes read from storage in a step, on average over a window that is shuffled.

        A block is read whole when a node first needs a row of it, and stays in the node's memory for the window.
        """
        job, m = self.job, self.machine
        blocks = max(1.0, job.window / BLOCK)
        steps = max(1.0, job.window / (job.row_bytes * job.rows * job.ranks))
        rows_of_a_node = steps * job.rows * min(m.ranks_per_node, job.ranks)
        touched = blocks * -math.expm1(-rows_of_a_node / blocks)
        return self.nodes * touched * BLOCK / steps

    def _cost(self, reduces: tuple[float, ...], gathers: tuple[float, ...]) -> tuple[float, float]:
        """Of collectives of these sizes, one after the other: seconds of a rank's core, and of waiting."""
        parts = [ring(self.machine, self.job.ranks, size, size_is_sum)
                 for size_is_sum, sizes in ((True, reduces), (False, gathers)) for size in sizes]  # fmt: skip
        return sum((core for core, _ in parts), 0.0), sum((wait for _, wait in parts), 0.0)

    # ---- one rank

    def _rank(self, number: int) -> Process:
        m, job = self.machine, self.job
        node, local = divmod(number, m.ranks_per_node)
        cores, began = self._cores[node], self.clock.now
        yield m.fan_out_s * math.ceil(math.log(self.nodes, 16)) + m.spawn_s * (local + 1)
        yield Use(self._makes, 2.0)  # its log, and room for the note of why it ends
        began = self._phase("launch", began)
        if local == 0:
            yield Use(self._looks, m.start_looks)
            yield Use(self._read, self._count(m.start_bytes))
            self._code[node].open()
        yield self._code[node]
        yield Use(cores, m.start_core_s)
        began = self._phase("imports", began)
        if local == 0:
            yield Use(self._read, self._count(m.shard_bytes * job.shards))
            self._tables[node].open()
        yield self._tables[node]
        yield Use(cores, m.shard_core_s * job.shards)
        began = self._phase("manifest", began)
        looks = job.shards / (job.ranks if job.shared_looks else 1)
        self.outcome.start_looks += looks
        yield Use(self._looks, looks)
        began = self._phase("sizes of shards", began)
        yield Use(cores, m.ready_core_s)
        began = self._phase("model", began)
        yield Use(cores, m.meet_core_s * (job.ranks - 1))
        yield self._rounds.gate(-1)
        began = self._phase("meeting", began)
        if job.resumes:
            yield from self._restore(cores)
            began = self._phase("restore", began)
        yield from self._first_data()
        began = self._phase("first data", began)
        for step in range(1, job.steps + 1):
            yield from self._step(number, node, step)
            if step == 1:
                self._phase("first step", began)
            if step == job.save_at:
                yield from self._save(number, node)

    def _phase(self, name: str, began: float) -> float:
        """Take note of the longest of all ranks; return the time."""
        self._phases[name] = max(self._phases[name], self.clock.now - began)
        return self.clock.now

    def _count(self, read: float) -> float:
        self.outcome.start_bytes += read
        return read

    def _restore(self, cores: Shared) -> Process:
        """A rank looks at its share of the files, hashes it, and opens and reads its own; parameters are gathered."""
        job, m = self.job, self.machine
        share = job.state_bytes / job.ranks
        files = float(job.ranks) if job.opens_all else 1.0
        yield Use(self._looks, 2.0 * files)
        yield Use(self._read, 2 * share)
        yield Use(cores, m.save_core_s * share)
        yield self._rounds.gate(-2)
        core_s, wait_s = self._gathering
        yield Use(cores, core_s)
        yield wait_s

    def _first_data(self) -> Process:
        job = self.job
        yield Use(self._looks, 2.0 * min(job.rows, job.shards))  # to open a shard, and to read its index
        yield Use(self._read, self._count(float(job.rows * BLOCK)))

    def _step(self, number: int, node: int, step: int) -> Process:
        m = self.machine
        work = (m.first_step_s if step == 1 else m.step_s) * self._random.choice(m.jitter)
        if m.on_cores:
            yield Use(self._cores[node], work)
        else:
            yield work
        yield from self._collective(node, step, self._exchange)
        self._ends[step] = self.clock.now

    def _collective(self, node: int, number: int, cost: tuple[float, float]) -> Process:
        """All wait for all, then bytes go round. Of collectives in a row, only the first has anyone to wait for."""
        yield self._rounds.gate(number)
        core_s, wait_s = cost
        yield Use(self._cores[node], core_s)
        yield wait_s

    def _save(self, number: int, node: int) -> Process:
        """What training waits for: that all agree, and a copy. A thread does the rest."""
        m, began = self.machine, self.clock.now
        share = self.job.state_bytes / self.job.ranks
        yield from self._collective(node, -10, self._agreement)
        if m.on_cores:
            yield Use(self._cores[node], share / m.copy)
        else:
            yield share / m.copy
        self.outcome.blocked_s = max(self.outcome.blocked_s, self.clock.now - began)
        self.clock.start(self._writer(number, node, share))

    def _writer(self, number: int, node: int, share: float) -> Process:
        m, ranks, began = self.machine, self.job.ranks, self.clock.now
        halves = Gate(self.clock, 2)
        self.clock.start(self._hash(node, share, halves))
        yield Use(self._cores[node], m.save_core_s * share / 2)
        yield halves
        yield Use(self._write, share)
        yield Use(self._makes, 3.0)  # the file, the note and its name
        if number:
            self._notes.enter(_nothing)
            return
        yield self._notes
        yield NOTE_WAIT_S / 2
        # the note of each rank is read, then removed, so many at once
        yield from self._at_once(self._looks, float(ranks))
        yield from self._at_once(self._makes, float(ranks))
        yield Use(self._makes, 4.0)
        self.outcome.durable_s = self.clock.now - began

    def _at_once(self, of: Shared, work: float) -> Process:
        """Work that some threads of a rank share."""
        ends = Gate(self.clock, NOTES_AT_ONCE + 1)
        for _ in range(NOTES_AT_ONCE):
            self.clock.start(self._part(of, work / NOTES_AT_ONCE, ends))
        yield ends

    def _part(self, of: Shared, work: float, ends: Gate) -> Process:
        yield Use(of, work)
        yield ends

    def _hash(self, node: int, share: float, halves: Gate) -> Process:
        yield Use(self._cores[node], self.machine.save_core_s * share / 2)
        yield halves


def _nothing() -> None:
    """Nobody waits here."""


def ring(machine: Machine, ranks: int, size: float, is_sum: bool) -> tuple[float, float]:
    """Seconds of a rank's core, and seconds of waiting, of an all-reduce of so many bytes (`is_sum`), or of a gather.

    An all-reduce takes the ring or, between nodes, a tree, whichever is faster; a gather has only the ring.
    """
    if ranks == 1:
        return 0.0, 0.0
    m, turns = machine, 2 if is_sum else 1
    nodes = math.ceil(ranks / m.ranks_per_node)
    here = min(ranks, m.ranks_per_node)
    moved = turns * (ranks - 1) / ranks * size
    way = moved / (m.near if nodes == 1 else m.far)
    hops = turns * (nodes * (here - 1) * m.hop_s + (nodes - 1) * m.far_hop_s)
    if is_sum:
        hops = min(hops, turns * (math.log2(nodes) * m.far_hop_s + (here - 1) * m.hop_s))
    return moved * m.byte_core_s, way + hops


def best_interval(blocked_s: float, mtbf_s: float) -> float:
    """Seconds between checkpoints that lose least (Young's formula)."""
    return math.sqrt(2 * blocked_s * mtbf_s)


@dataclass(frozen=True)
class Habits:
    """How a run saves, and what a failure costs it: seconds from a failure to the first step after it."""

    interval_s: float
    blocked_s: float
    durable_s: float
    restart_s: float


def lost_to_failures(habits: Habits, mtbf_s: float, horizon_s: float, seed: int = 0) -> float:
    """The share of the time that saving, work done again, and restarts take, over so long a life of a run.

    Failures come at random, also during restarts; what was not durable by then is done again.
    """
    chance = random.Random(seed)
    now = kept = 0.0
    each = habits.interval_s + habits.blocked_s
    while now < horizon_s:
        lives = chance.expovariate(1 / mtbf_s)
        lived = min(lives, horizon_s - now)
        now += lives
        trained = lived - habits.restart_s
        # a save counts once it is durable; the last stretch of a life that the horizon ends counts as well
        saves = max(0.0, (trained - habits.durable_s) // each) if lives == lived else max(0.0, trained / each)
        kept += saves * habits.interval_s
    return 1 - kept / horizon_s
