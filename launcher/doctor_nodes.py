"""`leviathan doctor --nodes`: is every node of a Slurm allocation fit, alone and with the others, and which is not.

What is measured is what a job measures of itself before it starts (launcher/preflight.py).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from configs.errors import DONE, WRONG_CONFIG, ConfigError, UsageError
from configs.load import to_yaml
from data_pipeline.files import human_bytes
from launcher import slurm
from launcher.config import LaunchConfig
from launcher.doctor import STYLES
from launcher.on_slurm import SlurmTeam
from launcher.preflight import MUST_AGREE, Finding, Report, speed_between
from launcher.prepare import resolve
from launcher.screen import harmless, make_table, make_terminal, told
from pretrain.amounts import duration
from pretrain.run_folder import RunFolder


def examine_nodes(files: Sequence[str], words: Sequence[str]) -> int:
    """Print how fit every node of this allocation is; return the exit code: 0, or 78 where no run would start.

    files, words: what a job would be told, of which launch.slurm counts. Raises UsageError outside of an allocation.
    """
    job = slurm.inside()
    if job is None:
        raise UsageError(
            "nodes are measured from within a Slurm job, and this is none; ask for nodes, for example with `salloc"
            " --nodes=2 leviathan doctor --nodes`"
        )
    busy = slurm.steps(job)
    if busy:
        raise UsageError(
            f"job {job} is at work ({', '.join(busy)}), which would be measured too; call this from salloc or a batch"
            " script, with no srun beside or before it"
        )
    _, launch = resolve(files, words)
    nodes = slurm.hosts(os.environ["SLURM_JOB_NODELIST"])
    terminal, began = make_terminal(), time.monotonic()
    terminal.print(f"Slurm job {job}, in {Path.cwd()}\n", soft_wrap=True)
    with terminal.status(f"measuring {len(nodes)} nodes"):
        reports, findings = _measure(job, launch.model_copy(update={"nodes": len(nodes), "ranks": len(nodes)}))
    table = make_table("", "node", ">cores", ">GPUs", ">GFLOP/s", ">memory free", ">/dev/shm free", ">disk free",
                       ">fsync", ">clock", "code")  # fmt: skip
    by_node = {report["node"]: report for report in reports}
    for node in nodes:
        state = state_of(node, node in by_node, findings)
        cells = cells_of(by_node[node]) if node in by_node else []
        table.add_row(Text(state, style=STYLES.get(state, "")), Text(node, style=STYLES.get(state, "")), *cells)
    terminal.print(table)
    if reports:
        facts = "; ".join(filter(None, [versions_of(reports), speed_between(reports)]))
        terminal.print(f"\n{facts}", soft_wrap=True)
    for finding in findings:
        style = STYLES["fail" if finding.stops else "warn"]
        terminal.print(told(f"node {finding.host} {finding.message}", style), soft_wrap=True)
    unfit = sorted({finding.host for finding in findings if finding.stops})
    took = duration(time.monotonic() - began)
    if unfit:
        verdict = (
            f"{len(unfit)} of {len(nodes)} nodes are not fit ({took}); mend or exclude: --exclude={','.join(unfit)}"
        )
        terminal.print(told(f"\n{verdict}", STYLES["fail"]), soft_wrap=True)
        return WRONG_CONFIG
    verdict = f"{len(nodes)} nodes are fit ({took})" if len(nodes) > 1 else f"the node is fit ({took})"
    terminal.print(told(f"\n{verdict}", STYLES["warn" if findings else "ok"]))
    return DONE


def _measure(job: str, launch: LaunchConfig) -> tuple[list[Report], list[Finding]]:
    """What nodes find, by way of a folder that all of them see, as they do the one that this is called in."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix="leviathan-doctor-", dir=Path.cwd(), ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(
            f"nodes leave what they find in a folder here, and {Path.cwd()} cannot be written ({error.strerror}); go to"
            " a folder of yours that every node sees"
        ) from None
    with scratch as place:
        run = RunFolder(Path(place))
        run.make()
        run.config.touch()
        run.launch.write_text(to_yaml(launch))
        team = SlurmTeam(run, launch, job)
        try:
            return team.measure()
        finally:
            team.close()


def state_of(node: str, measured: bool, findings: Sequence[Finding]) -> str:
    """ok, warn or fail; nothing where nothing is known, since another node kept all from being measured."""
    stops = [finding.stops for finding in findings if finding.host == node]
    return "fail" if any(stops) else "warn" if stops else "ok" if measured else ""


def cells_of(report: Report) -> list[str]:
    """A node's row, from its cores on."""
    free = [human_bytes(report[key]) for key in ("memory_free", "shm_free", "disk_free")]
    clock = f"{report['clock_s']:+.3f} s" if "clock_s" in report else ""
    return [str(report["cores"]), str(report["gpus"]), f"{report['flops'] / 1e9:,.0f}", *free,
            f"{1000 * report['fsync_s']:.1f} ms", clock, harmless(str(report["code"]))]  # fmt: skip


def versions_of(reports: Sequence[Report]) -> str:
    """What nodes have in common: `Python 3.11.7, torch 2.13.0`; all there are where they differ."""
    parts = []
    for key in ("python", "torch", "deepspeed"):
        found = sorted({str(report[key]) for report in reports})
        if found:
            parts.append(f"{MUST_AGREE[key]} {' and '.join(found)}")
    return harmless(", ".join(parts))
