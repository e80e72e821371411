"""The Parquet schemas, a description with every field, and the way from records to tables and back."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa

from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.masks.rank import rank_masks
from maskbeam.transforms.records import (
    ChunkReport,
    Dropped,
    EncodedImage,
    Failure,
    LabeledChunk,
    LabeledImage,
    Mask,
    Prompt,
    Totals,
    escape_name,
)

# Keys of the files' own metadata. REPORT_KEY holds the chunk's ChunkReport, RUN_KEY the content of run.json.
REPORT_KEY = b"maskbeam.report"
RUN_KEY = b"maskbeam.run"


def _field(name: str, kind: pa.DataType, description: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})


def _list(kind: pa.DataType, size: int = -1) -> pa.ListType:
    return pa.list_(pa.field("item", kind, nullable=False), size)


_RLE = pa.struct([pa.field("size", _list(pa.int32()), nullable=False), pa.field("counts", pa.string(), nullable=False)])


ANNOTATIONS = pa.schema(
    [
        _field("image_id", pa.string(), "The image, as in the images table."),
        _field("mask_index", pa.int32(), "Position among the image's masks, in the reference generator's order."),
        _field(
            "segmentation",
            _RLE,
            "COCO RLE: size is [height, width] in pixels, counts the compressed column-major run lengths. "
            "pycocotools.mask.decode takes it as it is.",
        ),
        _field("bbox", _list(pa.float64()), "[x, y, width, height] in pixels, as pycocotools.mask.toBbox gives it."),
        _field("area", pa.int64(), "Pixels in the mask."),
        _field(
            "predicted_iou",
            pa.float32(),
            "The model's own estimate of the mask's IoU with the object; NaN where an imported mask has no score.",
        ),
        _field(
            "stability_score",
            pa.float32(),
            "IoU of the masks cut at logits mask_threshold + and - stability_score_offset; NaN if both are empty, and "
            "where an imported mask has none.",
        ),
        _field(
            "point_coords",
            _list(_list(pa.float64())),
            "[[x, y], ...] of the prompt that made the mask, in pixels: one point of the grid, or those of a given "
            "prompt, [] without points; NaN where an imported mask has none.",
        ),
        _field(
            "crop_box",
            _list(pa.float64()),
            "[x, y, width, height] of the crop the mask was made in, in pixels; the image where an imported mask has "
            "none.",
        ),
        _field("category_id", pa.int32(), "1 = object; imported labels have those of their file, prompts their own."),
        _field("iscrowd", pa.int8(), "0; imported labels may have crowds, 1."),
        _field(
            "rank",
            pa.int32(),
            "Order of the image's masks by predicted_iou times stability_score: 0 = highest; equal ones by mask_index. "
            "An unknown stability of an imported mask counts as 1; without a score it comes last.",
        ),
        _field(
            "parent_id",
            pa.int32(),
            "mask_index of the smallest mask of the image that contains this one; null if there is none, and always "
            "from `maskbeam label`, which does not look: `maskbeam refine` does.",
            nullable=True,
        ),
        # Of prompts that were given: null for a grid, and in imported labels.
        _field("prompt_index", pa.int32(), "Position among the image's prompts.", nullable=True),
        _field("prompt_id", pa.string(), "What the file of prompts calls the prompt.", nullable=True),
        _field(
            "prompt_box",
            _list(pa.float64()),
            "[x, y, width, height] of the prompt in pixels, clipped to the image; null without a box.",
            nullable=True,
        ),
        _field(
            "point_labels",
            _list(pa.int8()),
            "Of the points in point_coords: 1 = on the object, 0 = beside it.",
            nullable=True,
        ),
        _field("mask_prompt", pa.bool_(), "Whether the prompt has a coarse mask.", nullable=True),
        _field("prompt_score", pa.float32(), "A detector's confidence in the prompt.", nullable=True),
        _field("mask_token", pa.int8(), "Which of the model's masks for the prompt it is, 0..3.", nullable=True),
    ]
)

CANDIDATES = pa.schema(
    [
        _field("image_id", pa.string(), "The image, as in the images table."),
        _field("crop_index", pa.int32(), "The crop it was made in: position among the image's crops, 0 = full image."),
        _field("crop_layer", pa.int32(), "Layer of the crop; 0 = full image."),
        _field("crop_box", _list(pa.float64()), "[x, y, width, height] of the crop, in pixels."),
        _field("point_coords", _list(_list(pa.float64())), "[[x, y]] of the prompt that made it, in pixels."),
        _field("predicted_iou", pa.float32(), "The model's own estimate; above the bar candidate_pred_iou_thresh."),
        _field("stability_score", pa.float32(), "As in the annotations table."),
        _field(
            "box_xyxy",
            _list(pa.int32(), 4),
            "[x0, y0, x1, y1] in pixels of the crop, inclusive, as the reference has it: NMS goes by it. An empty mask "
            "has 0, 0, 0, 0.",
        ),
        _field(
            "segmentation",
            _RLE,
            "COCO RLE in the image; null where the stability is below the bar candidate_stability_score_thresh.",
            nullable=True,
        ),
        _field("area", pa.int64(), "Pixels in the mask; null likewise.", nullable=True),
    ]
)

_DROPPED = {
    "prompt": "Prompts that cannot be used, such as a box outside the image; null before there were prompts.",
    "predicted_iou": "Candidates whose predicted IoU was not above pred_iou_thresh.",
    "stability": "Candidates whose stability score was below stability_score_thresh.",
    "crop_edge": "Masks that touched an inner edge of their crop.",
    "box_nms": "Duplicates within a crop (box IoU, or mask IoU with nms_by=mask, above box_nms_thresh).",
    "crop_nms": "Duplicates between crops.",
    "small_region": "Masks that became duplicates when small holes and islands were removed.",
    "area": "Masks outside the limits on the area.",
    "containment": "Masks that containment rules removed; `maskbeam refine` has such rules, `maskbeam label` none.",
    "max_masks": "Masks beyond max_masks.",
}

IMAGES = pa.schema(
    [
        _field("image_id", pa.string(), "Unique in the run: the path relative to root, in shards `<shard>#<row>`."),
        _field("key", pa.string(), "The record's own key, where its format has one.", nullable=True),
        _field("file_name", pa.string(), "The record's own file name, where it has one.", nullable=True),
        _field(
            "width", pa.int32(), "Pixels, after orientation; null if the image could not be decoded.", nullable=True
        ),
        _field("height", pa.int32(), "Likewise.", nullable=True),
        _field("shard", pa.string(), "Path of the shard, or of the directory of loose files."),
        _field("row", pa.int64(), "Position in the shard, from 0; null for loose files.", nullable=True),
        _field("sha256", pa.string(), "Of the image's bytes, hex; null if they could not be read.", nullable=True),
        _field("status", pa.string(), "labeled, empty (no mask passed the filters) or failed."),
        _field("error_stage", pa.string(), "read, decode, prompt or model; null unless failed.", nullable=True),
        _field("error", pa.string(), "What went wrong; null unless failed.", nullable=True),
        _field("num_masks", pa.int32(), "Rows of this image in the annotations table."),
        _field("num_candidates", pa.int64(), "Masks the model proposed: num_masks plus all that were dropped."),
        *[
            _field(f"dropped_{f.name}", pa.int64(), _DROPPED[f.name], nullable=f.name == "prompt")
            for f in fields(Dropped)
        ],
        _field("exif_orientation", pa.int8(), "1..8 as stored in the file; 1 where it says nothing."),
        _field(
            "seconds",
            pa.float64(),
            "Decode, embed, predict_masks and postprocess together, each of its thread: more than the wall time.",
        ),
        _field("num_prompts", pa.int32(), "Prompts that the image was given; null for a grid.", nullable=True),
        _field("prompts_key", pa.string(), "The key that its prompts were found by.", nullable=True),
    ]
)

# Columns that labels of earlier versions do not have; there they are read as null.
OPTIONAL = frozenset(
    ["prompt_index", "prompt_id", "prompt_box", "point_labels", "mask_prompt", "prompt_score", "mask_token"]
    + ["dropped_prompt", "num_prompts", "prompts_key"]
)


def annotation_rows(image: LabeledImage) -> list[dict[str, Any]]:
    """Rows of the annotations table, one a mask."""
    masks = image.masks
    ranks = rank_masks(
        [mask.predicted_iou for mask in masks], [mask.stability_score for mask in masks], [mask.area for mask in masks]
    ).tolist()
    return [
        {
            "image_id": image.source.image_id,
            "mask_index": index,
            "segmentation": {"size": list(mask.size_hw), "counts": mask.counts},
            "bbox": list(mask.bbox_xywh),
            "area": mask.area,
            "predicted_iou": mask.predicted_iou,
            "stability_score": mask.stability_score,
            "point_coords": [list(point_xy) for point_xy in mask.prompt.points_xy],
            "crop_box": list(mask.crop_box_xywh),
            "category_id": mask.category_id,
            "iscrowd": mask.iscrowd,
            "rank": rank,
            "parent_id": mask.parent_id,
            **_prompt_columns(mask.prompt),
            "mask_token": mask.mask_token,
        }
        for index, (mask, rank) in enumerate(zip(masks, ranks, strict=True))
    ]


def _prompt_columns(prompt: Prompt) -> dict[str, Any]:
    """What a row has of a given prompt beside its points; null for a point of the grid."""
    given = prompt.index is not None
    return {
        "prompt_index": prompt.index,
        "prompt_id": prompt.id,
        "prompt_box": list(prompt.box_xywh) if prompt.box_xywh else None,
        "point_labels": list(prompt.point_labels) if given else None,
        "mask_prompt": prompt.mask if given else None,
        "prompt_score": prompt.score,
    }


def _row_to_prompt(row: dict[str, Any]) -> Prompt:
    points_xy = tuple((x, y) for x, y in row["point_coords"])
    if row["prompt_index"] is None:
        return Prompt(points_xy)
    return Prompt(
        points_xy,
        index=row["prompt_index"],
        id=row["prompt_id"],
        point_labels=tuple(row["point_labels"]),
        box_xywh=tuple(row["prompt_box"]) if row["prompt_box"] else None,
        mask=row["mask_prompt"],
        score=row["prompt_score"],
    )


def row_to_mask(row: dict[str, Any]) -> Mask:
    """Inverse of annotation_rows for one row."""
    height, width = row["segmentation"]["size"]
    x, y, w, h = row["bbox"]
    crop_x, crop_y, crop_w, crop_h = row["crop_box"]
    return Mask(
        size_hw=(height, width),
        counts=row["segmentation"]["counts"],
        bbox_xywh=(x, y, w, h),
        area=row["area"],
        predicted_iou=row["predicted_iou"],
        stability_score=row["stability_score"],
        prompt=_row_to_prompt(row),
        crop_box_xywh=(crop_x, crop_y, crop_w, crop_h),
        parent_id=row["parent_id"],
        category_id=row["category_id"],
        iscrowd=row["iscrowd"],
        mask_token=row["mask_token"],
    )


def image_row(image: LabeledImage, shard_path: str) -> dict[str, Any]:
    """The image's row of the images table."""
    height, width = image.size_hw or (None, None)
    return {
        "image_id": image.source.image_id,
        "key": image.source.key,
        "file_name": image.source.file_name,
        "width": width,
        "height": height,
        "shard": escape_name(shard_path),
        "row": image.source.row,
        "sha256": image.sha256 or None,
        "status": image.status,
        "error_stage": image.failure.stage if image.failure else None,
        "error": image.failure.reason if image.failure else None,
        "num_masks": len(image.masks),
        "num_candidates": image.num_candidates,
        **{f"dropped_{name}": count for name, count in asdict(image.dropped).items()},
        "exif_orientation": image.exif_orientation,
        "seconds": image.seconds.total(),
        "num_prompts": image.num_prompts,
        "prompts_key": image.prompts_key,
    }


