"""Prompts before the model: grids of points; and of prompts from elsewhere the checks, the tokens, the coarse masks.

The grids are ported from facebookresearch/segment-anything, segment_anything/utils/amg.py, commit dca509f; the tokens
follow SamPredictor.predict (predictor.py and modeling/prompt_encoder.py there). The reference refuses nothing: corners
that are swapped or far outside give some mask with a plausible score, and NaN looks like a sick device. So
check_prompts drops what makes no sense, with a reason, before the model sees it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from maskbeam.transforms.masks import rle
from maskbeam.transforms.masks.frame import to_frame, to_frame_points
from maskbeam.transforms.records import DroppedPrompt, Prompt, Prompts

# Labels of tokens beside 0 and 1, those of points: what fills up a prompt and is no token, the padding point that SAM
# adds where there is no box, and the corners of a box.
ABSENT, PADDING, TOP_LEFT, BOTTOM_RIGHT = -2, -1, 2, 3

# Points of one prompt; more are taken for a mistake.
MAX_POINTS = 64

# Tokens that prompts are filled up to, so that few programs serve them all. The last one: MAX_POINTS and a box.
BUCKETS = (2, 4, 8, 16, 32, MAX_POINTS + 2)

# What a coarse mask's pixels are as logits: a probability of 0.999 inside, 0.001 outside.
MASK_LOGIT = np.float32(np.log(0.999 / 0.001))


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


@dataclass(frozen=True, eq=False)
class CheckedPrompts:
    """The prompts of one image as they may go into the model.

    Attributes:
      prompts: all of them; their boxes are those that the model gets, clipped to the image and with the margin.
      kept: (K,) int64, which of them are good, ascending.
      dropped: the others.
      clipped: how many of the kept have a box that reached beyond the image.
    """

    prompts: Prompts
    kept: np.ndarray
    dropped: tuple[DroppedPrompt, ...]
    clipped: int

    def points(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(n, 2) points and (n,) labels of one prompt."""
        return _points_of(self.prompts, index)

    def record(self, index: int) -> Prompt:
        """A prompt as its masks carry it, with the box that the model gets."""
        points, labels = self.points(index)
        x0, y0, x1, y1 = self.prompts.boxes_xyxy[index].tolist()
        score = float(self.prompts.scores[index])
        return Prompt(
            points_xy=tuple((float(x), float(y)) for x, y in points),
            index=index,
            id=self.prompts.ids[index],
            point_labels=tuple(labels.tolist()),
            box_xywh=None if math.isnan(x0) else (x0, y0, x1 - x0, y1 - y0),
            mask=self.prompts.masks[index] is not None,
            score=None if math.isnan(score) else score,
        )

    def is_click(self, index: int) -> bool:
        """Whether a prompt is one foreground point and nothing else: the kind that is ambiguous."""
        no_box = bool(np.isnan(self.prompts.boxes_xyxy[index, 0]))
        return no_box and self.prompts.masks[index] is None and self.points(index)[1].tolist() == [1]


def check_prompts(
    prompts: Prompts, size_hw: tuple[int, int], box_margin: float = 0.0, box_of_mask: bool = True
) -> CheckedPrompts:
    """Drops prompts that make no sense, clips boxes to the image.

    A click is not moved: a prompt with a point outside is dropped. Only background points are a prompt, as in the
    reference.

    Args:
      size_hw: (H, W) of the image.
      box_margin: each side of a box moves outwards by this fraction of the box's width or height, not out of the image.
      box_of_mask: gives a coarse mask without a box the box around its pixels.

    Raises:
      ValueError: the arrays do not fit each other.
    """
    _check_lengths(prompts)
    reasons = [_objection(prompts, index, size_hw) for index in range(len(prompts))]
    kept = np.array([index for index, reason in enumerate(reasons) if reason is None], np.int64)
    dropped = tuple(DroppedPrompt(i, prompts.ids[i], reason) for i, reason in enumerate(reasons) if reason is not None)
    given = np.where(np.isfinite(prompts.boxes_xyxy), prompts.boxes_xyxy, np.nan)
    boxes = _clip(given, size_hw)
    clipped = int(((boxes != given) & ~np.isnan(given))[kept].any(axis=1).sum())
    for index in kept if box_of_mask else ():
        counts = prompts.masks[index]
        if counts is not None and np.isnan(boxes[index, 0]):
            x, y, w, h = rle.area_and_bbox_xywh(counts, size_hw)[1]
            boxes[index] = x, y, x + w, y + h
    margin = box_margin * (boxes[:, 2:] - boxes[:, :2])
    boxes = _clip(boxes + np.concatenate([-margin, margin], axis=1), size_hw)
    return CheckedPrompts(replace(prompts, boxes_xyxy=boxes), kept, dropped, clipped)


