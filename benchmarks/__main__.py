"""`python -m benchmarks NAME`: prints a table, appends it to results.jsonl, exits 1 on a miss."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys

from data_pipeline.host_memory import keep_freed_memory

LOSSES = ("shakespeare", "mixers", "moe", "wrap", "pairs", "ensemble_quality", "clusters", "published")
NAMES = ("step", "layers", "data", "checkpoint", "start", "ensemble", "scale", *LOSSES)


def main() -> int:
    """Run the benchmark that is named first."""
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(f"usage: python -m benchmarks {'|'.join(NAMES)} [options]; each has --help", file=sys.stderr)
        return 2
    name = sys.argv[1]
    # one thread, before torch looks: arms are compared by CPU time of one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    keep_freed_memory()  # as every rank does
    module = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=module.__doc__)
    module.add_options(parser)
    table = module.run(parser.parse_args(sys.argv[2:]))
    words = [name, *sys.argv[2:]]
    return table.finish(key_of(words), f"python -m benchmarks {' '.join(words)}")


def key_of(words: list[str]) -> str:
    """What a benchmark's results are kept under: its words, but for where a file lies."""
    told = re.sub(r"--file[= ]\S+", "", " ".join(words))
    return re.sub(r"\W+", "_", told).strip("_")


if __name__ == "__main__":
    sys.exit(main())
