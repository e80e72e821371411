"""Which order of an image's masks puts objects first: AR@10 and AR@100 of several rankings of the same masks.

python -m benchmarks.ranking --labels DIR --truth instances.json [--pred_iou_thresh X] [--stability_score_thresh X]

DIR holds every candidate: labels made with --box_nms_thresh 1 and low thresholds. Here they are filtered by the
thresholds given and deduplicated as `label` does (box NMS at 0.7, best predicted IoU first), so that it is known how
many candidates agreed on each mask that is left. Then each ranking puts the masks of each image in order, and recall is
measured as `maskbeam evaluate` does. Nothing is fitted.

Every figure has a 95 % bootstrap interval over images; "against" is the difference to the ranking by predicted IoU on
the same resampled images, which says more than two overlapping intervals.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maskbeam.transforms.evaluation.recall import MAX_PROPOSALS, Figure, ImageRecall, bootstrap_means, image_recall
from maskbeam.transforms.evaluation.truth import TruthImage, parse_instances
from maskbeam.transforms.labels.schema import row_to_mask
from maskbeam.transforms.labels.tables import read_chunks
from maskbeam.transforms.masks import boxes, rle
from maskbeam.transforms.masks.containment import find_contained
from maskbeam.transforms.records import Mask

NMS_IOU = 0.7  # AmgConfig.box_nms_thresh
CONTAINED = 0.9  # of a mask's pixels within another, from which on it counts as a part of it


@dataclass(frozen=True)
class Masks:
    """The masks of an image that are left after NMS, in the reference's order; (N,) each.

    Attributes:
      predicted_iou, stability_score: as label stores them.
      area: fraction of the image.
      agreeing: candidates whose box is that of the mask, by the IoU that NMS goes by; the mask is one of them.
      wholes: other masks that contain it.
      parts: other masks that it contains.
      mask_ious, box_ious: (N, G) with the truth's objects.
      object_areas: (G,) pixels.
    """

    predicted_iou: np.ndarray
    stability_score: np.ndarray
    area: np.ndarray
    agreeing: np.ndarray
    wholes: np.ndarray
    parts: np.ndarray
    mask_ious: np.ndarray
    box_ious: np.ndarray
    object_areas: np.ndarray


def _rank_average(*scores: np.ndarray) -> np.ndarray:
    return -np.sum([np.argsort(np.argsort(-score, kind="stable")) for score in scores], axis=0).astype(float)


# Higher is first; equal scores in the reference's order.
RANKINGS: dict[str, Callable[[Masks], np.ndarray]] = {
    "predicted IoU": lambda m: m.predicted_iou,
    "stability": lambda m: m.stability_score,
    "mean of both (SAM paper)": lambda m: m.predicted_iou + m.stability_score,
    "product of both": lambda m: m.predicted_iou * m.stability_score,
    "average of both ranks": lambda m: _rank_average(m.predicted_iou, m.stability_score),
    "area": lambda m: m.area,
    "predicted IoU x area": lambda m: m.predicted_iou * m.area,
    "predicted IoU x sqrt(area)": lambda m: m.predicted_iou * np.sqrt(m.area),
    "product x sqrt(area)": lambda m: m.predicted_iou * m.stability_score * np.sqrt(m.area),
    "agreeing": lambda m: m.agreeing.astype(float),
    "predicted IoU x agreeing": lambda m: m.predicted_iou * m.agreeing,
    "predicted IoU x log(1 + agreeing)": lambda m: m.predicted_iou * np.log1p(m.agreeing),
    "product x log(1 + agreeing)": lambda m: m.predicted_iou * m.stability_score * np.log1p(m.agreeing),
    "predicted IoU, wholes first": lambda m: m.predicted_iou / (1 + m.wholes),
    "predicted IoU, parts last": lambda m: m.predicted_iou * np.log1p(1 + m.parts),
}


def main(argv: list[str] | None = None) -> int:
    """Measures all rankings and prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranking", allow_abbrev=False)
    parser.add_argument("--labels", required=True, help="made with --box_nms_thresh 1 and low thresholds")
    parser.add_argument("--truth", type=Path, required=True, help="COCO instances JSON")
    parser.add_argument("--pred_iou_thresh", type=float, default=0.0, help="filter the candidates (default: 0)")
    parser.add_argument("--stability_score_thresh", type=float, default=0.0, help="likewise (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args(argv)
    truth = parse_instances(json.loads(args.truth.read_text()))
    read = read_images(args.labels, truth, args.pred_iou_thresh, args.stability_score_thresh)
    images = list(tqdm(read, unit="image"))
    num_masks = sum(len(masks.area) for masks in images)
    num_objects = sum(len(masks.object_areas) for masks in images)
    print(f"{len(images)} images, {num_masks / len(images):.0f} masks each, {num_objects} objects; percent")
    found = {name: [recall_of(masks, ranking) for masks in images] for name, ranking in RANKINGS.items()}
    rows = {name: summarize(recalls, found["predicted IoU"], args.seed) for name, recalls in found.items()}
    print(format_table(rows))
    if args.json:
        content = {name: {key: asdict(figure) for key, figure in row.items()} for name, row in rows.items()}
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def read_images(labels: str, truth: dict[str, TruthImage], iou: float, stability: float) -> Iterator[Masks]:
    """The masks of every image, NMS done."""
    for tables in read_chunks(labels):
        for image, rows in tables.rows():
            passed = [row for row in rows if row["predicted_iou"] > iou and row["stability_score"] >= stability]
            yield deduplicate([row_to_mask(row) for row in passed], truth[image["file_name"]])


def deduplicate(candidates: list[Mask], truth: TruthImage) -> Masks:
    """Box NMS as in label, and what the rankings go by."""
    bbox_xywh = np.array([mask.bbox_xywh for mask in candidates]).reshape(-1, 4)
    boxes_xyxy = bbox_xywh + np.concatenate([np.zeros_like(bbox_xywh[:, :2]), bbox_xywh[:, :2] - 1], axis=1)
    scores = np.array([mask.predicted_iou for mask in candidates], np.float32)
    keep = boxes.nms(boxes_xyxy, scores, NMS_IOU)
    masks, all_xywh, bbox_xywh = [candidates[i] for i in keep], bbox_xywh, bbox_xywh[keep]
    objects = truth.objects()
    counts = [mask.counts for mask in masks]
    inside = find_contained(masks, CONTAINED)
    return Masks(
        predicted_iou=scores[keep],
        stability_score=np.array([mask.stability_score for mask in masks]),
        area=np.array([mask.area for mask in masks]) / (truth.size_hw[0] * truth.size_hw[1]),
        agreeing=(rle.box_ious(all_xywh, bbox_xywh) > NMS_IOU).sum(axis=0),
        wholes=inside.sum(axis=1),
        parts=inside.sum(axis=0),
        mask_ious=rle.ious(counts, [one.counts for one in objects], truth.size_hw),
        box_ious=rle.box_ious(bbox_xywh, np.array([one.bbox_xywh for one in objects]).reshape(-1, 4)),
        object_areas=np.array([one.area for one in objects]),
    )


def recall_of(masks: Masks, ranking: Callable[[Masks], np.ndarray]) -> ImageRecall:
    """What the masks find in the order of a ranking."""
    order = np.argsort(-ranking(masks), kind="stable")
    return image_recall(masks.mask_ious[order], masks.box_ious[order], masks.object_areas)


def summarize(found: list[ImageRecall], baseline: list[ImageRecall], seed: int) -> dict[str, Figure]:
    """AR of one ranking, and its difference to another one on the same images."""
    objects = np.array([image.objects[0] for image in found])
    row = {}
    for k, count in enumerate(MAX_PROPOSALS):
        ours, theirs = (np.array([image.masks[0, k].mean() for image in images]) for images in (found, baseline))
        row[f"AR@{count}"] = bootstrap_means(ours, objects, seed).item()
        row[f"AR@{count} against"] = bootstrap_means(ours - theirs, objects, seed).item()
    return row


def format_table(rows: dict[str, dict[str, Figure]]) -> str:
    """Markdown, in percent."""
    columns = [f"AR@{count}{against}" for count in MAX_PROPOSALS[:2] for against in ("", " against")]
    lines = ["| ranking | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [_format(row[column], signed="against" in column) for column in columns]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def _format(figure: Figure, signed: bool) -> str:
    if figure.value is None or figure.low is None or figure.high is None:
        return "-"
    sign = "+" if signed else ""
    return f"{100 * figure.value:{sign}.1f} ({100 * figure.low:{sign}.1f} to {100 * figure.high:{sign}.1f})"


if __name__ == "__main__":
    raise SystemExit(main())
