"""Draws the figures of a benchmark as a PNG. Knows no server. matplotlib is imported only when a plot is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmserve.errors import ConfigError
from llmserve.tools.bench.load import ClosedLoop
from llmserve.tools.bench.report import TITLES, Run
from llmserve.tools.bench.summary import LATENCIES, latencies_ms

_INK, _GRID = "#333333", "#dddddd"
_SERIES = {"ttft": "#c44e52", "tpot": "#2a6f97"}


def require_matplotlib() -> None:
    """Raises ConfigError, saying what to install, so that a run does not end without the plot it was started for."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib (or leave --plot out).") from None


def save_plot(path: Path, runs: list[Run], title: str) -> None:
    """Writes the distributions of the four latencies, a line a run; below, for several runs, rates over the load."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    sweep = len(runs) > 1
    num_rows = 3 if sweep else 2
    figure = Figure(figsize=(11, 3.6 * num_rows + 0.6), dpi=120, layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    FigureCanvasAgg(figure)
    figure.suptitle(title, color=_INK, fontsize=12)
    axes = figure.subplots(num_rows, 2)
    colors = _ramp(len(runs))
    for axis, name in zip(axes.flat, LATENCIES, strict=False):
        _draw_distribution(axis, name, runs, colors)
    if sweep:
        if axes[0][0].lines:
            axes[0][0].legend(title="load", fontsize=8, title_fontsize=8, loc="lower right", frameon=False)
        _draw_throughput(axes[2][0], runs)
        _draw_latency_over_load(axes[2][1], runs)
    figure.savefig(path, format="png")


def _ramp(count: int) -> list[Any]:
    """Colours from dark to light in the order of the runs; yellow, which white paper swallows, is left out."""
    from matplotlib import colormaps

    ramp = colormaps["viridis"]
    return [ramp(0.25)] if count == 1 else [ramp(0.85 * index / (count - 1)) for index in range(count)]


def _draw_distribution(axis: Any, name: str, runs: list[Run], colors: list[Any]) -> None:
    _dress(axis, f"{TITLES[name]}, ms", "share of chunks" if name == "itl" else "share of requests")
    drawn: list[float] = []
    for run, color in zip(runs, colors, strict=True):
        values = sorted(latencies_ms(run.records, name))
        if not values:
            continue
        drawn += values
        shares = [(index + 1) / len(values) for index in range(len(values))]
        axis.step([values[0], *values], [0.0, *shares], where="post", color=color, linewidth=1.6, label=run.load.label)
        if len(runs) == 1:
            spread = run.summary.latency(name)
            assert spread is not None
            _mark_percentiles(axis, {"p50": spread.p50, "p90": spread.p90, "p99": spread.p99}, color)
    axis.set_ylim(0, 1.02)
    if not drawn:
        axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center", color=_INK)
    elif max(drawn) > 20 * max(min(drawn), 1e-3) and min(drawn) > 0:
        axis.set_xscale("log")
    else:
        axis.set_xlim(left=0)


def _mark_percentiles(axis: Any, marks: dict[str, float], color: Any) -> None:
    """Dots on the line, their values above the picture, where no line can cross them."""
    axis.plot(list(marks.values()), [float(label[1:]) / 100 for label in marks], "o", color=color, markersize=4)
    text = "    ".join(f"{label} {value:.3g}" for label, value in marks.items())
    axis.set_title(text, loc="left", fontsize=9, color=_INK)


def _draw_throughput(axis: Any, runs: list[Run]) -> None:
    _dress(axis, _load_axis(runs), "output tokens/s")
    levels = [run.load.level for run in runs]
    rates = [run.summary.output_tokens_per_s for run in runs]
    axis.plot(levels, rates, "o-", color=_SERIES["tpot"], linewidth=1.6, markersize=5)
    for level, rate in zip(levels, rates, strict=True):
        axis.annotate(f"{rate:.0f}", (level, rate), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    axis.margins(x=0.08)
    axis.set_ylim(0, max(rates) * 1.15 or 1)
    _mark_levels(axis, levels)


def _draw_latency_over_load(axis: Any, runs: list[Run]) -> None:
    from matplotlib.ticker import LogLocator

    _dress(axis, _load_axis(runs), "ms (line p50, band to p99)")
    for name, color in _SERIES.items():
        spreads = [(run.load.level, run.summary.latency(name)) for run in runs]
        points = [(level, values.p50, values.p99) for level, values in spreads if values is not None and values.p50 > 0]
        if points:
            levels, p50s, p99s = zip(*points, strict=True)
            axis.plot(levels, p50s, "o-", color=color, linewidth=1.6, markersize=5, label=TITLES[name])
            axis.fill_between(levels, p50s, p99s, color=color, alpha=0.15, linewidth=0)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.margins(x=0.08)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False)
    _mark_levels(axis, [run.load.level for run in runs])


def _load_axis(runs: list[Run]) -> str:
    return "concurrency" if isinstance(runs[0].load, ClosedLoop) else "requests/s offered"


def _mark_levels(axis: Any, levels: list[float]) -> None:
    """Ticks at the loads that were run, on a logarithmic axis where they span a wide range."""
    if max(levels) >= 8 * min(levels):
        axis.set_xscale("log", base=2)
    axis.set_xticks(levels, [f"{level:g}" for level in levels])
    axis.set_xticks([], minor=True)


def _dress(axis: Any, x_label: str, y_label: str) -> None:
    axis.set_xlabel(x_label, color=_INK)
    axis.set_ylabel(y_label, color=_INK)
    axis.grid(color=_GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=_INK, labelsize=8)
