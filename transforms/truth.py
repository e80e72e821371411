"""The truth that labels are held against: COCO instances JSON (cocodataset.org, format-data), read strictly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transforms import rle


@dataclass(frozen=True)
class TruthObject:
    """One annotation.

    Attributes:
      annotation_id: its id.
      counts: COCO compressed RLE of its mask.
      bbox_xywh: the annotation's own box, in pixels.
      area: the annotation's own area, in pixels; COCO's is that of the polygons. It decides what is small or large.
    """

    annotation_id: int
    counts: str
    bbox_xywh: tuple[float, float, float, float]
    area: float


@dataclass(frozen=True)
class TruthImage:
    """One image of the truth.

    Attributes:
      image_id: its id in the JSON.
      file_name: as the JSON has it, unique.
      size_hw: (H, W) in pixels.
      annotations: as the JSON has them, those of crowd regions too.
    """

    image_id: int
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
                    counts=_segmentation_to_counts(annotation.get("segmentation"), self.size_hw),
                    bbox_xywh=_numbers(annotation, "bbox", 4),
                    area=_numbers(annotation, "area", 1)[0],
                )
            except ValueError as error:
                raise ValueError(f"annotation {annotation['id']} of {self.file_name}: {error}") from error


def _segmentation_to_counts(segmentation: Any, size_hw: tuple[int, int]) -> str:
    """COCO compressed RLE of polygons, of RLE or of uncompressed RLE; the pixels are those of pycocotools' annToRLE."""
    if isinstance(segmentation, list) and all(map(_is_polygon, segmentation)):
        return rle.polygons_to_counts(segmentation, size_hw)
    if not isinstance(segmentation, dict):
        raise ValueError("its segmentation is neither an RLE nor a list of polygons [x, y, x, y, ...]")
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != list(size_hw):
        raise ValueError(f"its RLE has the size {size}, the image [height, width] {list(size_hw)}")
    if isinstance(counts, str):
        rle.check_counts(counts, size_hw)
        return counts
    if isinstance(counts, list) and all(isinstance(length, int) for length in counts):
        return rle.lengths_to_counts(counts, size_hw)
    raise ValueError("the counts of its RLE are neither a compressed string nor a list of run lengths")


def _is_polygon(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(number, (int, float)) for number in value)


def _numbers(annotation: dict[str, Any], name: str, count: int) -> Any:
    value = annotation.get(name)
    numbers = tuple(value) if isinstance(value, list) else (value,)
    if len(numbers) != count or not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError(f"{name} is {value}, expected {'a number' if count == 1 else f'{count} numbers'}")
    return numbers


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
    by_id: dict[int, list[dict[str, Any]]] = {}
    for image in content["images"]:
        _require(image, "image", {"id": int, "file_name": str, "height": int, "width": int})
        if image["id"] in by_id:
            raise ValueError(f"it has two images with the id {image['id']}")
        by_id[image["id"]] = []
    seen = set()
    for annotation in content["annotations"]:
        _require(annotation, "annotation", {"id": int, "image_id": int})
        if annotation["id"] in seen:
            raise ValueError(f"it has two annotations with the id {annotation['id']}")
        seen.add(annotation["id"])
        if annotation["image_id"] not in by_id:
            raise ValueError(f"annotation {annotation['id']} is of image {annotation['image_id']}, which is not there")
        by_id[annotation["image_id"]].append(annotation)
    truth: dict[str, TruthImage] = {}
    for image in content["images"]:
        name = image["file_name"]
        if name in truth:
            raise ValueError(f"it has two images with the file_name {name}: ids {truth[name].image_id}, {image['id']}")
        truth[name] = TruthImage(image["id"], name, (image["height"], image["width"]), tuple(by_id[image["id"]]))
    return truth


def _require(entry: Any, kind: str, types: dict[str, type]) -> None:
    for name, expected in types.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(name), expected):
            told = f"{str(entry)[:200]}{'...' if len(str(entry)) > 200 else ''}"
            raise ValueError(f"{kind} {told} has no {name} of type {expected.__name__}")
