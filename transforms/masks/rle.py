"""COCO run-length encoding, from column-major runs and back. The only place that imports pycocotools.

COCO counts run lengths down the columns, zeros first: the 2x2 mask with its right column set, columns [0 0] [1 1], has
counts [2, 2]. The compressed form packs the counts into a string (cocodataset/cocoapi, common/maskApi.c).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

# Images of more pixels have no RLE here: pycocotools counts them in 32 bits, some of them with a sign.
MAX_PIXELS = 2**31 - 1

# A character of a compressed RLE is 48 plus a group of 5 bits, plus 32 if the number has more groups.
_MORE = 48 + 32
_HIGHEST = 48 + 63
_MAX_GROUPS = 7  # 35 bits, for lengths of up to 32 and a sign
_LAST_GROUP = ((np.arange(256) - 48 & 31) ^ 16) - 16  # its value, by the character: the highest bit is the sign

# What counts_to_areas works on at once.
_BLOCK_CHARACTERS = 2**15


@dataclass(frozen=True)
class Runs:
    """The set pixels of a mask as runs of the column-major image.

    Attributes:
      size_hw: (H, W) of the image.
      starts, ends: (R,) int64 positions x * H + y, ends exclusive, ascending, disjoint and not touching.
    """

    size_hw: tuple[int, int]
    starts: np.ndarray
    ends: np.ndarray

    @property
    def area(self) -> int:
        return int((self.ends - self.starts).sum())


def bits_to_runs(bits: np.ndarray, offset_xy: tuple[int, int], size_hw: tuple[int, int]) -> Runs:
    """Runs of a window of a mask.

    Args:
      bits: (columns, rows) bool, transposed.
      offset_xy: the window's top left corner in the image.
      size_hw: (H, W) of the image.

    >>> bits_to_runs(np.array([[False, True], [True, True]]), (1, 0), (2, 3))
    Runs(size_hw=(2, 3), starts=array([3]), ends=array([6]))
    """
    x0, y0 = offset_xy
    columns, rows = bits.shape
    # Each column is closed by a zero on both sides, so that run starts and ends alternate.
    padded = np.zeros((columns, rows + 2), bool)
    padded[:, 1:-1] = bits
    edges = np.flatnonzero(padded[:, 1:].ravel() ^ padded[:, :-1].ravel())
    positions = (edges // (rows + 1) + x0) * size_hw[0] + edges % (rows + 1) + y0
    return join_runs([Runs(size_hw, positions[0::2], positions[1::2])], size_hw)


def join_runs(parts: list[Runs], size_hw: tuple[int, int]) -> Runs:
    """Concatenates runs of consecutive windows and merges those that touch, as across a column's border."""
    if not parts:
        return Runs(size_hw, np.zeros(0, np.int64), np.zeros(0, np.int64))
    starts = np.concatenate([part.starts for part in parts])
    ends = np.concatenate([part.ends for part in parts])
    apart = starts[1:] != ends[:-1]
    return Runs(size_hw, starts[np.r_[True, apart][: len(starts)]], ends[np.r_[apart, True][: len(ends)]])


def runs_to_counts(runs: Runs) -> str:
    """COCO compressed RLE string.

    >>> runs_to_counts(Runs((2, 2), np.array([2]), np.array([4])))
    '22'
    """
    height, width = runs.size_hw
    bounds = np.empty(2 * len(runs.starts) + 2, np.int64)
    bounds[0], bounds[-1] = 0, height * width
    bounds[1:-1:2], bounds[2:-1:2] = runs.starts, runs.ends
    counts = np.diff(bounds)
    if counts[-1] == 0 and len(counts) > 1:
        counts = counts[:-1]
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)["counts"].decode()


def counts_to_lengths(counts: str) -> np.ndarray:
    """Run lengths of a compressed RLE, (R,) int64, zeros first.

    The string holds each length, from the fourth on its difference from the one before the last, in groups of 5 bits,
    lowest first; a character is 48 plus the group, plus 32 if more groups follow, and the last group has the sign
    (rleFrString in cocodataset/cocoapi, common/maskApi.c).

    Raises:
      ValueError: the string is no RLE. pycocotools does not check, and reads or writes where it should not.

    >>> counts_to_lengths("22")
    array([2, 2])
    """
    groups = np.frombuffer(counts.encode(), np.uint8) - 48  # characters below 48 wrap around, beyond 63
    if not len(groups) or groups.max() > 63 or groups[-1] >= 32:
        raise ValueError(f"{counts[:40]!r} is no compressed RLE")
    last = np.flatnonzero(groups < 32)  # of each number
    first = np.zeros_like(last)
    first[1:] = last[:-1] + 1
    sizes = last - first + 1
    if sizes.max() > _MAX_GROUPS:
        raise ValueError(f"{counts[:40]!r} is no compressed RLE: it has a length beyond 32 bits")
    places = np.arange(len(groups)) - np.repeat(first, sizes)
    lengths = np.add.reduceat((groups & 31).astype(np.int64) << 5 * places, first)
    lengths -= (groups[last] & 16).astype(np.int64) << 5 * sizes - 4  # the sign
    lengths[1::2] = np.cumsum(lengths[1::2])
    lengths[2::2] = np.cumsum(lengths[2::2])
    return lengths


