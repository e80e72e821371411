"""REFINE: masks chosen anew from stored candidates, without the model.

What `maskbeam label --keep_candidates` stored goes through the steps of transforms/masks/select.py once more, in the
order in which the model proposed it, so that the same settings give the same rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maskbeam.transforms.labels.schema import row_to_image
from maskbeam.transforms.masks.amg import AmgConfig
from maskbeam.transforms.masks.containment import ContainmentConfig, apply_containment, with_parents
from maskbeam.transforms.masks.crops import generate_crop_boxes
from maskbeam.transforms.masks.select import Candidates, Encoded, keep_best, merge_crops, select_in_crop
from maskbeam.transforms.records import CropBox, Dropped, LabeledImage, Prompt, Seconds

# Of the candidates table; the others say again what these and the settings say.
COLUMNS = [
    "image_id",
    "crop_index",
    "point_coords",
    "predicted_iou",
    "stability_score",
    "box_xyxy",
    "segmentation.counts",
]


def refine_chunk(
    images: pa.Table, candidates: pa.Table, config: AmgConfig, containment: ContainmentConfig
) -> Iterator[LabeledImage]:
    """The images of a chunk with their masks chosen anew.

    Args:
      images: schema.IMAGES.
      candidates: COLUMNS of schema.CANDIDATES.
      config: how to choose; the prompts and what else the model was given are as when the candidates were made.
    """
    of_image = _split_by_image(candidates)
    for row in images.to_pylist():
        yield refine_image(
            row_to_image(row), of_image.get(row["image_id"], candidates.slice(0, 0)), config, containment
        )


def refine_image(
    image: LabeledImage, candidates: pa.Table, config: AmgConfig, containment: ContainmentConfig
) -> LabeledImage:
    """One image with its masks chosen anew and their parents; a failed one is as it was.

    Args:
      candidates: the image's own, in their order.
      config, containment: see refine_chunk.
    """
    if image.failure or image.size_hw is None:
        return image
    start = time.perf_counter()
    size_hw = image.size_hw
    crops = generate_crop_boxes(size_hw, config.crop_n_layers, config.crop_overlap_ratio)
    # What was not stored had a predicted IoU below the bar, and no threshold is lower than that.
    dropped = Dropped(predicted_iou=image.num_candidates - len(candidates))
    selected = []
    for proposed in _split_by_crop(candidates, crops, size_hw):
        masks, dropped_in_crop = select_in_crop(proposed, size_hw, config)
        selected.append(masks)
        dropped += dropped_in_crop
    merged, dropped_between = merge_crops(selected, size_hw, config)
    ruled, dropped_by_rule = apply_containment(merged, containment)
    best, dropped_beyond = keep_best(ruled, config.max_masks)
    return replace(
        image,
        masks=tuple(with_parents(best, containment.containment_thresh)),
        dropped=dropped + dropped_between + dropped_by_rule + dropped_beyond,
        seconds=Seconds(postprocess=time.perf_counter() - start),
    )


def _split_by_image(candidates: pa.Table) -> dict[str, pa.Table]:
    """The rows of each image: they follow each other."""
    if not candidates.num_rows:
        return {}
    runs = pc.run_end_encode(candidates["image_id"].combine_chunks())
    ends = runs.run_ends.to_pylist()
    starts = [0, *ends[:-1]]
    return {
        image_id: candidates.slice(start, end - start)
        for image_id, start, end in zip(runs.values.to_pylist(), starts, ends, strict=True)
    }


def _split_by_crop(candidates: pa.Table, crops: list[CropBox], size_hw: tuple[int, int]) -> list[Candidates]:
    """The candidates of each crop; an RLE becomes a string only when its mask is encoded."""
    crop_index = candidates["crop_index"].to_numpy()
    predicted_iou = candidates["predicted_iou"].to_numpy()
    stability_score = candidates["stability_score"].to_numpy()
    boxes_xyxy = _flatten(candidates["box_xyxy"]).to_numpy().reshape(-1, 4)
    points_xy = _flatten(_flatten(candidates["point_coords"])).to_numpy().reshape(-1, 2)
    counts = pc.struct_field(candidates["segmentation"], "counts")

    def in_crop(index: int, crop: CropBox) -> Candidates:
        rows = np.flatnonzero(crop_index == index)

        def encode(i: int) -> Encoded:
            row = int(rows[i])
            scores = float(predicted_iou[row]), float(stability_score[row])
            prompt = Prompt(((float(points_xy[row, 0]), float(points_xy[row, 1])),))
            return Encoded.of(counts[row].as_py(), size_hw, scores, prompt, boxes_xyxy[row], crop)

        return Candidates(crop, predicted_iou[rows], stability_score[rows], boxes_xyxy[rows], encode)

    return [in_crop(index, crop) for index, crop in enumerate(crops)]


def _flatten(lists: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The items of all lists; those of a slice only."""
    array = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    return array.flatten()
