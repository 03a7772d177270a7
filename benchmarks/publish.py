"""`python -m benchmarks.publish`: the newest results of every benchmark, written into docs/BENCHMARKS.md.

docs/benchmarks.jsonl keeps them as they were measured, so that no figure of that page is typed by hand; a test holds
the two together. Results of another machine stay until that benchmark is published again from there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import FEWEST, RESULTS
from launcher.tables import ROOT, filled, markdown

PAGE = ROOT / "docs/BENCHMARKS.md"
KEPT = ROOT / "docs/benchmarks.jsonl"

Records = dict[str, dict[str, Any]]


def read(*paths: Path) -> Records:
    """The newest record of each key in files of results."""
    lines = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
    return {record["key"]: record for record in sorted(map(json.loads, lines), key=lambda record: record["time"])}


def tables(records: Records) -> Mapping[str, Any]:
    """For every record the text of its table, by its key."""
    return {key: lambda record=record: table(record) for key, record in records.items()}


def table(record: Mapping[str, Any]) -> str:
    """One benchmark's command, machine and figures."""
    rows = []
    for row in record["rows"]:
        spread = f"{row['low']:.4g} – {row['high']:.4g} (n={row['n']})" if row.get("n", 0) >= FEWEST else ""
        goal = "" if row["goal"] is None else f"{row['sense']} {row['goal']:g}: {'met' if row['met'] else 'MISSED'}"
        rows.append([" ".join(filter(None, (row["name"], row["note"]))), f"{row['value']:.4g} {row['unit']}".strip(),
                     spread, goal])  # fmt: skip
    figures = markdown(["figure", ">median or value", ">95 % interval", "goal"], rows)
    return f"`{record['command']}`\n\n{record['title']}\n\n{figures}\n\n{record['machine']}"


def main() -> int:
    """Take over what results.jsonl has of the tables that the page shows, and write it anew."""
    page = PAGE.read_text()
    found = read(KEPT, RESULTS)
    records = {key: record for key, record in found.items() if f"<!-- table: {key} -->" in page}
    for key in found.keys() - records.keys():
        print(f"{PAGE.name} has no place for {key}: put <!-- table: {key} --> and <!-- end --> there", file=sys.stderr)
    KEPT.write_text("".join(json.dumps(records[key]) + "\n" for key in sorted(records)))
    PAGE.write_text(filled(page, tables(records)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
