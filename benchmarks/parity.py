"""Holds maskbeam against golden files of the torch reference, mask by mask, and says where a difference comes from.

python -m benchmarks.parity --golden DIR --model PRESET --photos DIR [--state_dict sam.pt] [--cases PATTERN ...]

A golden file `<photo>.<setting>.json` has the reference's records for one photo (tests/golden/README.md). The contract:

- the same masks in the same order, and at least 97 % of all RLE strings identical;
- where two masks differ, the reference's logit is within 1e-4 of the threshold in every differing pixel;
- a mask that is added, lost or swapped with another has its predicted IoU, stability or box NMS decided by rounding;
- nothing else differs: box, area and stability follow from the masks.

To judge, the reference's logits for a mask's prompt are computed anew, by torch on the same weights: those of
--state_dict, or the preset's. Exit code 0 if the contract holds, 1 if not, 2 for a mistaken command line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.reference import Sam, SamAutomaticMaskGenerator, build_torch_sam
from maskbeam.transforms.masks import rle
from maskbeam.transforms.masks.amg import AmgConfig, label_image
from maskbeam.transforms.models.sam.model import load_backbone, load_sam
from maskbeam.transforms.records import Mask, Prompt

IDENTICAL_FRACTION = 0.97  # of all RLE strings
LOGIT_ROUNDING = 1e-4  # of mask logits, between frameworks
IOU_ROUNDING = 1e-5  # of predicted IoU; measured: 3e-6
MASK_THRESHOLD = 0.0  # the reference's


@dataclass(frozen=True)
class Decoded:
    """The reference's own answer to a mask's prompt.

    Attributes:
      logits: (h, w) float32, of the mask's crop.
      predicted_iou: float32.
      offset_xy: the crop's top left corner in the image.
    """

    logits: np.ndarray
    predicted_iou: float
    offset_xy: tuple[int, int]


class Reference:
    """The torch model on one photo, asked for single prompts."""

    def __init__(self, sam: Sam, pixels: np.ndarray) -> None:
        self._predictor = SamAutomaticMaskGenerator(sam).predictor
        self._pixels = pixels
        self._crop_box: tuple[float, float, float, float] | None = None
        self._decoded: dict[Mask, Decoded] = {}

    def decode(self, mask: Mask) -> Decoded:
        """Decodes the prompt that made the mask; of its three masks, the one with the nearest predicted IoU."""
        if mask not in self._decoded:
            x, y, w, h = (int(value) for value in mask.crop_box_xywh)
            if mask.crop_box_xywh != self._crop_box:
                self._predictor.set_image(self._pixels[y : y + h, x : x + w])
                self._crop_box = mask.crop_box_xywh
            point = self._predictor.transform.apply_coords(np.array([[mask.prompt.points_xy[0]]]) - [x, y], (h, w))
            logits, predicted_iou, _ = self._predictor.predict_torch(
                torch.from_numpy(point), torch.ones(1, 1, dtype=torch.int), multimask_output=True, return_logits=True
            )
            nearest = int((predicted_iou[0] - mask.predicted_iou).abs().argmin())
            self._decoded[mask] = Decoded(logits[0, nearest].numpy(), float(predicted_iou[0, nearest]), (x, y))
        return self._decoded[mask]


@dataclass
class Comparison:
    """One golden case.

    Attributes:
      reference, ours: number of masks.
      identical: masks on both sides with the same RLE.
      pixels: that differ, in all masks on both sides.
      largest_logit: |reference logit - threshold|, the largest over the differing pixels.
      causes: a line for each added, lost or swapped mask that rounding explains.
      violations: a line for whatever breaks the contract.
    """

    reference: int
    ours: int
    identical: int = 0
    pixels: int = 0
    largest_logit: float = 0.0
    causes: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    """Compares all cases and prints a line for each; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", allow_abbrev=False)
    parser.add_argument("--golden", type=Path, required=True, help="directory of <photo>.<setting>.json")
    parser.add_argument("--model", required=True, help="preset that the golden files were made with")
    parser.add_argument("--photos", type=Path, required=True, help="directory of the photos")
    parser.add_argument("--state_dict", type=Path, help="the reference's weights; default: the preset's, converted")
    parser.add_argument("--cases", nargs="+", default=["*"], help="only these <photo>.<setting>; * and ? are wildcards")
    args = parser.parse_args(argv)
    paths = [path for path in sorted(args.golden.glob("*.json")) if any(fnmatch(path.stem, c) for c in args.cases)]
    if not paths:
        parser.error(f"no golden file in {args.golden} matches {' '.join(args.cases)}")

    sam = load_sam(args.model)
    torch_sam = build_torch_sam(load_backbone(args.model))
    if args.state_dict:
        torch_sam.load_state_dict(torch.load(args.state_dict, weights_only=True))

    compared = []
    for path in paths:
        case = json.loads(path.read_text())
        pixels = np.asarray(Image.open(args.photos / case["photo"]).convert("RGB"))
        config = AmgConfig(**case["settings"])
        masks = label_image(sam, pixels, config).masks
        comparison = compare(read_masks(case), masks, Reference(torch_sam, pixels), config)
        compared.append(comparison)
        print_comparison(path.stem, comparison)
    return 0 if contract_holds(compared) else 1


