"""Connected regions of a mask, on its runs: the time and memory depend on the mask's outline, not on the image's size.

The reference removes small holes and islands with OpenCV on full-size arrays (segment_anything/utils/amg.py,
remove_small_regions, commit dca509f). Here regions are joined run by run, with the same 8-connectivity.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from maskbeam.transforms.masks.rle import Runs, join_runs


def remove_small_regions(runs: Runs, min_area: int) -> tuple[Runs, bool]:
    """Fills holes, then removes islands, of fewer than min_area pixels; if all islands are small, the largest stays.

    Returns:
      the mask, and whether it changed.
    """
    height, width = runs.size_hw
    if not (runs.starts % height).any() and not (runs.ends % height).any():
        # Of whole columns, as in an image one pixel high: one column has the same regions, in a run each. Runs are cut
        # at columns below, and a panorama of millions of columns would have that many pieces.
        runs = Runs((height * width, 1), runs.starts, runs.ends)
    without_holes, filled = _fill_small_holes(runs, min_area)
    without_islands, removed = _remove_small_islands(without_holes, min_area)
    return replace(without_islands, size_hw=(height, width)), filled or removed


def _fill_small_holes(runs: Runs, min_area: int) -> tuple[Runs, bool]:
    background = _split_columns(_complement(runs))
    labels, areas = _label_regions(background)
    small = areas[labels] < min_area
    if not small.any():
        return runs, False
    kept = Runs(runs.size_hw, background.starts[~small], background.ends[~small])
    return _complement(join_runs([kept], runs.size_hw)), True


def _remove_small_islands(runs: Runs, min_area: int) -> tuple[Runs, bool]:
    foreground = _split_columns(runs)
    labels, areas = _label_regions(foreground)
    keep = areas[labels] >= min_area
    if keep.all():
        return runs, False
    if not keep.any():
        keep = labels == _first_as_numbered(foreground, labels, areas == areas.max())
    return join_runs([Runs(runs.size_hw, foreground.starts[keep], foreground.ends[keep])], runs.size_hw), True


def _complement(runs: Runs) -> Runs:
    """The runs of the unset pixels."""
    pixels = runs.size_hw[0] * runs.size_hw[1]
    starts, ends = np.r_[0, runs.ends], np.r_[runs.starts, pixels]
    some = starts < ends
    return Runs(runs.size_hw, starts[some], ends[some])


def _split_columns(runs: Runs) -> Runs:
    """Cuts runs where they cross from one column into the next."""
    height = runs.size_hw[0]
    first, last = runs.starts // height, (runs.ends - 1) // height
    pieces = last - first + 1
    run = np.repeat(np.arange(len(runs.starts)), pieces)
    column = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.maximum(runs.starts[run], column * height)
    ends = np.minimum(runs.ends[run], (column + 1) * height)
    return Runs(runs.size_hw, starts, ends)


def _label_regions(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """8-connected regions of runs that do not cross columns.

    Returns:
      labels: (R,) int64, the region of each run, numbered from 0.
      areas: (regions,) int64 pixels.
    """
    count, height = len(runs.starts), runs.size_hw[0]
    column = runs.starts // height
    # Run b of the next column touches run a if b starts no lower than a's end and ends no higher than a's start, one
    # pixel of diagonal allowed. Shifted by one column, the candidates of each a are consecutive.
    next_column = (column + 1) * height
    low = np.searchsorted(runs.ends, np.maximum(runs.starts + height, next_column + 1))
    high = np.searchsorted(runs.starts, np.minimum(runs.ends + height, next_column + height - 1), "right")
    parent = list(range(count))

    def find(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    for a, (b0, b1) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        for b in range(b0, b1):
            parent[find(b)] = find(a)
    roots, labels = np.unique([find(run) for run in range(count)], return_inverse=True)
    areas = np.bincount(labels, weights=runs.ends - runs.starts, minlength=len(roots)).astype(np.int64)
    return labels, areas


def _first_as_numbered(runs: Runs, labels: np.ndarray, candidates: np.ndarray) -> int:
    """Of the regions marked in candidates, the first as OpenCV numbers them: by their first 2x2 block, row by row."""
    height, width = runs.size_hw
    block = runs.starts % height // 2 * width + runs.starts // height // 2
    block[~candidates[labels]] = height * width
    return int(labels[np.argmin(block)])
