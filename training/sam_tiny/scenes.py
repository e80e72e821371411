"""What the model sees in one step: frames made of photos, with other light and objects of other photos pasted in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from training.sam_tiny.model import FRAME
from training.sam_tiny.photos import Photo

PASTED = 0.35  # scenes with objects of another scene pasted in
WHOLE = 0.3  # crops that are the whole photo
SMALLEST_CROP = 0.35  # of a photo's sides
SMALLEST_FILL = 0.55  # of the frame's side
SMALLEST_PASTED = 400  # pixels of the frame


@dataclass(frozen=True)
class Scene:
    """A frame before prompts are put on it.

    Attributes:
      pixels: (FRAME, FRAME, 3) uint8; padding, right of or below `size`, is 0.
      size: height and width of what is not padding.
      masks: (K, FRAME, FRAME) bool.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    masks: np.ndarray


def make_scene(rng: np.random.Generator, photos: list[Photo]) -> Scene:
    """A random crop of a random photo, some with objects of another one pasted in."""
    scene = _crop(rng, photos[rng.integers(len(photos))])
    if rng.random() < PASTED:
        scene = paste(rng, scene, _crop(rng, photos[rng.integers(len(photos))]))
    return Scene(_recolor(rng, scene.pixels, scene.size), scene.size, scene.masks)


def place(photo: Photo, box_xyxy: tuple[float, float, float, float], stretch: float, flip: bool, fill: float) -> Scene:
    """Puts a part of a photo into the frame's upper left corner, as SAM does: the long side fills it.

    Args:
      box_xyxy: the part, in the photo's pixels.
      stretch: height is multiplied by it.
      fill: share of the frame that the long side takes, 1 as in use.
    """
    left, top, right, bottom = box_xyxy
    width, height = right - left, (bottom - top) * stretch
    factor = FRAME * fill / max(width, height)
    size = (min(FRAME, max(1, round(height * factor))), min(FRAME, max(1, round(width * factor))))
    resized = np.asarray(Image.fromarray(photo.pixels).resize(size[::-1], Image.Resampling.BILINEAR, box=box_xyxy))
    rows = (top + (np.arange(size[0]) + 0.5) / size[0] * (bottom - top)).astype(int)
    columns = (left + (np.arange(size[1]) + 0.5) / size[1] * (right - left)).astype(int)
    if flip:
        columns, resized = columns[::-1], resized[:, ::-1]
    pixels = np.zeros((FRAME, FRAME, 3), np.uint8)
    pixels[: size[0], : size[1]] = resized
    masks = np.zeros((len(photo.masks), FRAME, FRAME), bool)
    masks[:, : size[0], : size[1]] = photo.masks[:, rows[:, None], columns]
    return Scene(pixels, size, masks[masks.any(axis=(1, 2))])


def paste(rng: np.random.Generator, scene: Scene, donor: Scene) -> Scene:
    """Pastes up to three objects of another scene over this one, each somewhere else, and cuts what they hide."""
    pixels, masks = scene.pixels.copy(), scene.masks.copy()
    height, width = scene.size
    added: list[np.ndarray] = []
    fitting = np.flatnonzero(donor.masks.sum(axis=(1, 2)) >= SMALLEST_PASTED)
    for index in rng.permutation(fitting)[: rng.integers(1, 4)]:
        rows, columns = np.nonzero(donor.masks[index])
        moved_rows = rows + rng.integers(-rows.min(), height - rows.min())
        moved_columns = columns + rng.integers(-columns.min(), width - columns.min())
        inside = (moved_rows < height) & (moved_columns < width)
        mask = np.zeros((FRAME, FRAME), bool)
        mask[moved_rows[inside], moved_columns[inside]] = True
        pixels[moved_rows[inside], moved_columns[inside]] = donor.pixels[rows[inside], columns[inside]]
        masks &= ~mask
        added = [other & ~mask for other in added] + [mask]
    return Scene(pixels, scene.size, np.concatenate([masks, np.stack(added)]) if added else masks)


def _crop(rng: np.random.Generator, photo: Photo) -> Scene:
    height, width = photo.pixels.shape[:2]
    share = 1.0 if rng.random() < WHOLE else rng.uniform(SMALLEST_CROP, 1)
    left, top = rng.uniform(0, (1 - share) * width), rng.uniform(0, (1 - share) * height)
    box = (left, top, left + share * width, top + share * height)
    fill = 1.0 if rng.random() < 0.7 else rng.uniform(SMALLEST_FILL, 1)
    return place(photo, box, float(np.exp(rng.uniform(-0.25, 0.25))), bool(rng.random() < 0.5), fill)


def _recolor(rng: np.random.Generator, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Other light: brightness, contrast, saturation, tint; one in twelve has one hue."""
    window = pixels[: size[0], : size[1]].astype(np.float32)
    grey = window.mean(axis=2, keepdims=True)
    saturation = 0.0 if rng.random() < 1 / 12 else rng.uniform(0.6, 1.4)
    window = grey + (window - grey) * np.float32(saturation)
    mean = window.mean()
    window = (window - mean) * np.float32(rng.uniform(0.7, 1.3)) + mean + np.float32(rng.uniform(-25, 25))
    window *= rng.uniform(0.9, 1.1, 3).astype(np.float32)
    changed = pixels.copy()
    changed[: size[0], : size[1]] = np.clip(window, 0, 255).astype(np.uint8)
    return changed