def row_to_image(row: dict[str, Any]) -> LabeledImage:
    """Inverse of image_row, but for what is not in it: the number of bytes, the masks, and where the time went."""
    return LabeledImage(
        source=EncodedImage(row["image_id"], row["row"], row["key"], row["file_name"], data=b""),
        num_bytes=0,
        sha256=row["sha256"] or "",
        size_hw=None if row["width"] is None else (row["height"], row["width"]),
        exif_orientation=row["exif_orientation"],
        num_candidates=row["num_candidates"],
        dropped=row_to_dropped(row),
        failure=Failure(row["error_stage"], row["error"]) if row["status"] == "failed" else None,
        num_prompts=row["num_prompts"],
        prompts_key=row["prompts_key"],
    )


def row_to_dropped(row: dict[str, Any]) -> Dropped:
    """The counts of a row of the images table, whatever version wrote it."""
    return Dropped(**{f.name: row.get(f"dropped_{f.name}") or 0 for f in fields(Dropped)})


def chunk_to_candidates(chunk: LabeledChunk, report: ChunkReport, run: Run) -> pa.Table:
    """The candidates table of a chunk: images, their crops and the crops' candidates in the order they came in."""
    found = [
        (image, index, candidate)
        for image in chunk.images
        for index, crop in enumerate(image.candidates)
        for candidate in crop
    ]
    candidates = [candidate for _, _, candidate in found]
    # Column by column, since there are a hundred times as many rows as in the other tables.
    columns: dict[str, Any] = {
        "image_id": [image.source.image_id for image, _, _ in found],
        "crop_index": [index for _, index, _ in found],
        "crop_layer": [candidate.crop.layer for candidate in candidates],
        "crop_box": [candidate.crop.xywh for candidate in candidates],
        "point_coords": [[candidate.point_xy] for candidate in candidates],
        "predicted_iou": np.array([candidate.predicted_iou for candidate in candidates], np.float32),
        "stability_score": np.array([candidate.stability_score for candidate in candidates], np.float32),
        "box_xyxy": [candidate.box_xyxy for candidate in candidates],
        "segmentation": [
            None if candidate.counts is None else {"size": image.size_hw, "counts": candidate.counts}
            for image, _, candidate in found
        ],
        "area": [candidate.area for candidate in candidates],
    }
    arrays = [pa.array(columns[field.name], field.type) for field in CANDIDATES]
    return pa.Table.from_arrays(arrays, schema=CANDIDATES.with_metadata(_metadata_without_totals(report, run)))


