"""The photos to learn from: pixels, instance masks, and regions of like colour at several scales.

Photos are held at a long side of 384 pixels, one and a half times the model's frame, so that crops still have detail.
The regions are those of Felzenszwalb and Huttenlocher, "Efficient Graph-Based Image Segmentation" (2004), as
scikit-image has them: from small to large, they stand in for parts and for what has no instance mask (sky, walls).
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.segmentation import felzenszwalb
from tqdm import tqdm

from maskbeam.transforms.evaluation.truth import TruthImage, parse_instances
from maskbeam.transforms.masks import rle
from maskbeam.transforms.masks.frame import resized_hw

LONG_SIDE = 384

VALIDATION = 60  # photos with the highest ids, never trained on

# Felzenszwalb's scale (the larger, the larger the regions) and smallest region in pixels, for each level.
REGION_LEVELS = ((60, 60), (250, 200), (900, 600))


@dataclass(frozen=True)
class Photo:
    """One photo and everything in it that can be the answer to a prompt.

    Attributes:
      pixels: (H, W, 3) uint8.
      instances: (K, H, W) bool, the objects; they may overlap.
      regions: (L, H, W) int32, for each level the number of the region a pixel lies in, from 0.
    """

    pixels: np.ndarray
    instances: np.ndarray
    regions: np.ndarray


def read_photos(path: Path) -> tuple[list[TruthImage], list[TruthImage]]:
    """Training and validation images of a COCO instances JSON; VALIDATION of them are kept out of training."""
    return split_images(list(parse_instances(json.loads(path.read_text())).values()), VALIDATION)


def split_images(images: list[TruthImage], validation: int) -> tuple[list[TruthImage], list[TruthImage]]:
    """Training and validation: those with the highest ids are kept out of training.

    Raises:
      ValueError: no image would be left to train on.
    """
    if len(images) <= validation:
        raise ValueError(f"{len(images)} images; give more than the {validation} that are kept out of training")
    ordered = sorted(images, key=lambda image: image.image_id)
    return ordered[: len(ordered) - validation], ordered[len(ordered) - validation :]


def load_photos(folder: Path, images: list[TruthImage], cache: Path) -> list[Photo]:
    """Reads photos, their instance masks, and their regions, which are computed once and kept in `cache`.

    Args:
      folder: where the files of `images` lie.
      cache: directory for the regions, one .npz a photo; made if it is missing. Another set of photos needs another.

    Raises:
      ValueError: a photo has another size than its annotations.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        jobs = pool.map(partial(_load_photo, folder, cache), images)
        return list(tqdm(jobs, total=len(images), desc="photos", unit="photo"))


def find_regions(pixels: np.ndarray) -> np.ndarray:
    """Regions of like colour of (H, W, 3) uint8: (levels, H, W) int32."""
    return np.stack(
        [felzenszwalb(pixels, scale=scale, sigma=0.8, min_size=smallest) for scale, smallest in REGION_LEVELS]
    ).astype(np.int32)


def _load_photo(folder: Path, cache: Path, image: TruthImage) -> Photo:
    with Image.open(folder / image.file_name) as file:
        photo = file.convert("RGB")
    if (photo.height, photo.width) != image.size_hw:
        raise ValueError(
            f"{folder / image.file_name} is {photo.width}x{photo.height}, its annotations are for"
            f" {image.size_hw[1]}x{image.size_hw[0]}: give the photos they were made for"
        )
    height, width = resized_hw(image.size_hw, LONG_SIDE)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR))
    rows = ((np.arange(height) + 0.5) / height * image.size_hw[0]).astype(int)
    columns = ((np.arange(width) + 0.5) / width * image.size_hw[1]).astype(int)
    objects = image.objects()
    instances = np.zeros((len(objects), height, width), bool)
    for index, instance in enumerate(objects):
        instances[index] = rle.counts_to_mask(instance.counts, image.size_hw)[np.ix_(rows, columns)]
    stored = cache / f"{image.image_id}.npz"
    if stored.exists():
        regions = np.load(stored)["regions"]
    else:
        regions = find_regions(pixels)
        part = stored.with_suffix(".part.npz")
        np.savez_compressed(part, regions=regions)
        part.replace(stored)
    return Photo(pixels, instances, regions)