def counts_to_areas(characters: np.ndarray, offsets: np.ndarray, num_pixels: np.ndarray) -> np.ndarray:
    """Checks many compressed RLEs at once: the areas of their masks.

    Args:
      characters: (C,) uint8, of all strings.
      offsets: (N + 1,) int64, string i is characters[offsets[i] : offsets[i + 1]].
      num_pixels: (N,) int64, pixels of the image of each.

    Returns:
      (N,) int64 pixels; -1 for a string that is no RLE of so many pixels, for which check_counts says why.

    >>> counts_to_areas(np.frombuffer(b"2223", np.uint8), np.array([0, 2, 4]), np.array([4, 4]))
    array([ 2, -1])
    """
    areas = np.empty(len(num_pixels), np.int64)
    first = 0
    while first < len(areas):  # blocks that stay in the processor's cache, of one string at least
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _BLOCK_CHARACTERS, "right")) - 1)
        block = characters[offsets[first] : offsets[last]]
        areas[first:last] = _block_to_areas(block, offsets[first : last + 1] - offsets[first], num_pixels[first:last])
        first = last
    return areas


def _block_to_areas(characters: np.ndarray, offsets: np.ndarray, num_pixels: np.ndarray) -> np.ndarray:
    """counts_to_areas without the blocks. As in counts_to_lengths, but for all strings together."""
    ends = np.flatnonzero(characters < _MORE)  # the last group of each number
    sizes = np.diff(ends, prepend=-1)
    well_formed = _well_formed(characters, offsets, ends, sizes)
    if not well_formed.all():
        areas = np.full(len(num_pixels), -1)
        lengths = np.diff(offsets)
        if well_formed.any():
            kept = characters[np.repeat(well_formed, lengths)]
            kept_offsets = np.r_[0, np.cumsum(lengths[well_formed])]
            areas[well_formed] = _block_to_areas(kept, kept_offsets, num_pixels[well_formed])
        return areas
    values = _LAST_GROUP[characters[ends]]
    longer = np.flatnonzero(sizes > 1)
    for place in range(1, int(sizes.max(initial=1))):
        longer = longer[sizes[longer] > place]
        values[longer] = values[longer] << 5 | (characters[ends[longer] - place] - 48 & 31)

    # Runs of zeros and of ones take turns. Each string gets an even number of places, so that one reshape parts them.
    counts = np.diff(np.searchsorted(ends, offsets))
    rows = (counts + 1) // 2
    first = np.r_[0, np.cumsum(rows)]
    odd = counts % 2 == 1
    runs = np.zeros(2 * first[-1], np.int64)
    filled = np.ones(len(runs), bool)
    filled[2 * first[1:][odd] - 1] = False
    runs[filled] = values
    leading = runs[2 * first[:-1]]  # the first run of zeros, which the next one is not a difference from
    runs[2 * first[:-1]] = 0
    zeros, ones = (_sum_within(part, first, rows) for part in (runs[0::2], runs[1::2]))
    zeros[first[:-1]] = leading
    ones[first[1:][odd] - 1] = 0

    areas = np.add.reduceat(ones, first[:-1])
    wrong = areas + np.add.reduceat(zeros, first[:-1]) != num_pixels
    if min(zeros.min(), ones.min()) < 0:
        wrong |= np.minimum.reduceat(np.minimum(zeros, ones), first[:-1]) < 0
    areas[wrong] = -1
    return areas


