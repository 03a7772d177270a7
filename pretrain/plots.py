"""The figures of the report: one function each, from plain numbers to the text of an SVG image.

The only file that draws; matplotlib is imported when the first figure is. Every colour comes from `LIGHT`; `dark`
replaces each by its partner in `DARK`, so a figure is drawn once for both.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.amounts import short_number

SERIES_LIGHT = ("#2563eb", "#d9480f", "#0f8a5f", "#9333ea", "#b7791f", "#0e7c9b", "#c2255c", "#5c7c0a")
SERIES_DARK = ("#7aa7ff", "#ff9a66", "#4fd1a0", "#c796ff", "#f0c15a", "#5ccbe8", "#ff86ad", "#b4d455")
LIGHT = {
    "page": "#fffffe",
    "ink": "#1f2430",
    "quiet": "#6b7385",
    "grid": "#e3e6ec",
    "bad": "#d92d3a",
    "good": "#1a9e57",
}
DARK = {"page": "#14161a", "ink": "#e8eaf0", "quiet": "#98a1b3", "grid": "#31363f", "bad": "#ff7b84", "good": "#54d68c"}

POINTS = 1200
LABELLED_INCIDENTS = 6


@dataclass(frozen=True)
class Line:
    """A curve: its label, where it is, how high."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]


@dataclass(frozen=True)
class Incident:
    """A stop of the run: the step it came to, the step it went on from (None: unknown, or never), what happened."""

    died: int | None
    resumed: int | None
    label: str


class _Styled(contextlib.ContextDecorator):
    """What all figures have in common, for as long as one is drawn."""

    def __enter__(self) -> None:
        import matplotlib as mpl

        quiet, grid = LIGHT["quiet"], LIGHT["grid"]
        style: dict[Any, Any] = {
            "svg.fonttype": "none", "svg.hashsalt": "leviathan", "font.family": ["DejaVu Sans"], "font.size": 9.5,
            "axes.edgecolor": grid, "axes.labelcolor": quiet, "xtick.color": quiet, "ytick.color": quiet,
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
            "grid.color": grid, "grid.linewidth": 0.8, "text.color": LIGHT["ink"], "legend.frameon": False,
            "legend.fontsize": 9, "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0,
            "ytick.minor.size": 0, "text.parse_math": False,
        }  # fmt: skip
        self._context = mpl.rc_context(style)
        self._context.__enter__()

    def __exit__(self, *problem: Any) -> None:
        self._context.__exit__(*problem)


@_Styled()
def loss(
    lines: list[Line], redone: list[Line], heldout: list[Line], incidents: list[Incident], *, narrow: bool = False
) -> str:
    """Training loss over steps, what was done twice as a pale band below it, held-out points, and every stop."""
    figure, (axes,) = _figure(1, (5.2, 4.4) if narrow else (10.4, 4.3))
    for line in redone:
        axes.plot(*_thin(line), color=LIGHT["bad"], linewidth=6, alpha=0.22, solid_capstyle="round", zorder=1)
    for index, line in enumerate(lines):
        _curve(axes, line, SERIES_LIGHT[index % len(SERIES_LIGHT)], smooth=True)
    for index, line in enumerate(heldout):
        color = SERIES_LIGHT[index % len(SERIES_LIGHT)] if len(lines) > 1 else LIGHT["ink"]
        axes.plot(line.x, _numbers(line.y), "o", color=color, markersize=4.5, markeredgecolor="none", zorder=5)
        axes.plot(line.x, _numbers(line.y), ":", color=color, linewidth=1.1, zorder=4)
    values = _finite([*lines, *heldout])
    if values and min(values) > 0 and max(values) / min(values) > 3:
        _log_scale(axes, min(values), max(values))
    _mark(axes, incidents, narrow)
    _legend_of_loss(axes, lines, bool(redone), bool(heldout), narrow)
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlabel("step")
    return _svg(figure)


