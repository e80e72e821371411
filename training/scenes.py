"""What the model sees in one step: frames made of photos and shapes, prompts on them, and the masks they ask for."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

from training.photos import Photo
from training.synthetic import make_synthetic

FRAME = 256  # the model's input, in pixels
LOW_RES = 128  # its masks

MAX_TARGETS = 3  # as many as a click has answers: part, subpart, whole

# Of the prompts: clicks on objects, boxes around objects; the others are clicks anywhere.
OBJECT_CLICKS = 0.5
BOXES = 0.25

SYNTHETIC = 0.15  # scenes made of shapes alone
PASTED = 0.3  # scenes with objects of another scene pasted in

REGION_WEIGHT = 0.3  # in the loss; an instance's mask has 1
REGION_QUALITY = 0.5  # a perfect mask of a region of like colour is worth half of one of an object
SMALLEST_TARGET = 24  # pixels of the frame


@dataclass(frozen=True)
class Scene:
    """A frame before prompts are put on it.

    Attributes:
      pixels: (FRAME, FRAME, 3) uint8; padding, right of or below `size`, is 0.
      size: height and width of what is not padding.
      instances: (K, FRAME, FRAME) bool.
      regions: (L, FRAME, FRAME) int32; padding is -1.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    instances: np.ndarray
    regions: np.ndarray


@dataclass(frozen=True)
class Answers:
    """What prompts on a scene may ask for, at the size of the model's masks.

    Attributes:
      quarters: (K, LOW_RES, LOW_RES) uint8, covered quarters of each low-res pixel, 0 to 4, of the objects.
      areas: (K,) int64, in pixels of the frame.
      regions: (L, LOW_RES, LOW_RES) int32.
    """

    quarters: np.ndarray
    areas: np.ndarray
    regions: np.ndarray

    @classmethod
    def of(cls, scene: Scene) -> Answers:
        """All objects of a scene that are not too small."""
        quarters = scene.instances.reshape(-1, LOW_RES, 2, LOW_RES, 2).sum(axis=(2, 4), dtype=np.uint8)
        areas = quarters.sum(axis=(1, 2), dtype=np.int64)
        fitting = areas >= SMALLEST_TARGET
        return cls(quarters[fitting], areas[fitting], scene.regions[:, ::2, ::2])


@dataclass(frozen=True)
class Prompt:
    """One prompt and its answers, as Batch describes them."""

    coords: np.ndarray
    is_box: bool
    targets: np.ndarray
    weights: np.ndarray
    qualities: np.ndarray


@dataclass(frozen=True)
class Batch:
    """B frames with P prompts each.

    Attributes:
      pixels: (B, FRAME, FRAME, 3) uint8.
      sizes: (B, 2) int32, height and width of what is not padding.
      coords: (B, P, 2, 2) float32, x and y in pixels of the frame: a click and an unused point, or a box's corners.
      is_box: (B, P) bool.
      targets: (B, P, MAX_TARGETS, LOW_RES, LOW_RES) uint8, covered quarters of each low-res pixel, 0 to 4.
      weights: (B, P, MAX_TARGETS) float32, 0 where there is no such target.
      qualities: (B, P, MAX_TARGETS) float32, what a perfect mask of the target is worth.
    """

    pixels: np.ndarray
    sizes: np.ndarray
    coords: np.ndarray
    is_box: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    qualities: np.ndarray


def make_scene(rng: np.random.Generator, photos: list[Photo]) -> Scene:
    """A random crop of a random photo or of made-up shapes, some with objects of another one pasted in."""
    scene = _crop(rng, _choose(rng, photos))
    if rng.random() < PASTED:
        scene = paste(rng, scene, _crop(rng, _choose(rng, photos)))
    return Scene(_recolor(rng, scene.pixels, scene.size), scene.size, scene.instances, scene.regions)


def make_batch(rng: np.random.Generator, photos: list[Photo], images: int, prompts: int) -> Batch:
    """So many scenes with so many prompts each."""
    scenes = [make_scene(rng, photos) for _ in range(images)]
    asked = [make_prompts(rng, scene, prompts) for scene in scenes]
    coords, is_box, targets, weights, qualities = (
        np.stack([np.stack([getattr(prompt, field.name) for prompt in row]) for row in asked])
        for field in fields(Prompt)
    )
    pixels = np.stack([scene.pixels for scene in scenes])
    sizes = np.array([scene.size for scene in scenes], np.int32)
    return Batch(pixels, sizes, coords, is_box, targets, weights, qualities)