def _well_formed(characters: np.ndarray, offsets: np.ndarray, ends: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(N,) bool: strings of whole numbers of at most 7 groups, one at least."""
    well_formed = np.diff(offsets) > 0
    well_formed[well_formed] = characters[offsets[1:][well_formed] - 1] < _MORE
    if characters.min(initial=48) < 48 or characters.max(initial=48) > _HIGHEST:
        strange = np.flatnonzero((characters < 48) | (characters > _HIGHEST))
        well_formed[np.searchsorted(offsets, strange, "right") - 1] = False
    if sizes.max(initial=0) > _MAX_GROUPS:
        well_formed[np.searchsorted(offsets, ends[sizes > _MAX_GROUPS], "right") - 1] = False
    return well_formed


def _sum_within(values: np.ndarray, first: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Cumulated sums that begin anew at each first."""
    sums = np.cumsum(values)
    sums -= np.repeat(np.r_[0, sums[first[1:-1] - 1]], rows)
    return sums


def counts_to_runs(counts: str, size_hw: tuple[int, int]) -> Runs:
    """Inverse of runs_to_counts, without the pixels.

    Raises:
      ValueError: the string is no RLE.

    >>> counts_to_runs("22", (2, 2))
    Runs(size_hw=(2, 2), starts=array([2]), ends=array([4]))
    """
    bounds = np.cumsum(counts_to_lengths(counts))
    return join_runs([Runs(size_hw, bounds[:-1:2], bounds[1::2])], size_hw)  # others have runs of length 0


def area_and_bbox_xywh(counts: str, size_hw: tuple[int, int]) -> tuple[int, tuple[float, float, float, float]]:
    """pycocotools' own area and box of an RLE. The box is COCO's: its sides are one more than the reference's."""
    rle = {"size": list(size_hw), "counts": counts}
    x, y, w, h = coco_mask.toBbox(rle).tolist()
    return int(coco_mask.area(rle)), (x, y, w, h)


def union_area(masks: list[str], size_hw: tuple[int, int]) -> int:
    """Pixels that are in at least one of the RLEs."""
    if not masks:
        return 0
    return int(coco_mask.area(coco_mask.merge([{"size": list(size_hw), "counts": counts} for counts in masks])))


def iou(one: str, others: list[str], size_hw: tuple[int, int]) -> np.ndarray:
    """Mask IoU of one RLE with each of the others, (N,) float64; 0 for two empty masks."""
    return ious(others, [one], size_hw)[:, 0]


def ious(some: list[str], others: list[str], size_hw: tuple[int, int]) -> np.ndarray:
    """Mask IoU of each of some RLEs with each of the others, (N, M) float64; 0 for two empty masks."""
    if not some or not others:
        return np.zeros((len(some), len(others)))  # pycocotools returns a list here
    size = list(size_hw)
    return coco_mask.iou(
        [{"size": size, "counts": counts} for counts in some],
        [{"size": size, "counts": counts} for counts in others],
        [0] * len(others),
    )


def box_ious(some_xywh: np.ndarray, others_xywh: np.ndarray) -> np.ndarray:
    """pycocotools' IoU of each of some boxes with each of the others, (N, 4) and (M, 4) -> (N, M) float64."""
    if not len(some_xywh) or not len(others_xywh):
        return np.zeros((len(some_xywh), len(others_xywh)))
    boxes = [np.ascontiguousarray(boxes_xywh, np.float64) for boxes_xywh in (some_xywh, others_xywh)]
    return coco_mask.iou(*boxes, [0] * len(others_xywh))


def share_within(one: str, others: list[str], size_hw: tuple[int, int]) -> np.ndarray:
    """Fraction of the pixels of one RLE that each of the others has, too: (N,) float64; 0 for an empty mask."""
    if not others:
        return np.zeros(0)  # pycocotools returns a list here
    size = list(size_hw)
    rest = [{"size": size, "counts": counts} for counts in others]
    # A "crowd" in COCO's sense is a region of which any part will do: intersection / area of the first argument.
    return coco_mask.iou([{"size": size, "counts": one}], rest, [1] * len(rest)).reshape(-1)


def counts_to_mask(counts: str, size_hw: tuple[int, int]) -> np.ndarray:
    """Decodes an RLE to (H, W) bool."""
    return coco_mask.decode({"size": list(size_hw), "counts": counts}).astype(bool)


def polygons_to_counts(polygons: list[list[float]], size_hw: tuple[int, int]) -> str:
    """RLE of the union of polygons [x, y, x, y, ...] in pixels, filled as pycocotools does, at least one.

    Raises:
      ValueError: a polygon has fewer than three corners: pycocotools takes four numbers for a box.
    """
    if not polygons or any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        lengths = [len(polygon) for polygon in polygons]
        raise ValueError(f"polygons of {lengths} numbers; expected at least one, each of three or more pairs x, y")
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *size_hw))["counts"].decode()


def check_counts(counts: str, size_hw: tuple[int, int]) -> None:
    """Checks a compressed RLE that others made.

    Raises:
      ValueError: it is not one of an image of this size.
    """
    _check_lengths(counts_to_lengths(counts).tolist(), size_hw)


def lengths_to_counts(lengths: list[int], size_hw: tuple[int, int]) -> str:
    """COCO compressed RLE string of run lengths (an uncompressed RLE), zeros first.

    Raises:
      ValueError: they are not those of an image of this size.

    >>> lengths_to_counts([2, 2], (2, 2))
    '22'
    """
    _check_lengths(lengths, size_hw)
    return coco_mask.frPyObjects({"size": list(size_hw), "counts": lengths}, *size_hw)["counts"].decode()


def _check_lengths(lengths: list[int], size_hw: tuple[int, int]) -> None:
    height, width = size_hw
    if min(lengths, default=0) < 0 or sum(lengths) != height * width:
        raise ValueError(
            f"the runs have {sum(lengths)} pixels, the shortest {min(lengths, default=0)}; expected {height} x {width} "
            f"= {height * width} pixels and no negative run"
        )