@_Styled()
def gradient_and_lr(norms: list[Line], rates: list[Line]) -> str:
    """Norm of the gradient before clipping, and the learning rate."""
    figure, (above, below) = _figure(2, (5.2, 4.2))
    for index, (norm, rate) in enumerate(zip(norms, rates)):
        color = SERIES_LIGHT[index % len(SERIES_LIGHT)]
        _curve(above, norm, color, smooth=False)
        _curve(below, rate, color, smooth=False)
    values = _finite(norms)
    if values and min(values) > 0 and max(values) / min(values) > 30:
        _log_scale(above, min(values), max(values))
    above.set_ylabel("gradient norm")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    below.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _legend(above, norms)
    return _svg(figure)


@_Styled()
def throughput(rates: list[Line], mfus: list[Line]) -> str:
    """Tokens per second, and below it the share of the devices' peak where that is known."""
    figure, panels = _figure(2 if mfus else 1, (5.2, 4.2 if mfus else 3.2))
    for index, line in enumerate(rates):
        _curve(panels[0], line, SERIES_LIGHT[index % len(SERIES_LIGHT)], smooth=False)
    for index, line in enumerate(mfus):
        percent = Line(line.label, line.x, [None if v is None else 100 * v for v in line.y])
        _curve(panels[-1], percent, SERIES_LIGHT[index % len(SERIES_LIGHT)], smooth=False)
    panels[0].set_ylabel("tokens per second")
    panels[0].yaxis.set_major_formatter(lambda value, _: short_number(value))
    if mfus:
        panels[-1].set_ylabel("MFU (%)")
    for panel in panels:
        panel.set_ylim(bottom=0)
    panels[-1].set_xlabel("step")
    _legend(panels[0], rates)
    return _svg(figure)


@_Styled()
def by_source(lines: list[Line], *, wide: bool = False) -> str:
    """Training loss of every source."""
    figure, (axes,) = _figure(1, (10.4 if wide else 5.2, 3.6))
    for index, line in enumerate(lines):
        _curve(axes, line, SERIES_LIGHT[index % len(SERIES_LIGHT)], smooth=True)
    values = _finite(lines)
    if values and min(values) > 0 and max(values) / min(values) > 3:
        _log_scale(axes, min(values), max(values))
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlabel("step")
    _legend(axes, lines, always=True)
    return _svg(figure)


@_Styled()
def heldout_bars(sources: list[str], bits: dict[str, list[float | None]]) -> str:
    """Bits per byte of every held-out source, side by side for every run. bits: by run, in the order of `sources`."""
    rows = len(sources) * (len(bits) + 0.6)
    figure, (axes,) = _figure(1, (5.2, min(9.0, 1.1 + 0.32 * rows)))
    height = 0.8 / max(1, len(bits))
    for index, (name, values) in enumerate(bits.items()):
        places = [place + height * (index - (len(bits) - 1) / 2) for place in range(len(sources))]
        bars = axes.barh(
            places, _numbers(values), height * 0.9, color=SERIES_LIGHT[index % len(SERIES_LIGHT)], label=name
        )
        axes.bar_label(bars, fmt=lambda v: f"{v:.3f}" if math.isfinite(v) else "", padding=4, color=LIGHT["ink"])
    axes.set_yticks(range(len(sources)), sources)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.16)
    axes.set_xlabel("held-out bits per byte (lower is better)")
    if len(bits) > 1:
        figure.legend(loc="outside upper left", ncols=2)
    return _svg(figure)