def chunk_to_tables(chunk: LabeledChunk, report: ChunkReport, run: Run) -> tuple[pa.Table, pa.Table]:
    """The annotations and images tables of a chunk, with the report and the run in their metadata."""
    annotations = [row for image in chunk.images for row in annotation_rows(image)]
    images = [image_row(image, chunk.path) for image in chunk.images]
    return (
        pa.Table.from_pylist(annotations, schema=ANNOTATIONS.with_metadata(_metadata_without_totals(report, run))),
        pa.Table.from_pylist(images, schema=IMAGES.with_metadata(_metadata(report, run))),
    )


def _metadata(report: ChunkReport, run: Run) -> dict[bytes, str]:
    return {REPORT_KEY: json.dumps(asdict(report)), RUN_KEY: run.to_footer()}


def _metadata_without_totals(report: ChunkReport, run: Run) -> dict[bytes, str]:
    """For the files beside the images file: every attempt at a chunk writes the same bytes, however long it took."""
    return _metadata(replace(report, totals=Totals()), run)


def with_report(images: pa.Table, report: ChunkReport) -> pa.Table:
    """An images table with another report in its metadata."""
    return images.replace_schema_metadata({**images.schema.metadata, REPORT_KEY: json.dumps(asdict(report))})


def report_from_metadata(metadata: dict[bytes, bytes] | None) -> ChunkReport:
    """The ChunkReport in a committed file's metadata.

    Raises:
      ValueError: the file is not one of ours.
    """
    if not metadata or REPORT_KEY not in metadata:
        raise ValueError(f"no {REPORT_KEY.decode()} in the file's metadata: it was not written by maskbeam")
    values = json.loads(metadata[REPORT_KEY])
    return ChunkReport(**{**values, "totals": Totals.from_dict(values["totals"])})