def _clip(boxes_xyxy: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Boxes (..., 4), cut off at the image's edges."""
    height, width = size_hw
    return np.clip(boxes_xyxy, 0, np.array([width, height, width, height], np.float64))


def _check_lengths(prompts: Prompts) -> None:
    """Raises ValueError unless the arrays of all prompts fit each other."""
    count, points = len(prompts), len(prompts.points_xy)
    expected = {
        "boxes_xyxy": (count, 4),
        "points_xy": (points, 2),
        "point_labels": (points,),
        "first_point": (count + 1,),
        "category_ids": (count,),
        "scores": (count,),
    }
    for name, shape in expected.items():
        if np.shape(getattr(prompts, name)) != shape:
            raise ValueError(f"{name} must be {shape} for {count} prompts, got {np.shape(getattr(prompts, name))}")
    first = prompts.first_point
    if len(prompts.masks) != count or first[0] != 0 or first[-1] != points or (np.diff(first) < 0).any():
        raise ValueError(
            f"{len(prompts.masks)} masks and {points} points from {first.tolist()} on do not fit {count} prompts: "
            "expected one mask or None each, and ascending numbers of points from 0 to their count"
        )


def _points_of(prompts: Prompts, index: int) -> tuple[np.ndarray, np.ndarray]:
    own = slice(int(prompts.first_point[index]), int(prompts.first_point[index + 1]))
    return prompts.points_xy[own], prompts.point_labels[own]


def _objection(prompts: Prompts, index: int, size_hw: tuple[int, int]) -> str | None:
    """Why a prompt must not go into the model; None if it may."""
    box, counts = prompts.boxes_xyxy[index], prompts.masks[index]
    points, labels = _points_of(prompts, index)
    has_box = not np.isnan(box).all()
    if not (has_box or len(points) or counts is not None):
        return "it has no box, no point and no mask"
    return (
        (_objection_to_box(box, size_hw) if has_box else None)
        or _objection_to_points(points, labels, size_hw)
        or (_objection_to_mask(counts, size_hw) if counts is not None else None)
    )


def _objection_to_box(box_xyxy: np.ndarray, size_hw: tuple[int, int]) -> str | None:
    x0, y0, x1, y1 = box_xyxy.tolist()
    corners = f"its box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g})"
    if not np.isfinite(box_xyxy).all():
        return f"{corners} is not finite"
    if x1 <= x0 or y1 <= y0:
        return f"{corners} has no area: the second corner must be right of and below the first"
    if x1 <= 0 or y1 <= 0 or x0 >= size_hw[1] or y0 >= size_hw[0]:
        return f"{corners} lies outside the image of {size_hw[1]} x {size_hw[0]} pixels"
    return None


def _objection_to_points(points_xy: np.ndarray, labels: np.ndarray, size_hw: tuple[int, int]) -> str | None:
    if len(points_xy) > MAX_POINTS:
        return f"it has {len(points_xy)} points, more than the {MAX_POINTS} allowed"
    if not np.isin(labels, (0, 1)).all():
        wrong = labels[~np.isin(labels, (0, 1))][0]
        return f"a point of it has the label {wrong}: expected 1 (on the object) or 0 (beside it)"
    outside = ~((points_xy >= 0) & (points_xy < size_hw[::-1])).all(axis=1)  # NaN, too
    if outside.any():
        x, y = points_xy[outside][0].tolist()
        return f"its point ({x:g}, {y:g}) lies outside the image of {size_hw[1]} x {size_hw[0]} pixels"
    return None


def _objection_to_mask(counts: str, size_hw: tuple[int, int]) -> str | None:
    try:
        rle.check_counts(counts, size_hw)
    except ValueError as error:
        return f"its mask is not one of the image: {error}"
    return None if rle.area_and_bbox_xywh(counts, size_hw)[0] else "its mask is empty"


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts of one image that go through the model in one call: of one number of tokens, all with masks or none.

    Attributes:
      indices: (P,) int64, which of the image's prompts.
      coords_xy: (P, K, 2) float64 (x, y) pixels of the frame. SAM adds half a pixel.
      labels: (P, K) int32: of points 0 and 1, or the constants above.
      counts: RLE of the coarse masks; empty if these prompts have none.
      size: of the program's batch, at least P.
    """

    indices: np.ndarray
    coords_xy: np.ndarray
    labels: np.ndarray
    counts: tuple[str, ...]
    size: int


def batch_prompts(
    checked: CheckedPrompts, size_hw: tuple[int, int], frame_size: int, sizes: tuple[int, ...]
) -> list[PromptBatch]:
    """The kept prompts of an image in batches.

    Args:
      sizes: of batches, ascending. As long as more prompts are left than the largest holds, that one is taken, then the
        smallest that holds the rest.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    tokens = {index: _tokens(checked, index) for index in checked.kept.tolist()}
    for index, (_, labels) in tokens.items():
        bucket = next(bucket for bucket in BUCKETS if bucket >= len(labels))
        groups.setdefault((bucket, checked.prompts.masks[index] is not None), []).append(index)
    return [
        _batch(checked, {index: tokens[index] for index in indices[some]}, bucket, size, size_hw, frame_size)
        for (bucket, _), indices in sorted(groups.items())
        for some, size in _cut(len(indices), sizes)
    ]


def _cut(count: int, sizes: tuple[int, ...]) -> Iterator[tuple[slice, int]]:
    """Cuts a row of prompts into batches: which, and the size of each.

    >>> list(_cut(10, (2, 8))), list(_cut(3, (2, 8)))
    ([(slice(0, 8, None), 8), (slice(8, 10, None), 2)], [(slice(0, 3, None), 8)])
    """
    first = 0
    while first < count:
        size = next((size for size in sizes if size >= count - first), sizes[-1])
        yield slice(first, min(first + size, count)), size
        first += size


def _tokens(checked: CheckedPrompts, index: int) -> tuple[np.ndarray, list[int]]:
    """A prompt's sparse tokens: (K, 2) pixels of the image and K labels. A mask alone has none."""
    points, labels = checked.points(index)
    box = checked.prompts.boxes_xyxy[index]
    if not np.isnan(box[0]):
        return np.concatenate([points, box.reshape(2, 2)]), [*labels.tolist(), TOP_LEFT, BOTTOM_RIGHT]
    if len(points):
        return np.concatenate([points, np.zeros((1, 2))]), [*labels.tolist(), PADDING]
    return points, []


def _batch(
    checked: CheckedPrompts,
    tokens: dict[int, tuple[np.ndarray, list[int]]],
    bucket: int,
    size: int,
    size_hw: tuple[int, int],
    frame_size: int,
) -> PromptBatch:
    """A batch of the prompts whose tokens these are."""
    coords = np.zeros((len(tokens), bucket, 2))
    labels = np.full((len(tokens), bucket), ABSENT, np.int32)
    for row, (points, of_points) in enumerate(tokens.values()):
        coords[row, : len(points)] = to_frame_points(points, size_hw, frame_size)
        labels[row, : len(points)] = of_points
    counts = tuple(counts for index in tokens if (counts := checked.prompts.masks[index]) is not None)
    return PromptBatch(np.array(list(tokens), np.int64), coords, labels, counts, size)


def mask_to_logits(counts: str, size_hw: tuple[int, int], low_size: int) -> np.ndarray:
    """A coarse mask as SAM wants it: logits in the model's frame, padding included.

    As micro-sam does it (prompt_based_segmentation.py): the mask itself is resized and cut at one half, and pixels
    become logits only then, so that edges stay sharp.

    Args:
      counts: COCO compressed RLE of an image of size_hw.

    Returns:
      (low_size, low_size) float32, MASK_LOGIT inside and -MASK_LOGIT outside.
    """
    pixels = to_frame(rle.counts_to_mask(counts, size_hw).astype(np.uint8) * np.uint8(255), low_size)
    return np.where(pixels > 127, MASK_LOGIT, -MASK_LOGIT)
