"""The photos to learn from, with the masks of their objects."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from maskbeam.transforms.evaluation.truth import TruthImage, parse_instances
from maskbeam.transforms.masks import rle

VALIDATION = 60  # photos with the highest ids, never trained on


@dataclass(frozen=True)
class Photo:
    """One photo.

    Attributes:
      pixels: (H, W, 3) uint8.
      masks: (K, H, W) bool, its objects; they may overlap.
    """

    pixels: np.ndarray
    masks: np.ndarray


def read_photos(path: Path) -> tuple[list[TruthImage], list[TruthImage]]:
    """Training and validation images of a COCO instances JSON.

    Raises:
      ValueError: no image would be left to train on.
    """
    images = sorted(parse_instances(json.loads(path.read_text())).values(), key=lambda image: image.image_id)
    if len(images) <= VALIDATION:
        raise ValueError(f"{path} has {len(images)} images; give more than the {VALIDATION} kept out of training")
    return images[:-VALIDATION], images[-VALIDATION:]


def load_photos(folder: Path, images: list[TruthImage]) -> list[Photo]:
    """Reads photos and their masks.

    Raises:
      ValueError: a photo has another size than its annotations.
    """
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda image: load_photo(folder, image), images))


def load_photo(folder: Path, image: TruthImage) -> Photo:
    """Reads one photo; raises as load_photos."""
    with Image.open(folder / image.file_name) as file:
        pixels = np.asarray(file.convert("RGB"))
    if pixels.shape[:2] != image.size_hw:
        raise ValueError(
            f"{folder / image.file_name} is {pixels.shape[1]}x{pixels.shape[0]}, its annotations are for"
            f" {image.size_hw[1]}x{image.size_hw[0]}: give the photos they were made for"
        )
    masks = [rle.counts_to_mask(instance.counts, image.size_hw).astype(bool) for instance in image.objects()]
    return Photo(pixels, np.array(masks, bool).reshape(-1, *image.size_hw))
