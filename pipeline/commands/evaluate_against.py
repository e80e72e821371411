"""maskbeam evaluate --against: which masks of one set of labels another one of the same images has, too.

Both are read chunk by chunk, and may be cut into chunks differently. Images are the same by their image_id, else by
their file name, else by their sha256: labels of one folder may have other roots, or be of a tar of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from maskbeam.pipeline.exits import UsageError
from maskbeam.pipeline.progress import progress_bar
from maskbeam.pipeline.results import escape_controls, format_mean, format_share, format_some, format_table
from maskbeam.transforms.evaluation.agreement import MATCH_IOU, compare_masks
from maskbeam.transforms.labels.layout import ChunkKey
from maskbeam.transforms.labels.schema import row_to_mask
from maskbeam.transforms.labels.tables import list_chunks, read_chunk, read_images
from maskbeam.transforms.records import Mask, Sums

_CHUNKS_IN_MEMORY = 4

# What images are joined by, in this order. Photos whose sha256 differ are joined last: they may have been packed anew,
# but only if nothing else is the same photo.
_JOINS = (
    ("image_id", True),
    ("file_name", True),
    ("sha256", True),
    ("image_id", False),
    ("file_name", False),
)


class NothingToCompare(ValueError):
    """No image of the labels can be compared; the message says why, for people."""


@dataclass(frozen=True)
class ImageName:
    """What an image is known by, as in the images table, and the chunk that it is in."""

    image_id: str
    file_name: str | None
    sha256: str | None
    chunk: ChunkKey


@dataclass(frozen=True)
class ComparedMasks(Sums):
    """The masks of an image, or of many, in two sets of labels.

    Attributes:
      masks: in the labels.
      masks_against: in the labels that they are compared with.
      matched: pairs that are the same object, by agreement.MATCH_IOU.
      matched_iou_sum: of the pairs' mask IoU.
      best_iou_sum: over all of masks_against, of the highest mask IoU with any mask of the labels.
    """

    masks: int = 0
    masks_against: int = 0
    matched: int = 0
    matched_iou_sum: float = 0.0
    best_iou_sum: float = 0.0

    @property
    def lost(self) -> int:
        """Masks of the other labels that these do not have."""
        return self.masks_against - self.matched

    @property
    def new(self) -> int:
        """Masks that the other labels do not have."""
        return self.masks - self.matched

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the counts and the two means, None where there is nothing to average."""
        return {
            "masks": self.masks,
            "masks_against": self.masks_against,
            "matched": self.matched,
            "lost": self.lost,
            "new": self.new,
            "mean_matched_iou": self.matched_iou_sum / self.matched if self.matched else None,
            "mean_best_iou": self.best_iou_sum / self.masks_against if self.masks_against else None,
        }


@dataclass(frozen=True)
class Comparison:
    """Two sets of labels.

    Attributes:
      images: by image_id, those that both have and that failed in neither.
      failed: image_id -> in which labels it failed: "labels", "against" or "both". They are not compared.
      only_in_labels, only_in_against: image_id of those that one of them lacks.
      other_ids: image_id -> that in the other labels, where it is another one.
    """

    images: dict[str, ComparedMasks]
    failed: dict[str, str]
    only_in_labels: tuple[str, ...]
    only_in_against: tuple[str, ...]
    other_ids: dict[str, str]

    @property
    def unchanged(self) -> int:
        """Images without a lost or new mask."""
        return sum(not image.lost and not image.new for image in self.images.values())


def compare_labels(labels: str, against: str) -> Comparison:
    """Compares the masks of all images that two sets of labels have in common.

    Raises:
      NothingToCompare: there is none that failed in neither.
      UsageError: one of them cannot be read, or an image has two sizes.
    """
    try:
        names, names_against = _read_names(labels), _read_names(against)
        joined = join_images(names, names_against)
        if not joined:
            raise NothingToCompare(
                f"{labels} and {against} have no image in common: {_examples(names)} and {_examples(names_against)}. "
                "Images are the same by their image_id, else by their file_name, else by their sha256, where only one "
                "image has it."
            )
        comparison = _compare(labels, against, joined, names_against)
    except NothingToCompare:
        raise
    except (ValueError, OSError) as error:
        raise UsageError(f"cannot compare the labels: {error}") from error
    if not comparison.images:
        raise NothingToCompare(
            f"all {len(comparison.failed)} images that {labels} and {against} have in common failed in one of them."
        )
    return comparison


def _read_names(labels: str) -> list[ImageName]:
    chunks = list_chunks(labels)
    tables = zip(chunks, read_images(labels, chunks, ["image_id", "file_name", "sha256"]), strict=True)
    return [
        ImageName(row["image_id"], row["file_name"], row["sha256"], chunk)
        for chunk, table in tables
        for row in table.to_pylist()
    ]


def _examples(names: list[ImageName]) -> str:
    return format_some([f"{name.image_id} ({name.file_name})" for name in names])