def read_masks(case: dict[str, Any]) -> tuple[Mask, ...]:
    """The records of a golden file, with boxes in COCO's convention."""
    return tuple(
        Mask(
            size_hw=tuple(record["segmentation"]["size"]),
            counts=record["segmentation"]["counts"],
            bbox_xywh=_coco_bbox(record),
            area=record["area"],
            predicted_iou=record["predicted_iou"],
            stability_score=record["stability_score"],
            prompt=Prompt((tuple(record["point_coords"][0]),)),
            crop_box_xywh=_floats(*record["crop_box"]),
        )
        for record in case["masks"]
    )


def _coco_bbox(record: dict[str, Any]) -> tuple[float, float, float, float]:
    """The reference's width and height are those of inclusive indices, one less than COCO's."""
    x, y, w, h = record["bbox"]
    return _floats(x, y, w + 1, h + 1) if record["area"] else (0.0, 0.0, 0.0, 0.0)


def _floats(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
    return float(x), float(y), float(w), float(h)


def compare(
    reference: tuple[Mask, ...], ours: tuple[Mask, ...], torch_reference: Reference, config: AmgConfig
) -> Comparison:
    """Compares two lists of masks of one photo."""
    result = Comparison(len(reference), len(ours))
    pairs = match(reference, ours)
    for i, j in pairs:
        _compare_pair(reference[i], ours[j], torch_reference, config, result)

    # Added and lost masks: a rival on the side that dropped the mask may be the cause
    lost = [mask for i, mask in enumerate(reference) if i not in {i for i, _ in pairs}]
    added = [mask for j, mask in enumerate(ours) if j not in {j for _, j in pairs}]
    unexplained: list[tuple[str, Mask]] = []
    explained: list[Mask] = []
    for kind, mask in [("lost", mask) for mask in lost] + [("added", mask) for mask in added]:
        cause = explain_decision(mask, ours if kind == "lost" else reference, torch_reference, config)
        if cause:
            result.causes.append(f"{kind} {_name(mask)}: {cause}")
            explained.append(mask)
        else:
            unexplained.append((kind, mask))
    # What overlaps an explained mask came or went with it
    for kind, mask in unexplained:
        rival = next((other for other in explained if other is not mask and _suppresses(other, mask, config)), None)
        if rival:
            result.causes.append(f"{kind} {_name(mask)}: follows from {_name(rival)}, which overlaps it")
        else:
            result.violations.append(f"{kind} {_name(mask)}: no decision within rounding")

    _compare_order(reference, pairs, torch_reference, result)
    return result


def match(reference: tuple[Mask, ...], ours: tuple[Mask, ...]) -> list[tuple[int, int]]:
    """Pairs (i, j) of the masks that the same prompt made on both sides: same crop, point and predicted IoU."""
    by_prompt: dict[Any, list[int]] = defaultdict(list)
    for j, mask in enumerate(ours):
        by_prompt[mask.crop_box_xywh, mask.prompt.points_xy[0]].append(j)
    pairs = []
    for i, mask in enumerate(reference):
        candidates = by_prompt[mask.crop_box_xywh, mask.prompt.points_xy[0]]
        if not candidates:
            continue
        nearest = min(candidates, key=lambda j: abs(ours[j].predicted_iou - reference[i].predicted_iou))
        if abs(ours[nearest].predicted_iou - mask.predicted_iou) <= IOU_ROUNDING:
            candidates.remove(nearest)
            pairs.append((i, nearest))
    return pairs


def _compare_pair(
    reference: Mask, ours: Mask, torch_reference: Reference, config: AmgConfig, result: Comparison
) -> None:
    """Compares the pixels and the fields of a mask that both sides have."""
    if ours.counts == reference.counts:
        result.identical += 1
        if (ours.bbox_xywh, ours.area) != (reference.bbox_xywh, reference.area):
            result.violations.append(
                f"box and area of {_name(reference)}: {reference.bbox_xywh} and {reference.area} "
                f"against {ours.bbox_xywh} and {ours.area}"
            )
    else:
        differs = rle.counts_to_mask(ours.counts, ours.size_hw) ^ rle.counts_to_mask(reference.counts, ours.size_hw)
        x, y, w, h = (int(value) for value in reference.crop_box_xywh)
        logits = torch_reference.decode(reference).logits[differs[y : y + h, x : x + w]]
        largest = float(np.abs(logits - MASK_THRESHOLD).max())
        result.pixels += int(differs.sum())
        result.largest_logit = max(result.largest_logit, largest)
        if largest >= LOGIT_ROUNDING:
            result.violations.append(f"{_name(reference)} differs where the reference's logit is {largest:.2e}")

    if not np.array_equal(ours.stability_score, reference.stability_score, equal_nan=True):
        low, high = stability_range(torch_reference.decode(reference).logits, config.stability_score_offset)
        if not low - IOU_ROUNDING <= ours.stability_score <= high + IOU_ROUNDING:
            result.violations.append(
                f"stability of {_name(reference)}: {reference.stability_score:.7f} against {ours.stability_score:.7f}, "
                f"rounding allows {low:.7f} to {high:.7f}"
            )


def explain_decision(mask: Mask, others: tuple[Mask, ...], torch_reference: Reference, config: AmgConfig) -> str | None:
    """Which decision about a mask that only one side has lies within rounding; None if none does.

    Args:
      others: the masks of the side that lacks it, among them the one that may have suppressed it.
    """
    decoded = torch_reference.decode(mask)
    if config.pred_iou_thresh > 0 and abs(decoded.predicted_iou - config.pred_iou_thresh) <= IOU_ROUNDING:
        return f"predicted IoU {decoded.predicted_iou:.7f}, threshold {config.pred_iou_thresh}"
    low, high = stability_range(decoded.logits, config.stability_score_offset)
    if config.stability_score_thresh > 0 and low <= config.stability_score_thresh <= high:
        return f"stability between {low:.7f} and {high:.7f}, threshold {config.stability_score_thresh}"
    thresholds = _nms_thresholds(config)
    for other in others:
        if box_iou(_reference_box(mask), _reference_box(other)) < min(thresholds) - 0.2:
            continue
        rival = torch_reference.decode(other)
        low, high = box_iou_range(decoded, rival)
        for threshold in thresholds:
            if low <= threshold <= high and low < high:
                return f"box IoU with {_name(other)} between {low:.7f} and {high:.7f}, NMS threshold {threshold}"
        same_rank = abs(decoded.predicted_iou - rival.predicted_iou) <= IOU_ROUNDING
        if same_rank and high > min(thresholds) and mask.crop_box_xywh == other.crop_box_xywh:
            return (
                f"box NMS ranks it level with {_name(other)}: "
                f"predicted IoU {decoded.predicted_iou:.7f} and {rival.predicted_iou:.7f}"
            )
    return None


def stability_range(logits: np.ndarray, offset: float) -> tuple[float, float]:
    """The lowest and highest stability score that rounding of the logits can make; NaN where nothing is above."""

    def area(threshold: float) -> np.float64:
        return np.float64(np.count_nonzero(logits > MASK_THRESHOLD + threshold))

    with np.errstate(invalid="ignore", divide="ignore"):
        low = area(offset + LOGIT_ROUNDING) / area(-offset - LOGIT_ROUNDING)
        high = area(offset - LOGIT_ROUNDING) / area(-offset + LOGIT_ROUNDING)
    return float(low), float(high)


def box_iou_range(one: Decoded, other: Decoded) -> tuple[float, float]:
    """The lowest and highest IoU of two masks' boxes that rounding of their logits can make."""
    ious = [box_iou(box, rival) for box, rival in product(_possible_boxes(one), _possible_boxes(other))]
    return min(ious), max(ious)


def _possible_boxes(decoded: Decoded) -> list[np.ndarray]:
    """The boxes of the mask cut a little higher and a little lower, XYXY of inclusive indices in the image."""
    boxes = []
    for threshold in (MASK_THRESHOLD + LOGIT_ROUNDING, MASK_THRESHOLD - LOGIT_ROUNDING):
        above = decoded.logits > threshold
        ys, xs = np.flatnonzero(above.any(axis=1)), np.flatnonzero(above.any(axis=0))
        box = np.array([xs[0], ys[0], xs[-1], ys[-1]]) if xs.size else np.zeros(4)
        boxes.append(box + np.tile(decoded.offset_xy, 2))
    return boxes


def box_iou(one_xyxy: np.ndarray, other_xyxy: np.ndarray) -> float:
    """IoU of two boxes as the reference's NMS has it; 0 where it is NaN, which suppresses nothing either."""
    sides = np.minimum(one_xyxy[2:], other_xyxy[2:]) - np.maximum(one_xyxy[:2], other_xyxy[:2])
    intersection = float(np.prod(np.maximum(sides, 0)))
    union = float(np.prod(one_xyxy[2:] - one_xyxy[:2]) + np.prod(other_xyxy[2:] - other_xyxy[:2])) - intersection
    return intersection / union if union else 0.0


def _reference_box(mask: Mask) -> np.ndarray:
    """XYXY of inclusive indices, from a mask's COCO box."""
    x, y, w, h = mask.bbox_xywh
    return np.array([x, y, x + w - 1, y + h - 1]) if mask.area else np.zeros(4)


def _nms_thresholds(config: AmgConfig) -> list[float]:
    """Of the NMS passes that the configuration runs."""
    return [config.box_nms_thresh] + ([config.crop_nms_thresh] if config.crop_n_layers else [])


def _suppresses(one: Mask, other: Mask, config: AmgConfig) -> bool:
    """Whether two masks overlap so much that an NMS pass keeps only one of them."""
    return box_iou(_reference_box(one), _reference_box(other)) > min(_nms_thresholds(config))


def _compare_order(
    reference: tuple[Mask, ...], pairs: list[tuple[int, int]], torch_reference: Reference, result: Comparison
) -> None:
    """Neighbours in our order that the reference has the other way round must be of level rank in the same crop."""
    by_ours = [reference[i] for i, _ in sorted(pairs, key=lambda pair: pair[1])]
    rank = {id(reference[i]): i for i, _ in pairs}
    for first, second in pairwise(by_ours):
        if rank[id(first)] < rank[id(second)]:
            continue
        line = (
            f"swapped {_name(second)} and {_name(first)}: predicted IoU "
            f"{torch_reference.decode(second).predicted_iou:.7f} and {torch_reference.decode(first).predicted_iou:.7f}"
        )
        level = abs(first.predicted_iou - second.predicted_iou) <= IOU_ROUNDING
        explained = level and first.crop_box_xywh == second.crop_box_xywh
        (result.causes if explained else result.violations).append(line)


def _name(mask: Mask) -> str:
    """A mask by what made it."""
    x, y = mask.prompt.points_xy[0]
    return f"mask at ({x:g}, {y:g}) of crop {tuple(int(v) for v in mask.crop_box_xywh)}, IoU {mask.predicted_iou:.4f}"


def print_comparison(case: str, comparison: Comparison) -> None:
    """One line a case, and one for each added, lost or swapped mask and each violation."""
    percent = 100 * comparison.identical / comparison.reference if comparison.reference else 100.0
    line = (
        f"{case}: masks {comparison.reference}/{comparison.ours}, "
        f"identical RLE {comparison.identical} ({percent:.1f} %), differing pixels {comparison.pixels}"
    )
    if comparison.pixels:
        line += f", |reference logit - threshold| at most {comparison.largest_logit:.1e}"
    print(line, flush=True)
    for cause in comparison.causes:
        print(f"  within rounding: {cause}")
    for violation in comparison.violations:
        print(f"  VIOLATION: {violation}")


def contract_holds(compared: list[Comparison]) -> bool:
    """Judges all cases together, because one mask is more than 3 % of a small case; prints the verdict."""
    reference, identical = sum(c.reference for c in compared), sum(c.identical for c in compared)
    fraction = identical / reference if reference else 1.0
    violations = sum(len(c.violations) for c in compared)
    holds = fraction >= IDENTICAL_FRACTION and not violations
    print(
        f"{len(compared)} cases: {reference} masks, {identical} identical RLE ({100 * fraction:.1f} %), "
        f"{sum(len(c.causes) for c in compared)} added, lost or swapped within rounding, {violations} violations. "
        f"The contract {'holds' if holds else 'is BROKEN'}."
    )
    return holds


if __name__ == "__main__":
    sys.exit(main())
