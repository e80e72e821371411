"""Original image <-> model frame: resize, pad, coordinates, and the way back for the mask logits.

SAM sees a square frame: the image resized so that its longest side fits, padded right and bottom. Its mask decoder
answers with logits over the whole frame at its own, lower resolution ("low-res"). The reference
(segment_anything/modeling/sam.py, postprocess_masks, commit dca509f) brings them back with two bilinear steps over
every mask: low-res -> frame, cut off the padding, frame -> image. Both steps are linear and separable, so here they are
composed into one matrix an axis, with at most four entries a row, and applied only to the window where a mask can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from PIL import Image

# Largest window of upsampled logits, and largest matrix of an axis, held at once by one thread: 64 MB of float32.
STRIP_VALUES = 16 * 2**20

# Pixels of a long axis that are interpolated at once, and columns of a strip. JPEGs have fewer on a side.
_PIECE = 2**16

# Pillow computes the weights of a resize for all pixels at once, 16 bytes for each pixel of the side: 64 MB of them.
_RESIZED_AT_ONCE = 2**22


def resized_hw(size_hw: tuple[int, int], frame_size: int) -> tuple[int, int]:
    """(H, W) after the longest side is resized to frame_size; at least one pixel, where the reference fails.

    >>> resized_hw((1200, 1800), 1024), resized_hw((1, 5000), 1024)
    ((683, 1024), (1, 1024))
    """
    scale = frame_size * 1.0 / max(size_hw)
    height, width = (max(int(side * scale + 0.5), 1) for side in size_hw)
    return height, width


def to_frame(pixels: np.ndarray, frame_size: int) -> np.ndarray:
    """Resizes (H, W, 3) or (H, W) uint8 by Pillow's bilinear filter (which antialiases); zero-pads right and bottom.

    Zeros only hold the place: the model stage knows resized_hw and gives padding the value 0 after normalisation,
    as the reference does.

    Returns:
      (frame_size, frame_size, 3) or (frame_size, frame_size) uint8.
    """
    height, width = resized_hw(pixels.shape[:2], frame_size)
    frame = np.zeros((frame_size, frame_size, *pixels.shape[2:]), np.uint8)
    image = Image.fromarray(pixels)
    parts = -(-max(image.size) // _RESIZED_AT_ONCE)
    for (left, right), (top, bottom) in product(_part_ends(width, parts), _part_ends(height, parts)):
        box = (
            left * image.width / width,
            top * image.height / height,
            right * image.width / width,
            bottom * image.height / height,
        )
        resized = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box)
        frame[top:bottom, left:right] = np.asarray(resized)
    return frame


def _part_ends(side: int, parts: int) -> list[tuple[int, int]]:
    """Cuts a side into parts of about the same length; into fewer if it has fewer pixels."""
    parts = min(parts, side)
    ends = [side * part // parts for part in range(parts + 1)]
    return list(pairwise(ends))


def to_frame_points(points_xy: np.ndarray, size_hw: tuple[int, int], frame_size: int) -> np.ndarray:
    """(N, 2) float64 (x, y) pixels of the image -> pixels of the frame."""
    height, width = resized_hw(size_hw, frame_size)
    return points_xy * np.array([width / size_hw[1], height / size_hw[0]])


@dataclass(frozen=True)
class Axis:
    """One axis of the way from low-res logits to image pixels.

    The two bilinear steps are one matrix where that is small. On a longer axis, where many pixels lie between two of
    the frame's, pixels are interpolated from the frame as they are needed: a matrix of 30,000,000 pixels by 256 logits
    would take 30 GB.

    Attributes:
      matrix: (n_out, n_low) float32, row i holds the weights of image pixel i; None for a long axis.
      frame_matrix: (n_resized, n_low) float32, the first step alone.
      n_out: pixels of the image.
      begins, ends: (n_low,) int64; pixels begins[i]:ends[i] are those that depend on low-res index i. Both ascend.
    """

    matrix: np.ndarray | None
    frame_matrix: np.ndarray
    n_out: int
    begins: np.ndarray
    ends: np.ndarray

    def reach(self, low_first: int, low_last: int) -> slice:
        """The image pixels that depend on any low-res index in [low_first, low_last]."""
        return slice(int(self.begins[low_first]), int(self.ends[low_last]))

    def support(self, pixels: slice) -> slice:
        """The low-res indices that the image pixels depend on."""
        first = np.searchsorted(self.ends, pixels.start, "right")
        return slice(int(first), int(np.searchsorted(self.begins, pixels.stop - 1, "right")))

    def interpolate(self, values: np.ndarray, pixels: slice) -> np.ndarray:
        """Values at image pixels, from those at the low-res indices in their support; for an axis without a matrix.

        Args:
          values: (n_support, k) float32.

        Returns:
          (n_pixels, k) float32.
        """
        in_frame = self.frame_matrix[:, self.support(pixels)] @ values
        out = np.empty((pixels.stop - pixels.start, values.shape[1]), np.float32)
        for piece in _pieces(pixels):
            i0, i1, w0, w1 = _bilinear_taps(piece, self.n_out, len(self.frame_matrix))
            blended = in_frame[i0] * w0[:, None]
            blended += in_frame[i1] * w1[:, None]
            out[piece.start - pixels.start : piece.stop - pixels.start] = blended
        return out


def _pieces(pixels: slice) -> Iterator[slice]:
    """Cuts a range of pixels, so that what is computed for each pixel stays in the cache."""
    for first in range(pixels.start, pixels.stop, _PIECE):
        yield slice(first, min(first + _PIECE, pixels.stop))


def _bilinear_taps(pixels: slice, n_out: int, n_in: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """PyTorch's half-pixel bilinear sampling (ATen/native/UpSample.h): indices i0, i1 and weights w0, w1, float32."""
    scale = np.float32(n_in) / np.float32(n_out)
    positions = np.arange(pixels.start, pixels.stop).astype(np.float32)
    source = np.maximum(scale * (positions + np.float32(0.5)) - np.float32(0.5), np.float32(0))
    i0 = np.minimum(source.astype(np.int64), n_in - 1)
    i1 = np.minimum(i0 + 1, n_in - 1)
    w1 = np.clip(source - i0.astype(np.float32), np.float32(0), np.float32(1))
    return i0, i1, np.float32(1) - w1, w1


