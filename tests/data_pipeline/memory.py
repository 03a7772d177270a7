"""How much memory reading takes: asked in a process of its own, since a peak is only seen where none was higher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

READ = """
import json, sys
from pathlib import Path
from configs.errors import DataError
from tests.data_pipeline.reading import read_all

def kib(name):
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])

before, said = kib("VmRSS"), []
for path in sys.argv[1:]:
    try:
        said.append(f"{len(read_all(path))} documents")
    except DataError as error:
        said.append(f"refused: {error}")
# not ru_maxrss, which begins with the memory of the process that started this one
print(json.dumps([said, kib("VmHWM") - before]))
"""


def memory_to_read(*paths: Path) -> tuple[list[str], int]:
    """What became of each file, one read after the other, and the KiB that this took at its most."""
    words = [sys.executable, "-c", READ, *map(str, paths)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said, kib = json.loads(done.stdout)
    return said, kib
