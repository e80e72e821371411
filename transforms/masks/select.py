"""SELECT: which candidates become masks: filters, duplicates, cleaning, limits. Everything after the model.

The second half of SamAutomaticMaskGenerator (facebookresearch/segment-anything, automatic_mask_generator.py, commit
dca509f), with the same masks in the same order. `label` selects as soon as candidates are measured and encodes only
what survives (transforms/masks/amg.py); `refine` selects anew from candidates that were stored
(transforms/labels/refine.py).

Read top down: select_in_crop > merge_crops > keep_best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from maskbeam.transforms.masks import boxes, rle
from maskbeam.transforms.masks.regions import remove_small_regions
from maskbeam.transforms.records import CropBox, Dropped, Mask, Prompt


@dataclass(frozen=True)
class SelectionConfig:
    """Which candidates become masks: the reference's parameters, by its names and defaults, then ours.

    Attributes:
      pred_iou_thresh: keep masks whose predicted IoU is greater. 0 switches the filter off.
      stability_score_thresh: keep masks at least this stable. 0 switches the filter off.
      box_nms_thresh: of two masks of a crop with a higher IoU than this, the one with the lower predicted IoU goes.
      crop_nms_thresh: likewise between crops, where the mask of the smaller crop stays.
      min_mask_region_area: holes and islands inside masks below this many pixels are removed. 0 switches it off.
      nms_by: box, as the reference does, or mask: IoU of the masks themselves. Slower, but a thin diagonal object
        survives beside what fills its box.
      min_mask_area: drop masks of fewer pixels.
      max_mask_area: drop masks of more pixels. Default: no limit.
      min_mask_area_fraction: drop masks that cover less than this fraction of the image.
      max_mask_area_fraction: drop masks that cover this fraction or more; 1 switches it off.
      max_masks: keep at most this many masks an image, those with the highest predicted IoU. Default: all.
    """

    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    box_nms_thresh: float = 0.7
    crop_nms_thresh: float = 0.7
    min_mask_region_area: int = 0
    nms_by: Literal["box", "mask"] = "box"
    min_mask_area: int = 0
    max_mask_area: int | None = None
    min_mask_area_fraction: float = 0.0
    max_mask_area_fraction: float = 1.0
    max_masks: int | None = None

    def __post_init__(self) -> None:
        for name in ("pred_iou_thresh", "stability_score_thresh"):
            if not getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a fraction of at most 1, got {getattr(self, name)}")
        check_range(self, "box_nms_thresh", 0, 1)
        check_range(self, "crop_nms_thresh", 0, 1)
        check_range(self, "min_mask_region_area", 0)
        check_range(self, "min_mask_area", 0)
        check_range(self, "max_mask_area", 0)
        check_range(self, "min_mask_area_fraction", 0, 1)
        check_range(self, "max_mask_area_fraction", 0, 1)
        check_range(self, "max_masks", 1)
        for low_name, high_name in (
            ("min_mask_area", "max_mask_area"),
            ("min_mask_area_fraction", "max_mask_area_fraction"),
        ):
            smallest, largest = getattr(self, low_name), getattr(self, high_name)
            if largest is not None and smallest > largest:
                raise ValueError(f"{low_name} {smallest} is above {high_name} {largest}: no mask would be left")
        if self.nms_by not in ("box", "mask"):
            raise ValueError(f'nms_by must be "box" or "mask", got "{self.nms_by}"')


def check_range(config: Any, name: str, low: float, high: float | None = None) -> None:
    """Raises ValueError unless a field is None or between low and high; high None = no limit."""
    value = getattr(config, name)
    if value is not None and not (value >= low and (high is None or value <= high)):
        expected = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {expected}, got {value}")


@dataclass(frozen=True)
class Encoded:
    """A candidate as a mask of the image.

    Attributes:
      mask: its row.
      box_xyxy: (4,) inclusive pixel indices of the image, as the reference has them.
      crop: where it was made.
    """

    mask: Mask
    box_xyxy: np.ndarray
    crop: CropBox

    @classmethod
    def of(
        cls,
        counts: str,
        size_hw: tuple[int, int],
        scores: tuple[float, float],
        prompt: Prompt,
        crop_box_xyxy: np.ndarray,
        crop: CropBox,
    ) -> Encoded:
        """From the RLE; area and box of the row are those of its pixels.

        Args:
          size_hw: (H, W) of the image.
          scores: predicted IoU and stability.
          prompt: what it answers.
          crop_box_xyxy: (4,) inclusive pixel indices of the crop.
        """
        x0, y0 = crop.xyxy[:2]
        area, bbox_xywh = rle.area_and_bbox_xywh(counts, size_hw)
        mask = Mask(
            size_hw=size_hw,
            counts=counts,
            bbox_xywh=bbox_xywh,
            area=area,
            predicted_iou=scores[0],
            stability_score=scores[1],
            prompt=prompt,
            crop_box_xywh=crop.xywh,
        )
        return cls(mask, crop_box_xyxy + [x0, y0, x0, y0], crop)


@dataclass(frozen=True)
class Candidates:
    """What the model proposed in one crop, in the order in which it did: ties are broken by it.

    Attributes:
      crop: where they were made.
      predicted_iou: (N,) float32.
      stability_score: (N,) float32; NaN where no logit comes near the threshold.
      boxes_xyxy: (N, 4) inclusive pixel indices in the crop; 0, 0, 0, 0 for an empty mask.
      encode: gives candidate i as a mask of the image. Called for survivors only, since it is what costs most.
    """

    crop: CropBox
    predicted_iou: np.ndarray
    stability_score: np.ndarray
    boxes_xyxy: np.ndarray
    encode: Callable[[int], Encoded]


def select_in_crop(
    candidates: Candidates, size_hw: tuple[int, int], config: SelectionConfig
) -> tuple[list[Encoded], Dropped]:
    """The candidates of one crop that are good, stable, whole and no duplicates, best predicted IoU first.

    Args:
      size_hw: (H, W) of the image.
    """
    # Filter by predicted IoU
    good = np.arange(len(candidates.predicted_iou))
    if config.pred_iou_thresh > 0:
        good = np.flatnonzero(candidates.predicted_iou > config.pred_iou_thresh)

    # Filter by stability
    stable = good
    if config.stability_score_thresh > 0:
        stable = good[candidates.stability_score[good] >= config.stability_score_thresh]

    # Filter boxes that touch inner crop edges
    off_edge = boxes.keep_off_crop_edge(candidates.boxes_xyxy[stable], candidates.crop.xyxy, size_hw)
    whole = stable[off_edge]

    # Remove duplicates within the crop
    scores = candidates.predicted_iou[whole]
    if config.nms_by == "box":
        keep = boxes.nms(candidates.boxes_xyxy[whole], scores, config.box_nms_thresh)
        masks = [candidates.encode(i) for i in whole[keep].tolist()]
    else:
        encoded = [candidates.encode(i) for i in whole.tolist()]
        keep = _nms(encoded, scores, config.box_nms_thresh, config.nms_by)
        masks = [encoded[i] for i in keep]
    return masks, Dropped(
        predicted_iou=len(candidates.predicted_iou) - len(good),
        stability=len(good) - len(stable),
        crop_edge=len(stable) - len(whole),
        box_nms=len(whole) - len(keep),
    )


def merge_crops(
    crops: list[list[Encoded]], size_hw: tuple[int, int], config: SelectionConfig
) -> tuple[list[Mask], Dropped]:
    """What all crops of an image have left, without duplicates, cleaned, within the limits on the area.

    Args:
      crops: of select_in_crop, the full image first; those without masks, too.
      size_hw: (H, W) of the image.
    """
    masks = [mask for crop in crops for mask in crop]
    dropped = Dropped()

    # Remove duplicates between crops; masks from smaller crops are preferred
    if len(crops) > 1:
        areas = np.array([mask.crop.size_hw[0] * mask.crop.size_hw[1] for mask in masks], np.float32)
        keep = _nms(masks, np.float32(1) / areas, config.crop_nms_thresh, config.nms_by)
        dropped += Dropped(crop_nms=len(masks) - len(keep))
        masks = [masks[i] for i in keep]

    # Clean masks of small regions; the new duplicates go, edited ones first
    if config.min_mask_region_area > 0:
        cleaned = [_clean(mask, config.min_mask_region_area) for mask in masks]
        untouched = np.array([not changed for _, changed in cleaned], np.float32)
        masks = [mask for mask, _ in cleaned]
        keep = _nms(masks, untouched, max(config.box_nms_thresh, config.crop_nms_thresh), config.nms_by)
        dropped += Dropped(small_region=len(masks) - len(keep))
        masks = [masks[i] for i in keep]

    # Beyond the reference: limits on the area
    sized = [encoded.mask for encoded in masks if _keep_area(encoded.mask.area, size_hw, config)]
    return sized, dropped + Dropped(area=len(masks) - len(sized))


def keep_best(masks: list[Mask], max_masks: int | None) -> tuple[list[Mask], Dropped]:
    """The max_masks masks with the highest predicted IoU, in the order in which they came; None = all."""
    if max_masks is None or len(masks) <= max_masks:
        return masks, Dropped()
    best = np.argsort([-mask.predicted_iou for mask in masks], kind="stable")[:max_masks]
    return [masks[i] for i in np.sort(best)], Dropped(max_masks=len(masks) - max_masks)


def _nms(masks: list[Encoded], scores: np.ndarray, iou_threshold: float, nms_by: str) -> np.ndarray:
    """NMS of encoded masks by the IoU of their boxes or of the masks themselves."""
    if not masks:
        return np.zeros(0, np.int64)
    if nms_by == "box":
        return boxes.nms(np.stack([mask.box_xyxy for mask in masks]), scores, iou_threshold)
    counts, size_hw = [mask.mask.counts for mask in masks], masks[0].mask.size_hw
    return boxes.greedy_nms(
        scores, lambda one, rest: rle.iou(counts[one], [counts[i] for i in rest], size_hw), iou_threshold
    )


def _clean(encoded: Encoded, min_area: int) -> tuple[Encoded, bool]:
    """Removes small holes and islands; predicted IoU and stability stay those of the uncleaned mask."""
    mask = encoded.mask
    runs, changed = remove_small_regions(rle.counts_to_runs(mask.counts, mask.size_hw), min_area)
    if not changed:
        # The reference takes every mask's box anew here, so that a mask's box is that of its pixels.
        return encoded, False
    counts = rle.runs_to_counts(runs)
    area, bbox_xywh = rle.area_and_bbox_xywh(counts, runs.size_hw)
    x, y, w, h = bbox_xywh
    box_xyxy = np.array([x, y, x + w - 1, y + h - 1])  # something stays: the largest island at least
    return Encoded(replace(mask, counts=counts, area=area, bbox_xywh=bbox_xywh), box_xyxy, encoded.crop), True


def _keep_area(area: int, size_hw: tuple[int, int], config: SelectionConfig) -> bool:
    """Whether a mask's area is within the limits."""
    pixels = size_hw[0] * size_hw[1]
    return (
        area >= config.min_mask_area
        and (config.max_mask_area is None or area <= config.max_mask_area)
        and area >= config.min_mask_area_fraction * pixels
        and (config.max_mask_area_fraction >= 1 or area < config.max_mask_area_fraction * pixels)
    )
