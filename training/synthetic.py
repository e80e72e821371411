"""Scenes without a photo: textured shapes with parts, in front of each other, lit from one side."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from training.photos import LONG_SIDE, REGION_LEVELS, Photo

MAX_SHAPES = 10


def make_synthetic(rng: np.random.Generator) -> Photo:
    """A scene of 2 to 10 shapes, some with parts. Later shapes hide earlier ones; masks are what remains visible."""
    height, width = LONG_SIDE * 3 // 4, LONG_SIDE
    if rng.random() < 0.3:
        height, width = width, height
    pixels = texture(rng, height, width)
    numbers = np.zeros((height, width), np.int32)  # of parts; 0 is the background
    owners = [0]  # the shape a part belongs to
    for shape in range(1, rng.integers(2, MAX_SHAPES + 1) + 1):
        outline = _outline(rng, height, width)
        mask = _draw(outline, height, width)
        parts = [mask]
        if rng.random() < 0.5:
            parts.append(mask & _draw(_near(rng, outline), height, width))
        for part in parts:
            if part.any():
                pixels[part] = texture(rng, height, width)[part]
                numbers[part] = len(owners)
                owners.append(shape)
        pixels[mask] *= _shading(rng, height, width)[mask][:, None]
    pixels += rng.normal(0, rng.uniform(0, 8), pixels.shape)
    shapes = np.asarray(owners)[numbers]
    present = np.unique(shapes)
    instances = shapes == present[present > 0][:, None, None]
    # Parts are the regions of the finest level; on the coarser ones there are only whole shapes.
    regions = np.stack([numbers] + [shapes] * (len(REGION_LEVELS) - 1))
    return Photo(np.clip(pixels, 0, 255).astype(np.uint8), instances, regions.astype(np.int32))


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A colour with a gradient and with noise of one grain: (height, width, 3) float32."""
    color = rng.uniform(20, 235, 3)
    rows, columns = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    gradient = (rows * np.sin(angle) + columns * np.cos(angle)) * rng.uniform(0, 80)
    grain = int(rng.choice([2, 4, 8, 16, 32]))
    coarse = rng.normal(0, rng.uniform(0, 30), (height // grain + 1, width // grain + 1)).astype(np.float32)
    noise = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))
    if rng.random() < 0.2:
        period = rng.uniform(6, 40)
        noise = noise + 30 * np.sign(np.sin((rows * np.cos(angle) + columns * np.sin(angle)) * width / period * 6.28))
    return (color + (gradient + noise)[..., None] * rng.uniform(0.6, 1.0, 3)).astype(np.float32)


def _outline(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A closed curve around a random place, from ellipse to star: (N, 2) x, y."""
    corners = int(rng.choice([3, 4, 5, 8, 40], p=[0.1, 0.2, 0.1, 0.2, 0.4]))
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners)) if corners < 40 else np.linspace(0, 2 * np.pi, corners)
    waves = 1 + sum(rng.uniform(0, 0.25) * np.cos(k * angles + rng.uniform(0, 6.28)) for k in (2, 3, 5))
    radius = np.exp(rng.uniform(np.log(0.03), np.log(0.4))) * width
    stretch = np.exp(rng.uniform(-0.7, 0.7))
    points = np.stack([np.cos(angles) * waves * radius * stretch, np.sin(angles) * waves * radius / stretch], axis=1)
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return points @ rotation + rng.uniform([0, 0], [width, height])


def _near(rng: np.random.Generator, outline: np.ndarray) -> np.ndarray:
    """A smaller copy of an outline, moved within it."""
    center = outline.mean(axis=0)
    spread = outline.std(axis=0)
    return (outline - center) * rng.uniform(0.3, 0.7) + center + rng.uniform(-0.7, 0.7, 2) * spread


def _draw(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    canvas = Image.new("L", (width, height))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in outline], fill=1)
    return np.asarray(canvas).astype(bool)


def _shading(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.8)
    rows, columns = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    return np.clip(1 + strength * (rows * np.sin(angle) + columns * np.cos(angle)), 0.4, 1.6).astype(np.float32)
