"""The picture of `maskbeam evaluate`: recall over the IoU, and average recall by size."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from maskbeam.transforms.evaluation.recall import AREA_RANGES, CONFIDENCE, IOU_THRESHOLDS, MAX_PROPOSALS, Figure, Recall

_COLORS = ("#0072b2", "#d55e00", "#009e73")  # of Okabe and Ito: told apart by colour-blind eyes, too
_LINES = ("-", "--", ":")  # so that curves that coincide are seen
_BAR_WIDTH = 0.27


def plot_recall(recall: Recall) -> bytes:
    """Draws both plots beside each other, with the intervals; sizes without an object have no bar.

    Returns:
      a PNG.
    """
    canvas = Canvas(figsize=(10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    curves, bars = canvas.subplots(1, 2)
    for k, (count, color, line) in enumerate(zip(MAX_PROPOSALS, _COLORS, _LINES, strict=True)):
        values, low, high = _columns(recall.mask_recall[count])
        curves.plot(IOU_THRESHOLDS, values, line, color=color, linewidth=2, label=f"first {count} masks")
        curves.fill_between(IOU_THRESHOLDS, low, high, color=color, alpha=0.15, linewidth=0)
        values, low, high = _columns([recall.mask_ar[size][count] for size in AREA_RANGES])
        places = np.arange(len(AREA_RANGES)) + (k - 1) * _BAR_WIDTH
        errors = np.clip([values - low, high - values], 0, None)
        bars.bar(places, values, _BAR_WIDTH, yerr=errors, color=color, ecolor="#444444", capsize=2, label=f"AR@{count}")
    curves.set(xlabel="mask IoU from which on an object is found", ylabel="recall", ylim=(0, None))
    bars.set(ylabel="average recall of the masks", ylim=(0, None))
    bars.set_xticks(np.arange(len(AREA_RANGES)), [f"{size}\n{recall.objects[size]} objects" for size in AREA_RANGES])
    for axes in (curves, bars):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.suptitle(f"Class-agnostic recall of objects, with {CONFIDENCE:.0%} intervals", fontsize="medium")
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    return buffer.getvalue()


def _columns(figures: list[Figure]) -> np.ndarray:
    """(3, N) values, lower and upper bounds; NaN where there is no object."""
    return np.array([[one.value, one.low, one.high] for one in figures], float).T