def join_images(labels: Iterable[ImageName], against: Iterable[ImageName]) -> dict[str, ImageName]:
    """Finds which image is which in two sets of labels, by what only one image of each has.

    Returns:
      image_id in the labels -> the image in the others.
    """
    joined: dict[str, ImageName] = {}
    left, right = list(labels), list(against)
    for attribute, same_bytes in _JOINS:
        by_value = _by_unique(right, attribute)
        pairs = [(name, by_value[value]) for value, name in _by_unique(left, attribute).items() if value in by_value]
        found = {a.image_id: b for a, b in pairs if not (same_bytes and _bytes_differ(a, b))}
        taken = {other.image_id for other in found.values()}
        left = [name for name in left if name.image_id not in found]
        right = [name for name in right if name.image_id not in taken]
        joined |= found
    return joined


def _by_unique(names: list[ImageName], attribute: str) -> dict[str, ImageName]:
    """The images by an attribute, without those that lack it or share it."""
    counts = Counter(getattr(name, attribute) for name in names)
    return {value: name for name in names if (value := getattr(name, attribute)) is not None and counts[value] == 1}


def _bytes_differ(a: ImageName, b: ImageName) -> bool:
    return None not in (a.sha256, b.sha256) and a.sha256 != b.sha256


def _compare(labels: str, against: str, joined: dict[str, ImageName], others: list[ImageName]) -> Comparison:
    @lru_cache(maxsize=_CHUNKS_IN_MEMORY)
    def read_other(chunk: ChunkKey) -> dict[str, _Image]:
        return {image.image_id: image for image in _images(against, chunk)}

    compared, failed, only_in_labels = {}, {}, []
    for chunk in progress_bar(list_chunks(labels), unit="chunk"):
        for image in _images(labels, chunk):
            if image.image_id not in joined:
                only_in_labels.append(image.image_id)
                continue
            name = joined[image.image_id]
            other = read_other(name.chunk)[name.image_id]
            if image.failed or other.failed:
                both = image.failed and other.failed
                failed[image.image_id] = "both" if both else "labels" if image.failed else "against"
                continue
            if image.size_hw != other.size_hw:
                raise ValueError(
                    f"{image.image_id} has the size {image.size_hw} (H, W) in {labels} and {other.size_hw} in "
                    f"{against}. Label both with the same --exif."
                )
            compared[image.image_id] = _compare_image(image.masks, other.masks)
    taken = {name.image_id for name in joined.values()}
    only_in_against = sorted(name.image_id for name in others if name.image_id not in taken)
    other_ids = {image_id: name.image_id for image_id, name in joined.items() if image_id != name.image_id}
    return Comparison(compared, failed, tuple(only_in_labels), tuple(only_in_against), other_ids)


@dataclass(frozen=True)
class _Image:
    image_id: str
    size_hw: tuple[int | None, int | None]
    failed: bool
    masks: list[Mask]


def _images(labels: str, chunk: ChunkKey) -> Iterator[_Image]:
    for row, masks in read_chunk(labels, chunk).rows():
        size_hw = (row["height"], row["width"])
        yield _Image(row["image_id"], size_hw, row["status"] == "failed", [row_to_mask(mask) for mask in masks])


def _compare_image(masks: list[Mask], against: list[Mask]) -> ComparedMasks:
    agreement = compare_masks(expected=against, actual=masks)
    return ComparedMasks(
        len(masks), len(against), agreement.matched, sum(agreement.matched_ious), sum(agreement.best_ious)
    )


def format_comparison(comparison: Comparison, labels: str, against: str) -> str:
    """What the command prints."""
    total = sum(comparison.images.values(), ComparedMasks())
    means = total.to_dict()
    lines = [escape_controls(f"failed in {where}: {image_id}") for image_id, where in comparison.failed.items()]
    table = [
        ("images in both", str(len(comparison.images) + len(comparison.failed)), ""),
        ("  with another image_id: joined by file_name or sha256", str(len(comparison.other_ids)), ""),
        ("  failed in one or both, not compared", str(len(comparison.failed)), ""),
        (
            "  without a lost or new mask",
            str(comparison.unchanged),
            format_share(comparison.unchanged, len(comparison.images)),
        ),
        (f"images only in {labels}", str(len(comparison.only_in_labels)), ""),
        (f"images only in {against}", str(len(comparison.only_in_against)), ""),
        (f"masks in {against}", str(total.masks_against), ""),
        (f"  matched at IoU >= {MATCH_IOU}", str(total.matched), format_share(total.matched, total.masks_against)),
        ("  lost", str(total.lost), format_share(total.lost, total.masks_against)),
        (f"masks in {labels}", str(total.masks), ""),
        ("  new", str(total.new), format_share(total.new, total.masks)),
        ("mean IoU of the matched masks", format_mean(means["mean_matched_iou"]), ""),
        (f"mean best IoU of all masks in {against}", format_mean(means["mean_best_iou"]), ""),
    ]
    return "\n".join([*lines, *format_table(table)])


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """The result for JSON: the totals, what could not be compared, a row for each image."""
    return {
        "summary": {
            "images": len(comparison.images),
            "unchanged": comparison.unchanged,
            "match_iou": MATCH_IOU,
            **sum(comparison.images.values(), ComparedMasks()).to_dict(),
        },
        "failed": comparison.failed,
        "only_in_labels": comparison.only_in_labels,
        "only_in_against": comparison.only_in_against,
        "other_ids": comparison.other_ids,
        "images": [{"image_id": image_id, **masks.to_dict()} for image_id, masks in comparison.images.items()],
    }
