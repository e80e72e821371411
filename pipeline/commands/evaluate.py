"""maskbeam evaluate: how many objects of a hand-made truth the labels find, or how two sets of labels differ.

The labels are read chunk by chunk, and only counts are kept of an image. Every image is accounted for: one that failed
counts as an image without masks, and is named.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from maskbeam.pipeline.commands.evaluate_against import (
    NothingToCompare,
    compare_labels,
    comparison_to_dict,
    format_comparison,
)
from maskbeam.pipeline.exits import EXIT_DONE, EXIT_FAILED, UsageError
from maskbeam.pipeline.options import parse_job
from maskbeam.pipeline.progress import progress_bar
from maskbeam.pipeline.results import (
    describe_model,
    escape_controls,
    format_some,
    format_table,
    write_picture,
    write_result,
)
from maskbeam.transforms.evaluation.recall import (
    AREA_RANGES,
    CONFIDENCE,
    IOU_THRESHOLDS,
    MAX_PROPOSALS,
    RESAMPLES,
    Figure,
    ImageRecall,
    Recall,
    image_recall,
    summarize_recall,
)
from maskbeam.transforms.evaluation.truth import TruthImage, TruthObject, parse_instances
from maskbeam.transforms.files.storage import read_json_bytes
from maskbeam.transforms.files.strict_json import parse_json
from maskbeam.transforms.formats.coco import MAX_COCO_BYTES, MEND_COCO
from maskbeam.transforms.labels.run_file import read_run
from maskbeam.transforms.labels.tables import ChunkTables, list_chunks, read_chunks, read_images
from maskbeam.transforms.masks import rle
from maskbeam.transforms.records import DamagedFile

_DESCRIPTION = (
    "Compares labels with a truth: class-agnostic average recall of masks and boxes, as COCO and the SAM paper define "
    "it, with bootstrap intervals. Or, with --against, with other labels of the same images."
)

RANKINGS = ("rank", "predicted_iou")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is compared, and where the result goes.

    Attributes:
      labels: directory of labels, as `label`, `refine` or `import` writes it, on any Beam file system.
      truth: COCO instances JSON, masks as polygons or RLE. An image of it is the one of the labels whose image_id or
        file_name is its file_name, letter by letter.
      against: directory of other labels of the same images, instead of a truth. Images are the same by their image_id,
        else by their file_name, else by their sha256. Those that both have are compared.
      allow_missing: evaluate the images that labels and truth have in common, instead of refusing if one lacks some.
      rank_by: column that orders an image's masks, which decides about the first 10, 100 and 1000: rank, the lowest
        first, or predicted_iou, the highest first, equal ones by mask_index.
      seed: of the bootstrap: another one draws other samples of the images.
      json: file for the whole result, with a row for each image, on any Beam file system; replaced if it exists.
      plot: PNG file for recall over the IoU and AR by size, on any Beam file system; replaced if it exists.
    """

    labels: str
    truth: str | None = None
    against: str | None = None
    allow_missing: bool = False
    rank_by: Literal["rank", "predicted_iou"] = "rank"
    seed: int = 0
    json: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        if (self.truth is None) == (self.against is None):
            raise ValueError("exactly one of --truth and --against must be given.")
        if self.against is not None and self.allow_missing:
            raise ValueError(
                "allow_missing is for --truth. --against compares the images that both have, and counts the others."
            )
        if self.against is not None and (self.rank_by, self.seed) != (type(self).rank_by, type(self).seed):
            raise ValueError("rank_by and seed are for --truth: --against compares all masks, and draws no samples.")
        if self.plot is not None and (self.truth is None or not self.plot.endswith(".png")):
            raise ValueError(f"plot is {self.plot}; expected a file that ends in .png, and --truth beside it.")
        if self.rank_by not in RANKINGS:
            raise ValueError(f"rank_by must be {' or '.join(RANKINGS)}, got {self.rank_by}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


@dataclass(frozen=True)
class EvaluateJob:
    """Everything `maskbeam evaluate` was asked to do."""

    evaluation: EvaluateConfig


@dataclass(frozen=True)
class Joined:
    """Which image of the labels is which of the truth.

    Attributes:
      truth: by the image_id of the labels, in their order.
      failed: image_id -> stage and reason of the labels' failed images, be they in the truth or not.
      only_in_labels: image_id of those that are not in the truth and did not fail.
      only_in_truth: file_name of those that are not in the labels.
    """

    truth: dict[str, TruthImage]
    failed: dict[str, str]
    only_in_labels: tuple[str, ...]
    only_in_truth: tuple[str, ...]


@dataclass(frozen=True)
class EvaluatedImage:
    """An image that labels and truth have in common."""

    image_id: str
    truth: TruthImage
    num_masks: int
    recall: ImageRecall


@dataclass(frozen=True)
class Evaluation:
    """Labels held against a truth."""

    joined: Joined
    images: tuple[EvaluatedImage, ...]
    recall: Recall


def main(argv: list[str]) -> int:
    """Parses the flags and compares."""
    config = parse_evaluate(argv).evaluation
    write_result(config.json, {})  # that it cannot be written is told now, not after the work
    try:
        if config.truth is not None:
            evaluate_truth(config, config.truth)
        if config.against is not None:
            comparison = compare_labels(config.labels, config.against)
            models = {"model": read_model(config.labels), "model_against": read_model(config.against)}
            print(f"models: {models['model']}, held against {models['model_against']}")
            print(format_comparison(comparison, config.labels, config.against))
            write_result(config.json, {"evaluation": asdict(config), **models, **comparison_to_dict(comparison)})
    except NothingToCompare as error:
        print(f"maskbeam: {escape_controls(str(error))}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


def parse_evaluate(argv: list[str]) -> EvaluateJob:
    """Command line -> what to do."""
    return parse_job("evaluate", EvaluateJob, argv, _DESCRIPTION)


def evaluate_truth(config: EvaluateConfig, truth_path: str) -> None:
    """Holds the labels against a truth, prints the result and writes it as JSON and as a plot.

    Raises:
      NothingToCompare: no image is in both.
      UsageError: the labels cannot be read, or an image is not in both.
      DamagedFile: labels or truth are not what they should be.
    """
    try:
        truth = parse_instances(parse_json(read_json_bytes(truth_path, MAX_COCO_BYTES)))
        joined = join_truth(truth, _image_rows(config.labels), config.allow_missing)
        found = evaluate_images(config.labels, joined.truth, config.rank_by)
        images = tuple(progress_bar(found, total=len(joined.truth), unit="image"))
    except (UsageError, NothingToCompare):
        raise
    except ValueError as error:
        raise DamagedFile(f"cannot use --truth {truth_path}: {error}. {MEND_COCO}") from error
    except OSError as error:
        raise UsageError(f"cannot read --truth {truth_path}: {error}") from error
    evaluation = Evaluation(joined, images, summarize_recall([image.recall for image in images], config.seed))
    model = read_model(config.labels)
    print(f"model: {model}")
    print(format_evaluation(evaluation, config))
    write_result(config.json, {"evaluation": asdict(config), "model": model, **evaluation_to_dict(evaluation)})
    if config.plot is not None:
        # Late: nothing else needs matplotlib.
        from maskbeam.pipeline.plot_recall import plot_recall

        write_picture(config.plot, plot_recall(evaluation.recall))


def read_model(labels: str) -> str:
    """Which model made the labels."""
    return describe_model(read_run(labels))


def join_truth(truth: dict[str, TruthImage], rows: Iterable[dict[str, Any]], allow_missing: bool) -> Joined:
    """Finds for each image of the labels the one of the truth that has its image_id or its file_name as file_name.

    Args:
      truth: by file_name.
      rows: of the images table.
      allow_missing: leave out images that are not in both.

    Raises:
      NothingToCompare: no image is in both.
      UsageError: an image may be two, is of another size in the truth, or is missing on a side.
    """
    found: dict[str, TruthImage] = {}
    owners: dict[str, str] = {}
    failed, only_in_labels = {}, []
    for row in rows:
        image_id, size_hw = row["image_id"], (row["height"], row["width"])
        if row["status"] == "failed":
            failed[image_id] = f"{row['error_stage']}: {row['error']}"
        names = {name for name in (image_id, row["file_name"]) if name in truth}
        if not names:
            if row["status"] != "failed":  # a broken shard's row is no image
                only_in_labels.append(image_id)
            continue
        if len(names) > 1:
            raise UsageError(
                f"{image_id} of the labels is two images of the truth: {image_id} by its image_id and "
                f"{row['file_name']} by its file_name. Rename one in the truth."
            )
        (name,) = names
        if name in owners:
            raise UsageError(
                f"{name} of the truth is two images of the labels: {owners[name]} and {image_id}. Use the path "
                "relative to the labels' root as file_name in the truth."
            )
        if row["status"] != "failed" and size_hw != truth[name].size_hw:
            raise UsageError(
                f"{image_id} has the size {size_hw} (H, W) in the labels and {truth[name].size_hw} in the truth. If "
                "the truth is of the unrotated photo, label with --exif ignore."
            )
        owners[name] = image_id
        found[image_id] = truth[name]
    joined = Joined(found, failed, tuple(only_in_labels), tuple(name for name in truth if name not in owners))
    if not found:
        raise NothingToCompare(
            f"labels and truth have no image in common: the labels have {format_some(joined.only_in_labels)}, the "
            f"truth {format_some(joined.only_in_truth)}. A file_name of the truth must be an image_id or file_name of "
            "the labels."
        )
    missing = (("truth but not in the labels", joined.only_in_truth), ("labels but not in the truth", only_in_labels))
    for where, images in missing:
        if images and not allow_missing:
            raise UsageError(
                f"{len(images)} images are in the {where}: {format_some(images)}. --allow_missing evaluates the others."
            )
    return joined


def evaluate_images(labels: str, truth: dict[str, TruthImage], rank_by: str) -> Iterator[EvaluatedImage]:
    """What the masks of each image find, one chunk in memory.

    Args:
      truth: by the image_id of the labels; other images are left out.

    Raises:
      ValueError: an annotation of the truth cannot be used; names it.
      UsageError, DamagedFile: see labeled_chunks.
    """
    for tables in labeled_chunks(labels):
        chosen = [image_id for image_id in tables.images["image_id"].to_pylist() if image_id in truth]
        rows_of: dict[str, list[int]] = {image_id: [] for image_id in chosen}
        for row, image_id in enumerate(tables.annotations["image_id"].to_pylist()):
            if image_id in rows_of:
                rows_of[image_id].append(row)
        for image_id, rows in rows_of.items():
            objects = truth[image_id].objects()
            masks = tables.annotations.take(pa.array(rows, pa.int64()))
            recall = recall_of_masks(masks, objects, truth[image_id].size_hw, rank_by)
            yield EvaluatedImage(image_id, truth[image_id], len(rows), recall)


def recall_of_masks(masks: pa.Table, objects: list[TruthObject], size_hw: tuple[int, int], rank_by: str) -> ImageRecall:
    """What the masks of an image find, in the order of a ranking.

    Args:
      masks: the image's rows of the annotations table.
    """
    order = ranked_order(masks, rank_by)
    counts = masks["segmentation"].combine_chunks().field("counts").to_pylist()
    boxes_xywh = np.array(masks["bbox"].to_pylist(), float).reshape(-1, 4)
    return image_recall(
        rle.ious([counts[i] for i in order], [one.counts for one in objects], size_hw),
        rle.box_ious(boxes_xywh[order], np.array([one.bbox_xywh for one in objects]).reshape(-1, 4)),
        np.array([one.area for one in objects]),
    )


def ranked_order(masks: pa.Table, rank_by: str) -> np.ndarray:
    """Indices of an image's rows, the first-ranked first."""
    if rank_by == "rank":
        return np.argsort(masks["rank"].to_numpy())
    return np.lexsort((masks["mask_index"].to_numpy(), -masks["predicted_iou"].to_numpy()))


def _image_rows(labels: str) -> Iterator[dict[str, Any]]:
    """What join_truth needs of the images; raises what labeled_chunks does."""
    columns = ["image_id", "file_name", "height", "width", "status", "error_stage", "error"]
    try:
        for images in read_images(labels, list_chunks(labels), columns):
            yield from images.to_pylist()
    except (ValueError, OSError) as error:
        raise UsageError(f"cannot read labels: {error}") from error


def labeled_chunks(labels: str) -> Iterator[ChunkTables]:
    """All chunks, one at a time in memory.

    Raises:
      UsageError: there is none.
      DamagedFile: one is damaged.
    """
    try:
        yield from read_chunks(labels)
    except (ValueError, OSError) as error:
        raise UsageError(f"cannot read labels: {error}") from error


def format_evaluation(evaluation: Evaluation, config: EvaluateConfig) -> str:
    """What the command prints: failed and missing images, totals, the table of figures with their intervals."""
    joined, recall, images = evaluation.joined, evaluation.recall, evaluation.images
    lines = [escape_controls(f"failed {image_id}: {reason}") for image_id, reason in joined.failed.items()]
    if joined.only_in_labels:
        lines.append(f"left out, since not in the truth: {len(joined.only_in_labels)} images")
    if joined.only_in_truth:
        lines.append(f"left out, since not in the labels: {len(joined.only_in_truth)} images")
    lines += [
        f"{len(images)} images, {sum(image.num_masks for image in images)} masks, {recall.objects['all']} objects; "
        f"{sum(image.truth.num_crowds for image in images)} crowd regions ignored",
        f"masks in the order of {config.rank_by}; in brackets {CONFIDENCE:.0%} intervals, from {RESAMPLES} bootstrap "
        f"samples of the images, seed {config.seed}",
        "",
    ]
    table = [["", *AREA_RANGES], ["objects", *(str(recall.objects[size]) for size in AREA_RANGES)]]
    for kind, figures in (("mask", recall.mask_ar), ("box", recall.box_ar)):
        table += [
            [f"{kind} AR@{count}", *(_told(figures[size][count]) for size in AREA_RANGES)] for count in MAX_PROPOSALS
        ]
    table.append(["mean best IoU", *(_told(recall.mean_best_iou[size]) for size in AREA_RANGES)])
    lines += format_table(table)
    return "\n".join(lines)


def _told(figure: Figure) -> str:
    if figure.value is None:
        return "-"
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def evaluation_to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """The result for JSON: the figures, what could not be compared, a row for each image."""
    joined, images = evaluation.joined, evaluation.images
    return {
        "summary": {
            "images": len(images),
            "masks": sum(image.num_masks for image in images),
            "crowd_regions": sum(image.truth.num_crowds for image in images),
            "iou_thresholds": IOU_THRESHOLDS.tolist(),
            "area_ranges": AREA_RANGES,
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            **asdict(evaluation.recall),
        },
        "failed": joined.failed,
        "only_in_labels": joined.only_in_labels,
        "only_in_truth": joined.only_in_truth,
        "images": [_image_to_dict(image) for image in images],
    }


def _image_to_dict(image: EvaluatedImage) -> dict[str, Any]:
    recall, objects = image.recall, int(image.recall.objects[0])
    found = recall.masks[0].mean(axis=-1).tolist()  # at an average threshold
    return {
        "image_id": image.image_id,
        "file_name": image.truth.file_name,
        "masks": image.num_masks,
        "objects": objects,
        "crowd_regions": image.truth.num_crowds,
        "mask_ar": {count: found[k] / objects if objects else None for k, count in enumerate(MAX_PROPOSALS)},
        "mean_best_iou": float(recall.best_ious[0]) / objects if objects else None,
    }
