"""Numbers and times as people read them. No library is imported here: every command needs some of this."""

from __future__ import annotations

import math


def short_number(value: float) -> str:
    """`12.3k` for 12,345; `12k` for 12,000."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5 or unit == "T":
            digits = max(0, 2 - int(math.log10(max(abs(value), 1))))
            return f"{round(value, digits):.15g}{unit}"
        value /= 1000
    raise AssertionError("the loop ends at T")


def duration(seconds: float) -> str:
    """`2 h 05 min` for 7,500 seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 72 else f"{hours // 24} d {hours % 24} h"
