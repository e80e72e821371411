"""Grids of point prompts.

Ported from facebookresearch/segment-anything, segment_anything/utils/amg.py, commit dca509f.
"""

from __future__ import annotations

import numpy as np


def build_point_grid(points_per_side: int) -> np.ndarray:
    """Evenly spaced points over the unit square, x fastest.

    Returns:
      (points_per_side**2, 2) float64 (x, y) in (0, 1).

    >>> build_point_grid(2).tolist()
    [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    """
    offset = 1 / (2 * points_per_side)
    side = np.linspace(offset, 1 - offset, points_per_side)
    return np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)


def build_layer_point_grids(points_per_side: int, n_layers: int, downscale_factor: int) -> list[np.ndarray]:
    """One grid for the full image and one for each crop layer: layer i has int(n / factor**i) points a side.

    Raises:
      ValueError: a layer would have no points.
    """
    grids = []
    for layer in range(n_layers + 1):
        side = int(points_per_side / downscale_factor**layer)
        if side < 1:
            raise ValueError(
                f"crop layer {layer} has no points: points_per_side={points_per_side} divided by "
                f"crop_n_points_downscale_factor={downscale_factor} to the power {layer} is below 1. "
                "Raise points_per_side, or lower the factor or crop_n_layers."
            )
        grids.append(build_point_grid(side))
    return grids
