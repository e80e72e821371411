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
from pycocotools import mask as coco_mask
from skimage.segmentation import felzenszwalb
from tqdm import tqdm

LONG_SIDE = 384

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


def split_images(truth: dict, validation: int) -> tuple[list[dict], list[dict]]:
    """Splits COCO's "images" into training and validation: those with the highest ids are kept out of training."""
    images = sorted(truth["images"], key=lambda image: image["id"])
    return images[: len(images) - validation], images[len(images) - validation :]


def load_photos(folder: Path, truth: dict, images: list[dict], cache: Path) -> list[Photo]:
    """Reads photos, their instance masks, and their regions, which are computed once and kept in `cache`.

    Args:
      folder: where the files of `images` lie.
      truth: COCO instances.
      images: entries of truth["images"].
      cache: directory for the regions, one .npz a photo; made if it is missing.
    """
    cache.mkdir(parents=True, exist_ok=True)
    annotations: dict[int, list[dict]] = {image["id"]: [] for image in images}
    for annotation in truth["annotations"]:
        if annotation["image_id"] in annotations and not annotation["iscrowd"]:
            annotations[annotation["image_id"]].append(annotation)
    with ProcessPoolExecutor() as pool:
        jobs = pool.map(partial(_load_photo, folder, cache), images, [annotations[image["id"]] for image in images])
        return list(tqdm(jobs, total=len(images), desc="photos", unit="photo"))


def decode_instance(annotation: dict, height: int, width: int) -> np.ndarray:
    """The mask of a COCO annotation, polygons or RLE: (height, width) bool."""
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(segmentation).astype(bool)


def find_regions(pixels: np.ndarray) -> np.ndarray:
    """Regions of like colour of (H, W, 3) uint8: (levels, H, W) int32."""
    return np.stack(
        [felzenszwalb(pixels, scale=scale, sigma=0.8, min_size=smallest) for scale, smallest in REGION_LEVELS]
    ).astype(np.int32)


def _load_photo(folder: Path, cache: Path, image: dict, annotations: list[dict]) -> Photo:
    with Image.open(folder / image["file_name"]) as file:
        photo = file.convert("RGB")
    factor = LONG_SIDE / max(photo.size)
    width, height = (max(1, round(side * factor)) for side in photo.size)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR))
    instances = np.zeros((len(annotations), height, width), bool)
    rows = ((np.arange(height) + 0.5) / height * image["height"]).astype(int)
    columns = ((np.arange(width) + 0.5) / width * image["width"]).astype(int)
    for index, annotation in enumerate(annotations):
        instances[index] = decode_instance(annotation, image["height"], image["width"])[np.ix_(rows, columns)]
    stored = cache / f"{image['id']}.npz"
    if stored.exists():
        regions = np.load(stored)["regions"]
    else:
        regions = find_regions(pixels)
        np.savez_compressed(stored, regions=regions)
    return Photo(pixels, instances, regions)


def read_truth(path: Path) -> dict:
    """COCO instances JSON."""
    return json.loads(path.read_text())