@_Styled()
def by_position(lines: list[Line]) -> str:
    """Held-out loss against the place of a token in its document's part of a row: what context is worth."""
    figure, (axes,) = _figure(1, (5.2, 3.6))
    for index, line in enumerate(lines):
        color = SERIES_LIGHT[index % len(SERIES_LIGHT)]
        axes.plot(line.x, _numbers(line.y), "o-", color=color, linewidth=1.6, markersize=3.5, label=line.label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_xlabel("position in the text")
    _legend(axes, lines)
    return _svg(figure)


@_Styled()
def relevance(of_sources: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """A square for every source and module: the darker, the more relevant. of_sources: relevance and loss by module."""
    return _svg(_relevance(of_sources))


@_Styled()
def relevance_png(of_sources: Mapping[str, Mapping[str, tuple[float, float]]]) -> bytes:
    """The same as a PNG image on white, for where SVG is not shown."""
    image = io.BytesIO()
    _relevance(of_sources).savefig(image, format="png", dpi=160, metadata={"Software": None})
    return image.getvalue()


@_Styled()
def relevance_over_training(lines: list[Line]) -> str:
    """Relevance of each source's most relevant module, evaluation by evaluation."""
    figure, (axes,) = _figure(1, (5.2, 3.6))
    for index, line in enumerate(lines):
        color = SERIES_LIGHT[index % len(SERIES_LIGHT)]
        axes.plot(line.x, _numbers(line.y), "o-", color=color, linewidth=1.6, markersize=3.5, label=line.label)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("relevance")
    axes.set_xlabel("step")
    _legend(axes, lines, always=True)
    return _svg(figure)


@_Styled()
def loads(lines: list[Line]) -> str:
    """Loads of experts as multiples of an equal share, over training."""
    figure, (axes,) = _figure(1, (5.2, 3.6))
    axes.axhline(1.0, linewidth=0.8, color=LIGHT["grid"])
    for index, line in enumerate(lines):
        _curve(axes, line, SERIES_LIGHT[index % len(SERIES_LIGHT)], smooth=True)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("load (1: an equal share)")
    axes.set_xlabel("step")
    _legend(axes, lines, always=True)
    return _svg(figure)


def dark(svg: str) -> str:
    """The same figure for a dark page."""
    pairs = (*zip(LIGHT.values(), DARK.values()), *zip(SERIES_LIGHT, SERIES_DARK))
    for light, partner in pairs:
        svg = svg.replace(light, partner)
    return svg


def _figure(rows: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """An empty figure of `rows` panels, size in inches, that no display and no other user of matplotlib knows of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]
    for panel in panels[:-1]:
        panel.tick_params(labelbottom=False)
    return figure, panels


def _relevance(of_sources: Mapping[str, Mapping[str, tuple[float, float]]]) -> Any:
    sources, modules = list(of_sources), list(dict.fromkeys(m for of in of_sources.values() for m in of))
    figure, (axes,) = _figure(1, (max(3.2, 1.4 + 0.95 * len(modules)), 0.9 + 0.75 * len(sources)))
    for row, source in enumerate(sources):
        for column, module in enumerate(modules):
            share, loss = of_sources[source].get(module, (0.0, math.nan))
            axes.bar(column, 0.94, 0.94, row - 0.47, color=SERIES_LIGHT[0], alpha=0.06 + 0.84 * share, linewidth=0)
            color = LIGHT["page"] if share > 0.6 else LIGHT["ink"]
            axes.text(column, row - 0.04, f"{share:.0%}", ha="center", va="bottom", color=color, fontsize=11)
            axes.text(column, row + 0.06, f"{loss:.3f}", ha="center", va="top", color=color, fontsize=8)
    axes.set_xticks(range(len(modules)), modules)
    axes.set_yticks(range(len(sources)), sources)
    axes.set_xlabel("module: relevance, and loss (nats per token)")
    axes.set_ylabel("source")
    axes.set_ylim(len(sources) - 0.5, -0.5)
    axes.set_xlim(-0.5, len(modules) - 0.5)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return text.getvalue().replace("'DejaVu Sans'", "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif")


def _numbers(values: Sequence[float | None]) -> Any:
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _finite(lines: list[Line]) -> list[float]:
    return [value for line in lines for value in line.y if value is not None and math.isfinite(value)]


def _bins(line: Line) -> tuple[Any, Any, Any, Any]:
    """Centre, mean, least and greatest of at most `POINTS` groups of neighbours."""
    x, y = np.asarray(line.x, dtype=float), _numbers(line.y)
    size = max(1, math.ceil(len(x) / POINTS))
    starts = np.arange(0, len(x), size)
    if not len(x):
        return x, y, y, y
    counts = np.diff(np.append(starts, len(x)))
    finite = np.add.reduceat(np.isfinite(y), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.nan_to_num(y, posinf=0, neginf=0), starts) / np.where(finite, finite, np.nan)
    low, high = (f.reduceat(y, starts) for f in (np.fmin, np.fmax))
    return np.add.reduceat(x, starts) / counts, mean, low, high


def _thin(line: Line) -> tuple[Any, Any]:
    x, mean, _, _ = _bins(line)
    return x, mean


def _curve(axes: Any, line: Line, color: str, *, smooth: bool) -> None:
    """A curve that stays light at a million steps. smooth: what was measured is pale, its running mean stands out."""
    x, mean, low, high = _bins(line)
    if len(x) == 1:
        axes.plot(x, mean, "o", color=color, markersize=5, label=line.label, zorder=3)
        return
    if smooth and len(x) >= 60:
        if len(line.x) > len(x):
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0, zorder=2)
        else:
            axes.plot(x, mean, color=color, linewidth=0.9, alpha=0.38, zorder=2)
        mean = _running_mean(mean, max(3, len(mean) // 60))
    axes.plot(x, mean, color=color, linewidth=1.6, label=line.label, zorder=3)


def _running_mean(values: Any, width: int) -> Any:
    """Mean over `width` neighbours on both sides together, fewer at the ends; values that are not finite count not."""
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), np.ones(width), "same")
    count = np.convolve(finite, np.ones(width), "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _log_scale(axes: Any, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_yscale("log")
    steps = (1, 2, 3, 5, 7) if high / low < 20 else (1, 3) if high / low < 1000 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    axes.yaxis.set_major_locator(FixedLocator([step * 10.0**decade for decade in decades for step in steps]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _mark(axes: Any, incidents: list[Incident], narrow: bool) -> None:
    """Where the run stopped (red), where it went on (green), and the steps between, which were done again."""
    labelled = len(incidents) <= (LABELLED_INCIDENTS // 2 if narrow else LABELLED_INCIDENTS)
    for index, incident in enumerate(incidents):
        if incident.died is not None:
            axes.axvline(incident.died, color=LIGHT["bad"], linewidth=1.1, linestyle=(0, (4, 3)), zorder=2)
        if incident.resumed is not None:
            axes.axvline(incident.resumed, color=LIGHT["good"], linewidth=1.1, zorder=2)
        if incident.died is not None and incident.resumed is not None and incident.resumed < incident.died:
            axes.axvspan(incident.resumed, incident.died, color=LIGHT["bad"], alpha=0.07, linewidth=0, zorder=0)
        place = incident.resumed if incident.died is None else incident.died
        if labelled and place is not None:
            again = "" if narrow or None in (incident.died, incident.resumed) else f", resumed at {incident.resumed:,}"
            left, right = axes.get_xlim()
            beyond = place > left + 0.6 * (right - left)
            place = incident.resumed if beyond and incident.resumed is not None else place
            color = LIGHT["good"] if incident.died is None else LIGHT["bad"]
            axes.annotate(
                incident.label + again, (place, 0.97 - 0.075 * (index % 4)), xycoords=("data", "axes fraction"),
                xytext=(-5 if beyond else 5, 0), textcoords="offset points", ha="right" if beyond else "left",
                va="top", color=color, fontsize=8.5, zorder=6,
            )  # fmt: skip


def _legend(axes: Any, lines: list[Line], *, always: bool = False) -> None:
    if always or len(lines) > 1:
        axes.legend(loc="best")


def _legend_of_loss(axes: Any, lines: list[Line], redone: bool, heldout: bool, narrow: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [handle for handle in axes.get_lines() if handle.get_label() in {line.label for line in lines}]
    if heldout:
        handles.append(Line2D([], [], color=LIGHT["ink"], marker="o", linestyle=":", markersize=4.5, label="held-out"))
    if redone:
        handles.append(Line2D([], [], color=LIGHT["bad"], linewidth=6, alpha=0.22, label="lost in a crash, done again"))
    if len(handles) > 1:
        axes.figure.legend(handles=handles, loc="outside lower center", ncols=2 if narrow else 5)
