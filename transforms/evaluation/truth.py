"""The truth that labels are held against: COCO instances JSON (cocodataset.org, format-data), read strictly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from maskbeam.transforms.formats.coco import group_by_image, is_number, name_and_size, numbers, segmentation_to_counts


@dataclass(frozen=True)
class TruthObject:
    """One annotation.

    Attributes:
      annotation_id: its id, a number or a string.
      counts: COCO compressed RLE of its mask.
      bbox_xywh: the annotation's own box, in pixels.
      area: the annotation's own area, in pixels; COCO's is that of the polygons. It decides what is small or large.
    """

    annotation_id: int | str
    counts: str
    bbox_xywh: tuple[float, float, float, float]
    area: float


@dataclass(frozen=True)
class TruthImage:
    """One image of the truth.

    Attributes:
      image_id: its id in the JSON, a number or a string.
      file_name: as the JSON has it, unique.
      size_hw: (H, W) in pixels.
      annotations: as the JSON has them, those of crowd regions too.
    """

    image_id: int | str
    file_name: str
    size_hw: tuple[int, int]
    annotations: tuple[dict[str, Any], ...]

    @property
    def num_crowds(self) -> int:
        """Crowd regions, which are no objects."""
        return sum(bool(annotation.get("iscrowd")) for annotation in self.annotations)

    def objects(self) -> list[TruthObject]:
        """The annotations that are no crowd regions, in the order of the JSON.

        Raises:
          ValueError: an annotation cannot be used; names it.
        """
        return list(self._objects())

    def _objects(self) -> Iterator[TruthObject]:
        for annotation in self.annotations:
            if annotation.get("iscrowd"):
                continue
            try:
                yield TruthObject(
                    annotation_id=annotation["id"],
                    counts=segmentation_to_counts(annotation.get("segmentation"), self.size_hw),
                    bbox_xywh=_box_xywh(annotation.get("bbox")),
                    area=_area(annotation.get("area")),
                )
            except ValueError as error:
                raise ValueError(f"annotation {annotation['id']} of {self.file_name}: {error}") from error


def _area(value: Any) -> float:
    if not is_number(value) or value < 0:
        raise ValueError(f"its area is {value!r:.100}; expected a number that is not negative")
    return float(value)


def _box_xywh(value: Any) -> tuple[float, float, float, float]:
    x, y, w, h = numbers("bbox", value, 4)
    if min(w, h) < 0:
        raise ValueError(f"its bbox is {value}; expected [x, y, width, height], neither side negative")
    return x, y, w, h


def parse_instances(content: Any) -> dict[str, TruthImage]:
    """The images of a COCO instances JSON by their file names.

    Args:
      content: of the JSON: "images" with id, file_name, height and width, "annotations" with id, image_id,
        segmentation, bbox, area and iscrowd. Nothing else is looked at, so no category either.

    Raises:
      ValueError: it is something else, an id or a file name is there twice, an annotation is of no image.
    """
    for name in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f'it has no list "{name}"; expected COCO instances JSON')
    truth: dict[str, TruthImage] = {}
    for image, own in group_by_image(content["images"], content["annotations"]):
        name, size_hw = name_and_size(image)
        if name in truth:
            raise ValueError(f"it has two images with the file_name {name}: ids {truth[name].image_id}, {image['id']}")
        truth[name] = TruthImage(image["id"], name, size_hw, tuple(own))
    return truth