def batches(seed: int, start: int, photos: list[Photo], images: int, prompts: int) -> Iterator[Batch]:
    """Endless batches, made ahead in a thread. Batch n depends on the seed and on n alone, so that a run can resume."""

    def make(step: int) -> Batch:
        return make_batch(np.random.default_rng((seed, step)), photos, images, prompts)

    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(make, step) for step in range(start, start + 4))
        for step in itertools.count(start + 4):
            yield ahead.popleft().result()
            ahead.append(thread.submit(make, step))


def make_prompts(rng: np.random.Generator, scene: Scene, prompts: int) -> list[Prompt]:
    """So many prompts on a scene."""
    answers = Answers.of(scene)
    return [make_prompt(rng, scene, answers) for _ in range(prompts)]


def make_prompt(rng: np.random.Generator, scene: Scene, answers: Answers) -> Prompt:
    """A box around an object, a click on one, or a click anywhere."""
    objects, kind = len(answers.quarters), rng.random()
    is_box = objects > 0 and kind < BOXES
    # Half of COCO's objects are a few pixels of the frame: larger ones, which teach more, come more often.
    asked = rng.choice(objects, p=answers.areas**0.25 / (answers.areas**0.25).sum()) if objects else 0
    if is_box:
        mask = answers.quarters[asked]
        coords = _noisy_box(rng, mask)
        chosen = [(mask, 1.0, 1.0)]
    else:
        if objects and kind < BOXES + OBJECT_CLICKS:
            inside = np.flatnonzero(answers.quarters[asked] >= min(2, answers.quarters[asked].max()))
            row, column = divmod(int(rng.choice(inside)), LOW_RES)
        else:
            row, column = (int(rng.integers(side)) // 2 for side in scene.size)
        coords = np.array([[2 * column + rng.random(), 2 * row + rng.random()], [0, 0]], np.float32)
        chosen = find_targets(answers, row, column, scene.size[0] * scene.size[1])
    targets = np.zeros((MAX_TARGETS, LOW_RES, LOW_RES), np.uint8)
    weights, qualities = np.zeros((2, MAX_TARGETS), np.float32)
    for index, (mask, weight, quality) in enumerate(chosen):
        targets[index], weights[index], qualities[index] = mask, weight, quality
    return Prompt(coords, is_box, targets, weights, qualities)


def find_targets(answers: Answers, row: int, column: int, frame_area: int) -> list[tuple[np.ndarray, float, float]]:
    """The masks a click may ask for: objects under it, then regions of like colour within the smallest of them.

    Args:
      row, column: the click, in low-res pixels.
      frame_area: of what is not padding; a region that fills most of it is no answer.

    Returns:
      at most MAX_TARGETS of (mask, weight, quality), no region nearly the same as another one; masks in quarters.
    """
    under = np.flatnonzero(answers.quarters[:, row, column] >= 2)
    under = under[np.argsort(answers.areas[under])][:2]
    chosen = [(answers.quarters[index], 1.0, 1.0) for index in under]
    chosen_areas = [int(answers.areas[index]) for index in under]
    for level in answers.regions:
        if len(chosen) == MAX_TARGETS:
            break
        region = (level == level[row, column]).astype(np.uint8)
        region *= answers.quarters[under[0]] if len(under) else 4
        area = int(region.sum(dtype=np.int64))
        if not SMALLEST_TARGET <= area <= 0.7 * frame_area:
            continue
        overlaps = [int(np.minimum(region, mask).sum(dtype=np.int64)) for mask, *_ in chosen]
        if all(overlap < 0.8 * (area + other - overlap) for overlap, other in zip(overlaps, chosen_areas, strict=True)):
            chosen.append((region, REGION_WEIGHT, REGION_QUALITY))
            chosen_areas.append(area)
    return chosen


def paste(rng: np.random.Generator, scene: Scene, donor: Scene) -> Scene:
    """Pastes up to three objects of another scene over this one, each somewhere else, and cuts what they hide."""
    pixels, instances, regions = scene.pixels.copy(), scene.instances.copy(), scene.regions.copy()
    fitting = np.flatnonzero(donor.instances.sum(axis=(1, 2)) >= 4 * SMALLEST_TARGET)
    added: list[np.ndarray] = []
    for index in rng.permutation(fitting)[: rng.integers(1, 4)]:
        rows, columns = np.nonzero(donor.instances[index])
        height, width = scene.size
        moved_rows = rows + rng.integers(-rows.min(), height - rows.min())
        moved_columns = columns + rng.integers(-columns.min(), width - columns.min())
        inside = (moved_rows < height) & (moved_columns < width)
        mask = np.zeros((FRAME, FRAME), bool)
        mask[moved_rows[inside], moved_columns[inside]] = True
        pixels[moved_rows[inside], moved_columns[inside]] = donor.pixels[rows[inside], columns[inside]]
        for level, donated in zip(regions, donor.regions, strict=True):
            level[moved_rows[inside], moved_columns[inside]] = level.max() + 1 + donated[rows[inside], columns[inside]]
        instances &= ~mask
        added = [other & ~mask for other in added] + [mask]
    return Scene(pixels, scene.size, np.concatenate([instances, np.stack(added)]) if added else instances, regions)


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
    resized = Image.fromarray(photo.pixels).resize(size[::-1], Image.Resampling.BILINEAR, box=box_xyxy)
    rows = (top + (np.arange(size[0]) + 0.5) / size[0] * (bottom - top)).astype(int)
    columns = (left + (np.arange(size[1]) + 0.5) / size[1] * (right - left)).astype(int)
    if flip:
        columns = columns[::-1]
    window = (slice(None), slice(size[0]), slice(size[1]))
    pixels = np.zeros((FRAME, FRAME, 3), np.uint8)
    pixels[window[1:]] = np.asarray(resized)[:, ::-1] if flip else np.asarray(resized)
    instances = np.zeros((len(photo.instances), FRAME, FRAME), bool)
    instances[window] = photo.instances[:, rows[:, None], columns]
    regions = np.full((len(photo.regions), FRAME, FRAME), -1, np.int32)
    regions[window] = photo.regions[:, rows[:, None], columns]
    return Scene(pixels, size, instances[instances.any(axis=(1, 2))], regions)


def _choose(rng: np.random.Generator, photos: list[Photo]) -> Photo:
    return make_synthetic(rng) if rng.random() < SYNTHETIC else photos[rng.integers(len(photos))]


def _crop(rng: np.random.Generator, photo: Photo) -> Scene:
    height, width = photo.pixels.shape[:2]
    share = 1.0 if rng.random() < 0.3 else rng.uniform(0.4, 1)
    left, top = rng.uniform(0, (1 - share) * width), rng.uniform(0, (1 - share) * height)
    box = (left, top, left + share * width, top + share * height)
    fill = 1.0 if rng.random() < 0.7 else rng.uniform(0.6, 1)
    return place(photo, box, float(np.exp(rng.uniform(-0.25, 0.25))), bool(rng.random() < 0.5), fill)


def _recolor(rng: np.random.Generator, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Other light: brightness, contrast, saturation, tint; one in twelve has one hue."""
    window = pixels[: size[0], : size[1]].astype(np.float32)
    grey = window.mean(axis=2, keepdims=True)
    saturation = 0.0 if rng.random() < 1 / 12 else rng.uniform(0.5, 1.5)
    window = grey + (window - grey) * saturation
    window = (window - window.mean()) * rng.uniform(0.6, 1.4) + window.mean() + rng.uniform(-35, 35)
    window *= rng.uniform(0.85, 1.15, 3).astype(np.float32)
    changed = pixels.copy()
    changed[: size[0], : size[1]] = np.clip(window, 0, 255).astype(np.uint8)
    return changed


def _noisy_box(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The box of a low-res mask with corners off by a tenth of its sides, at most 20 pixels: (2, 2) x, y."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    corners = 2 * np.array([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]], np.float32)
    sides = corners[1] - corners[0]
    noise = np.clip(rng.normal(0, 0.1, (2, 2)) * sides, -20, 20)
    return np.clip(corners + noise, 0, FRAME - 1).astype(np.float32)