def _compose_axis(n_out: int, n_resized: int, n_low: int, frame_size: int) -> Axis:
    """Composes low-res -> frame and frame[:n_resized] -> image along one axis."""
    f0, f1, u0, u1 = _bilinear_taps(slice(0, frame_size), frame_size, n_low)
    frame_matrix = np.zeros((n_resized, n_low), np.float32)
    for low_index, weight in ((f0, u0), (f1, u1)):
        frame_matrix[np.arange(n_resized), low_index[:n_resized]] += weight[:n_resized]
    begins, ends = np.zeros(n_low, np.int64), np.zeros(n_low, np.int64)
    for piece in _pieces(slice(0, n_out)):
        i0, i1, _, _ = _bilinear_taps(piece, n_out, n_resized)
        begins += np.searchsorted(f1[i1], np.arange(n_low))  # pixels whose last index is lower
        ends += np.searchsorted(f0[i0], np.arange(n_low), "right")  # pixels whose first index is not higher
    matrix = None
    if n_out * n_low <= STRIP_VALUES:
        i0, i1, v0, v1 = _bilinear_taps(slice(0, n_out), n_out, n_resized)
        matrix = np.zeros((n_out, n_low), np.float32)
        rows = np.arange(n_out)
        for frame_index, weight in ((i0, v0), (i1, v1)):
            matrix[rows, f0[frame_index]] += weight * u0[frame_index]
            matrix[rows, f1[frame_index]] += weight * u1[frame_index]
    return Axis(matrix, frame_matrix, n_out, begins, ends)


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

    def strips(self, rows: slice, cols: slice) -> Iterator[tuple[slice, slice]]:
        """Cuts a window into (rows, columns) of at most STRIP_VALUES pixels, in the order of RLE, column by column.

        Of a very low and wide window there are more strips, since each column has runs of its own at first.
        """
        step = min(max(STRIP_VALUES // (rows.stop - rows.start), 1), _PIECE)
        for x in range(cols.start, cols.stop, step):
            for y in range(rows.start, rows.stop, STRIP_VALUES):  # once, unless one column is too much
                yield slice(y, min(y + STRIP_VALUES, rows.stop)), slice(x, min(x + step, cols.stop))

    def apply(self, logits: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
        """Upsampled logits of a window, transposed: (columns, rows) float32, so that RLE needs no transpose."""
        y_low, x_low = self.y.support(rows), self.x.support(cols)
        low = logits[y_low, x_low]
        tall = self.y.interpolate(low, rows).T if self.y.matrix is None else low.T @ self.y.matrix[rows, y_low].T
        return self.x.interpolate(tall, cols) if self.x.matrix is None else self.x.matrix[cols, x_low] @ tall
