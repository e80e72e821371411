"""SA-1B's JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from maskbeam.transforms.formats.coco import shortest


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
