"""Prompts on scenes, of all kinds that SAM takes, and the masks they ask for.

Plain prompts are one click (masks 1 to 3 answer, one for each object under it) or a box (mask 0 answers). Refined
prompts have more (mask 0 answers): a coarse mask made of the truth, or clicks where the model's own answer to a click
or a box is wrong, most with that answer as their mask (training.sam_tiny.train adds both).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
from scipy import ndimage

from training.sam_tiny.model import FRAME, LOW_RES
from training.sam_tiny.network import ABSENT, BOTTOM_RIGHT, FOREGROUND, PADDING, TOP_LEFT
from training.sam_tiny.photos import Photo
from training.sam_tiny.scenes import Scene, make_scene

PLAIN_TOKENS = 2  # sparse tokens of a plain prompt: a click and SAM's padding point, or a box
TOKENS = 4  # of a refined one: two clicks more
TARGETS = 2  # objects under a click that count
SCALE = FRAME // LOW_RES
SMALLEST_TARGET = 12  # quarters of low-res pixels

# Of the plain prompts; the others are clicks anywhere.
OBJECT_CLICKS, BOXES = 0.52, 0.38


@dataclass(frozen=True)
class Plain:
    """One prompt without a mask.

    Attributes:
      coords: (PLAIN_TOKENS, 2) float32, x and y in pixels of the frame.
      kinds: (PLAIN_TOKENS,) int32 of training.sam_tiny.network.
      targets: (TARGETS, LOW_RES, LOW_RES) uint8, covered quarters of each low-res pixel, 0 to 4.
      weights: (TARGETS,) float32, 0 where there is no such target.
    """

    coords: np.ndarray
    kinds: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Refined:
    """One prompt with a mask.

    Attributes:
      coords, kinds: as above, (TOKENS, ...); the last two of a prompt for the model's own answer are free for clicks.
      masks: (LOW_RES, LOW_RES) float32, logits of the coarse mask.
      targets: (1, LOW_RES, LOW_RES) uint8, as above.
      weights: (1,) float32, 0 where the scene has no object.
    """

    coords: np.ndarray
    kinds: np.ndarray
    masks: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Batch:
    """B frames with their prompts; the fields of prompts are arrays (B, P, ...).

    Attributes:
      pixels: (B, FRAME, FRAME, 3) uint8.
      sizes: (B, 2) int32, height and width of what is not padding.
      plain: fields of Plain.
      own: fields of Refined, of prompts that take the model's own answer.
      coarse: fields of Refined, of prompts with a coarse mask.
    """

    pixels: np.ndarray
    sizes: np.ndarray
    plain: dict[str, np.ndarray]
    own: dict[str, np.ndarray]
    coarse: dict[str, np.ndarray]


@dataclass(frozen=True)
class Objects:
    """The objects of a scene that are not too small.

    Attributes:
      quarters: (K, LOW_RES, LOW_RES) uint8, covered quarters of each low-res pixel.
      areas: (K,) int64, in quarters.
    """

    quarters: np.ndarray
    areas: np.ndarray

    @classmethod
    def of(cls, scene: Scene) -> Objects:
        """All of a scene."""
        half = SCALE // 2
        sampled = scene.masks[:, half // 2 :: half, half // 2 :: half]  # at twice LOW_RES
        quarters = sampled.reshape(-1, LOW_RES, 2, LOW_RES, 2).sum(axis=(2, 4), dtype=np.uint8)
        areas = quarters.sum(axis=(1, 2), dtype=np.int64)
        fitting = areas >= SMALLEST_TARGET
        return cls(quarters[fitting], areas[fitting])

    def choose(self, rng: np.random.Generator) -> np.ndarray:
        """One object. Half of COCO's are a few pixels: larger ones, which teach more, come more often."""
        odds = self.areas**0.25
        return self.quarters[rng.choice(len(odds), p=odds / odds.sum())]


def make_batch(rng: np.random.Generator, photos: list[Photo], images: int, counts: tuple[int, int, int]) -> Batch:
    """Scenes with `counts` plain prompts, prompts for the model's own answer, and prompts with coarse masks each."""
    scenes = [make_scene(rng, photos) for _ in range(images)]
    prompts = []
    for scene in scenes:
        objects = Objects.of(scene)
        makers = (make_plain, make_own, make_coarse)
        prompts.append(
            [[make(rng, scene, objects) for _ in range(count)] for make, count in zip(makers, counts, strict=True)]
        )
    return Batch(
        np.stack([scene.pixels for scene in scenes]),
        np.array([scene.size for scene in scenes], np.int32),
        *(_stack([asked[group] for asked in prompts]) for group in range(3)),
    )


def batches(seed: int, start: int, photos: list[Photo], images: int, counts: tuple[int, int, int]) -> Iterator[Batch]:
    """Endless batches, made ahead in a thread. Batch n depends on the seed and on n alone, so that a run can resume."""

    def make(step: int) -> Batch:
        return make_batch(np.random.default_rng((seed, step)), photos, images, counts)

    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(make, step) for step in range(start, start + 2))
        for step in itertools.count(start + 2):
            yield ahead.popleft().result()
            ahead.append(thread.submit(make, step))


def _stack(rows: list[list]) -> dict[str, np.ndarray]:
    names = [field.name for field in fields(rows[0][0])]
    return {name: np.stack([np.stack([getattr(prompt, name) for prompt in row]) for row in rows]) for name in names}


