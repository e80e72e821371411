"""Original image <-> model frame: resize, pad, coordinates, and the way back for the mask logits.

SAM sees a square frame: the image resized so that its longest side fits, padded right and bottom. Its mask decoder
answers with logits over the whole frame at its own, lower resolution ("low-res"). The reference
(segment_anything/modeling/sam.py, postprocess_masks, commit dca509f) brings them back with two bilinear steps over
every mask: low-res -> frame, cut off the padding, frame -> image. Both steps are linear and separable, so here they are
composed into one matrix an axis, with at most four entries a row, and applied only to the window where a mask can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

# Largest window of upsampled logits held at once by one thread, in values of 4 bytes: 64 MB.
STRIP_VALUES = 16 * 2**20


def resized_hw(size_hw: tuple[int, int], frame_size: int) -> tuple[int, int]:
    """(H, W) after the longest side is resized to frame_size; at least one pixel, where the reference fails.

    >>> resized_hw((1200, 1800), 1024), resized_hw((1, 5000), 1024)
    ((683, 1024), (1, 1024))
    """
    scale = frame_size * 1.0 / max(size_hw)
    height, width = (max(int(side * scale + 0.5), 1) for side in size_hw)
    return height, width


def to_frame(pixels: np.ndarray, frame_size: int) -> np.ndarray:
    """Resizes (H, W, 3) uint8 by Pillow's bilinear filter (which antialiases) and zero-pads right and bottom.

    Zeros only hold the place: the model stage knows resized_hw and gives padding the value 0 after normalisation,
    as the reference does.

    Returns:
      (frame_size, frame_size, 3) uint8.
    """
    height, width = resized_hw(pixels.shape[:2], frame_size)
    frame = np.zeros((frame_size, frame_size, 3), np.uint8)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    frame[:height, :width] = np.asarray(resized)
    return frame


def to_frame_points(points_xy: np.ndarray, size_hw: tuple[int, int], frame_size: int) -> np.ndarray:
    """(N, 2) float64 (x, y) pixels of the image -> pixels of the frame."""
    height, width = resized_hw(size_hw, frame_size)
    return points_xy * np.array([width / size_hw[1], height / size_hw[0]])


@dataclass(frozen=True)
class Axis:
    """One axis of the way from low-res logits to image pixels.

    Attributes:
      matrix: (n_out, n_low) float32; row i holds the weights of image pixel i.
      first, last: (n_out,) int64, the range of low-res indices that pixel i depends on, both inclusive, ascending.
    """

    matrix: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def reach(self, low_first: int, low_last: int) -> slice:
        """The image pixels that depend on any low-res index in [low_first, low_last]."""
        return slice(int(np.searchsorted(self.last, low_first)), int(np.searchsorted(self.first, low_last, "right")))


def _bilinear_taps(n_out: int, n_in: int, scale: np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """PyTorch's half-pixel bilinear sampling (ATen/native/UpSample.h): indices i0, i1 and weights w0, w1, float32."""
    source = np.maximum(scale * (np.arange(n_out, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), np.float32(0))
    i0 = np.minimum(source.astype(np.int64), n_in - 1)
    i1 = np.minimum(i0 + 1, n_in - 1)
    w1 = np.clip(source - i0.astype(np.float32), np.float32(0), np.float32(1))
    return i0, i1, np.float32(1) - w1, w1


def _compose_axis(n_out: int, n_resized: int, n_low: int, frame_size: int) -> Axis:
    """Composes low-res -> frame and frame[:n_resized] -> image along one axis."""
    f0, f1, u0, u1 = _bilinear_taps(frame_size, n_low, np.float32(n_low) / np.float32(frame_size))
    i0, i1, v0, v1 = _bilinear_taps(n_out, n_resized, np.float32(n_resized) / np.float32(n_out))
    matrix = np.zeros((n_out, n_low), np.float32)
    rows = np.arange(n_out)
    for frame_index, weight in ((i0, v0), (i1, v1)):
        matrix[rows, f0[frame_index]] += weight * u0[frame_index]
        matrix[rows, f1[frame_index]] += weight * u1[frame_index]
    return Axis(matrix, first=f0[i0], last=f1[i1])


@dataclass(frozen=True)
class Upsampling:
    """The way from low-res logits (n_low, n_low) back to an image or crop of size_hw."""

    size_hw: tuple[int, int]
    y: Axis
    x: Axis

    @classmethod
    def build(cls, size_hw: tuple[int, int], low_size: int, frame_size: int) -> Upsampling:
        height, width = resized_hw(size_hw, frame_size)
        return cls(
            size_hw,
            y=_compose_axis(size_hw[0], height, low_size, frame_size),
            x=_compose_axis(size_hw[1], width, low_size, frame_size),
        )

    def window(self, logits: np.ndarray, threshold: float) -> tuple[slice, slice] | None:
        """The (rows, columns) of the image where an upsampled logit can exceed threshold; None if nowhere.

        Upsampled logits are convex combinations of low-res ones, so this is exact but for rounding: pass a threshold
        a little lower than the one that counts.

        Args:
          logits: (n_low, n_low) float32.
        """
        above = logits > threshold
        ys, xs = np.flatnonzero(above.any(axis=1)), np.flatnonzero(above.any(axis=0))
        if not ys.size:
            return None
        rows, cols = self.y.reach(ys[0], ys[-1]), self.x.reach(xs[0], xs[-1])
        return (rows, cols) if rows.start < rows.stop and cols.start < cols.stop else None

    def strips(self, rows: slice, cols: slice) -> list[slice]:
        """Cuts a window into column strips of at most STRIP_VALUES pixels: RLE is column-major."""
        step = max(STRIP_VALUES // (rows.stop - rows.start), 1)
        return [slice(x, min(x + step, cols.stop)) for x in range(cols.start, cols.stop, step)]

    def apply(self, logits: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
        """Upsampled logits of a window, transposed: (columns, rows) float32, so that RLE needs no transpose."""
        y_low = slice(self.y.first[rows.start], self.y.last[rows.stop - 1] + 1)
        x_low = slice(self.x.first[cols.start], self.x.last[cols.stop - 1] + 1)
        return self.x.matrix[cols, x_low] @ (logits[y_low, x_low].T @ self.y.matrix[rows, y_low].T)
