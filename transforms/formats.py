"""The labels of one image in other tools' formats: SA-1B's JSON, YOLO's segmentation text, a picture of labels.

And the names of the files they are in, which follow the images' names as far as those are safe.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transforms import rle
from transforms.coco import mask_name, shortest
from transforms.images import has_image_extension
from transforms.polygons import PolygonLoss, counts_to_outlines, join_parts, polygons_iou

# Digits after the point of coordinates between 0 and 1: a hundredth of a pixel in the largest images.
_YOLO_DIGITS = 6

# File systems allow 255 bytes a name, and about 4000 a path with the directories before it.
_MAX_NAME_BYTES = 240
_MAX_PATH_BYTES = 1000


def file_names(file_name: str, image_id: str, extension: str) -> list[str]:
    """Relative paths that an image's labels may have, the first that no other image has taken is theirs.

    The first is the image's file name with another extension: tools find the labels of an image by that. The second is
    the image_id, whole. The third is a hash of the image_id. None leads out of the directory.

    >>> file_names("cats/a.jpg", "train.tar#7", ".txt")[:2]
    ['cats/a.txt', 'train.tar#7.txt']
    >>> file_names("/../%a\\n.jpg", "x", ".txt")[0]
    '%/%2E%2E/%25a%0A.txt'
    """
    digest = hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).hexdigest()
    paths = [path for path in (stem(file_name), image_id) if len(path) <= _MAX_PATH_BYTES]
    names = [_safe_path(path) + extension for path in paths]
    return [name for name in names if _fits(name)] + [f"%{digest}{extension}"]


def stem(file_name: str) -> str:
    """A file name without an image's extension; others belong to the name.

    >>> stem("cats/a.jpg"), stem("train.tar#7")
    ('cats/a', 'train.tar#7')
    """
    return file_name.rpartition(".")[0] if has_image_extension(file_name) else file_name


def _safe_path(path: str) -> str:
    """A relative path without control characters, "", "." and ".." as names; different for different paths."""
    return "/".join(_safe_name(name) for name in path.split("/"))


def _safe_name(name: str) -> str:
    if name in (".", ".."):
        return name.replace(".", "%2E")
    return re.sub(r"[\x00-\x1f\x7f%]", lambda found: f"%{ord(found[0]):02X}", name) or "%"


def _fits(path: str) -> bool:
    sizes = [len(name.encode("utf-8", "surrogatepass")) for name in path.split("/")]
    return max(sizes) <= _MAX_NAME_BYTES and sum(sizes) + len(sizes) <= _MAX_PATH_BYTES


def sa1b_record(image: Mapping[str, Any], masks: Sequence[Mapping[str, Any]], first_id: int) -> dict[str, Any]:
    """The content of SA-1B's JSON file of an image (https://ai.meta.com/datasets/segment-anything-downloads).

    Args:
      image: its COCO record.
      masks: its rows of the annotations table.
      first_id: the id of its first mask.

    Returns:
      the record; null where an imported mask has no such number.
    """
    return {
        "image": {
            "image_id": image["id"],
            "width": image["width"],
            "height": image["height"],
            "file_name": image["file_name"],
        },
        "annotations": [
            {
                "id": first_id + index,
                "segmentation": mask["segmentation"],
                "bbox": mask["bbox"],
                "area": mask["area"],
                "predicted_iou": _known(mask["predicted_iou"]),
                "stability_score": _known(mask["stability_score"]),
                "crop_box": mask["crop_box"],
                "point_coords": [[None if math.isnan(value) else value for value in xy] for xy in mask["point_coords"]],
            }
            for index, mask in enumerate(masks)
        ],
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else shortest(value)


@dataclass
class YoloLoss:
    """What YOLO's text loses.

    Attributes:
      polygons: what becoming polygons loses.
      crowds, empty: masks that are left out: crowds, which are no objects to learn, and masks without a pixel.
    """

    polygons: PolygonLoss
    crowds: int = 0
    empty: int = 0


def yolo_text(masks: Sequence[dict[str, Any]], classes: Mapping[int, int], loss: YoloLoss) -> str:
    """YOLO-seg text of an image: a line a mask, its class and its outline x y x y ..., fractions of the image's sides.

    A mask is one polygon: several parts are tied together by lines there and back, holes are filled.

    Args:
      masks: its rows of the annotations table.
      classes: category_id -> class, from 0.
      loss: what is lost is added to it.
    """
    lines = []
    for mask in masks:
        if mask["iscrowd"]:
            loss.crowds += 1
            continue
        if not mask["area"]:
            loss.empty += 1
            continue
        counts, size_hw = mask["segmentation"]["counts"], tuple(mask["segmentation"]["size"])
        outlines = counts_to_outlines(counts, size_hw)
        scale_xy = np.array(size_hw[::-1])
        fractions_xy = np.round(join_parts(outlines.parts) / scale_xy, _YOLO_DIGITS)
        loss.polygons.count(
            outlines, polygons_iou([(fractions_xy * scale_xy).ravel().tolist()], counts, size_hw), mask_name(mask)
        )
        numbers = " ".join(f"{value:.{_YOLO_DIGITS}f}" for value in fractions_xy.ravel().tolist())
        lines.append(f"{classes[mask['category_id']]} {numbers}\n")
    return "".join(lines)


@dataclass
class Overlap:
    """What is hidden where masks overlap in pictures that have one label a pixel.

    Attributes:
      pixels, hidden_pixels: of all masks, and those that belong to a mask on top.
      hidden_masks: masks of which nothing is left.
    """

    pixels: int = 0
    hidden_pixels: int = 0
    hidden_masks: int = 0


def label_picture(masks: Sequence[Mapping[str, Any]], size_hw: tuple[int, int], overlap: Overlap) -> np.ndarray:
    """(H, W) uint16: 0 = no mask, k = the mask with mask_index k - 1; where masks overlap, the smallest.

    Of masks of one size the one that comes first stays on top.

    Args:
      masks: the image's rows of the annotations table.
      overlap: what is hidden is added to it.

    Raises:
      ValueError: there are more masks than 16 bits can tell apart.
    """
    if any(mask["mask_index"] >= 2**16 - 1 for mask in masks):
        raise ValueError(
            f"{masks[0]['image_id']} has {len(masks)} masks; a picture of 16 bits can tell {2**16 - 1} apart. Export "
            "another format, or label with --max_masks."
        )
    picture = np.zeros(size_hw, np.uint16)
    for mask in sorted(masks, key=lambda mask: (-mask["area"], -mask["mask_index"])):
        picture[rle.counts_to_mask(mask["segmentation"]["counts"], size_hw)] = mask["mask_index"] + 1
    shown = np.bincount(picture.ravel(), minlength=2**16)
    for mask in masks:
        left = int(shown[mask["mask_index"] + 1])
        overlap.pixels += mask["area"]
        overlap.hidden_pixels += mask["area"] - left
        overlap.hidden_masks += mask["area"] > 0 and left == 0
    return picture