def make_plain(rng: np.random.Generator, scene: Scene, objects: Objects) -> Plain:
    """A prompt without a mask."""
    kind = rng.random() if len(objects.areas) else 1.0
    coords, kinds = _no_tokens(PLAIN_TOKENS)
    targets = np.zeros((TARGETS, LOW_RES, LOW_RES), np.uint8)
    weights = np.zeros(TARGETS, np.float32)
    if kind < BOXES:
        targets[0], weights[0] = objects.choose(rng), 1
        _put_box(rng, coords, kinds, targets[0])
        return Plain(coords, kinds, targets, weights)
    if kind < BOXES + OBJECT_CLICKS:
        row, column = _inside(rng, objects.choose(rng))
    else:
        row, column = (int(rng.integers(max(side // SCALE, 1))) for side in scene.size)
    _put_click(rng, coords, kinds, row, column)
    under = np.flatnonzero(objects.quarters[:, row, column] >= 2)
    under = under[np.argsort(objects.areas[under])][:TARGETS]
    targets[: len(under)], weights[: len(under)] = objects.quarters[under], 1
    return Plain(coords, kinds, targets, weights)


def make_own(rng: np.random.Generator, scene: Scene, objects: Objects) -> Refined:
    """A click or a box for the model to answer first."""
    coords, kinds = _no_tokens(TOKENS)
    mask = objects.choose(rng) if len(objects.areas) else np.zeros((LOW_RES, LOW_RES), np.uint8)
    if not mask.any():
        kinds[:2] = FOREGROUND, PADDING
    elif rng.random() < 0.6:
        _put_box(rng, coords, kinds, mask)
    else:
        _put_click(rng, coords, kinds, *_inside(rng, mask))
    return Refined(coords, kinds, np.zeros(mask.shape, np.float32), mask[None], np.array([mask.any()], np.float32))


def make_coarse(rng: np.random.Generator, scene: Scene, objects: Objects) -> Refined:
    """A coarse mask, mostly with a box, else with a click or alone."""
    coords, kinds = _no_tokens(TOKENS)
    if not len(objects.areas):
        empty = np.zeros((LOW_RES, LOW_RES), np.float32)
        return Refined(coords, kinds, empty, empty[None].astype(np.uint8), np.zeros(1, np.float32))
    mask = objects.choose(rng)
    kind = rng.random()
    if kind < 0.65:
        _put_box(rng, coords, kinds, mask)
    elif kind < 0.85:
        _put_click(rng, coords, kinds, *_inside(rng, mask))
    return Refined(coords, kinds, coarsen(rng, mask), mask[None], np.ones(1, np.float32))


def coarsen(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """Logits of a coarse version of a mask in quarters: its box, eroded, grown, shifted, or blurred; signs or soft."""
    truth = mask >= 2 if (mask >= 2).any() else mask > 0
    rows, columns = np.flatnonzero(truth.any(axis=1)), np.flatnonzero(truth.any(axis=0))
    radius = max(1.0, 0.5 * np.sqrt(truth.sum()) * rng.uniform(0.05, 0.4))
    kind = rng.integers(5)
    if kind == 0:
        coarse = np.zeros(truth.shape, bool)
        coarse[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    elif kind == 1:
        distance = ndimage.distance_transform_edt(np.pad(truth, 1))[1:-1, 1:-1]
        coarse = distance > min(radius, 0.8 * distance.max())
    elif kind == 2:
        coarse = ndimage.distance_transform_edt(~truth) <= radius
    elif kind == 3:
        shift = rng.uniform(-0.25, 0.25, 2) * (len(rows), len(columns))
        coarse = ndimage.shift(truth.astype(np.float32), shift, order=0) > 0.5
    else:
        noise = ndimage.gaussian_filter(rng.normal(size=truth.shape), radius)
        blurred = ndimage.gaussian_filter(truth.astype(np.float32), radius)
        coarse = blurred + 0.3 * noise / (noise.std() + 1e-6) * rng.random() > rng.uniform(0.3, 0.6)
    signs = np.where(coarse, 1, -1).astype(np.float32)
    if rng.random() < 0.3:
        signs = ndimage.gaussian_filter(signs, rng.uniform(0.5, 2))
    return signs * np.float32(np.exp(rng.uniform(np.log(3), np.log(20))))


def _no_tokens(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((count, 2), np.float32), np.full(count, ABSENT, np.int32)


def _inside(rng: np.random.Generator, mask: np.ndarray) -> tuple[int, int]:
    """Row and column of a low-res pixel in a mask in quarters."""
    row, column = divmod(int(rng.choice(np.flatnonzero(mask >= min(2, mask.max())))), LOW_RES)
    return row, column


def _put_click(rng: np.random.Generator, coords: np.ndarray, kinds: np.ndarray, row: int, column: int) -> None:
    """Writes a click, anywhere within a low-res pixel, and SAM's padding point into the first two tokens."""
    coords[0] = (column + rng.random()) * SCALE, (row + rng.random()) * SCALE
    kinds[:2] = FOREGROUND, PADDING


def _put_box(rng: np.random.Generator, coords: np.ndarray, kinds: np.ndarray, mask: np.ndarray) -> None:
    """Writes the box of a mask in quarters, its sides off by up to 15 %, into the first two tokens."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    corners = SCALE * np.array([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]], np.float32)
    noise = rng.uniform(-1, 1, (2, 2)) * rng.choice([0.02, 0.06, 0.1, 0.15]) * (corners[1] - corners[0])
    coords[:2] = np.clip(corners + np.clip(noise, -30, 30), 0, FRAME - 1)
    kinds[:2] = TOP_LEFT, BOTTOM_RIGHT
