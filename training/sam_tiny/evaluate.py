"""How good the model is on photos it was not trained on, for every kind of prompt.

python -m training.sam_tiny.evaluate --photos DIR --truth instances.json --preset DIR [--json FILE]

The photos are the 60 with the highest ids. Every object is asked for by

- a click on its most interior point: the best of masks 1 to 3 counts, and what the model predicts for the three is
  held against their true IoU;
- the annotation's box, mask 0;
- that box with one and with two clicks, each in the middle of the largest error so far; once without and once with the
  mask before it as mask prompt;
- that box with a coarse mask: its own area filled, the truth eroded, the truth shifted.

Masks are scaled to the photo's own size as SAM does it. "over 32x32" are the objects of more than 1024 pixels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from scipy import ndimage

from maskbeam.transforms.evaluation.truth import TruthImage
from maskbeam.transforms.masks.frame import Upsampling, resized_hw, to_frame, to_frame_points
from maskbeam.transforms.models.sam.model import load_backbone
from training.sam_tiny import network
from training.sam_tiny.model import FRAME, LOW_RES
from training.sam_tiny.network import ABSENT, BACKGROUND, BOTTOM_RIGHT, FOREGROUND, PADDING, TOP_LEFT
from training.sam_tiny.photos import load_photo, read_photos
from training.sam_tiny.prompts import TOKENS

COARSE_LOGIT = 10.0  # of a coarse mask inside; outside it is the negative
SHIFT = 0.1  # of a box's sides

Ask = Callable[[list[tuple[int, np.ndarray]], np.ndarray | None], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Answer:
    """What the model said about one object.

    Attributes:
      area: of the annotation, in pixels.
      ious: by kind of prompt.
      click_ious, click_predicted: (3,), of masks 1 to 3 for a click, and what the model predicted for them.
    """

    area: float
    ious: dict[str, float]
    click_ious: np.ndarray
    click_predicted: np.ndarray


def main(argv: list[str] | None = None) -> None:
    """Evaluates and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m training.sam_tiny.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    model = load_backbone(args.preset)
    images = read_photos(args.truth)[1]
    answers = [answer for image in images for answer in ask_photo(model, args.photos, image)]
    report = summarize(answers)
    print(f"{len(images)} photos, {len(answers)} objects, {report['over 32x32']['objects']} over 32x32")
    for kind in answers[0].ious:
        print(f"{kind:28} over 32x32 {report['over 32x32'][kind]:.3f}   all {report['all'][kind]:.3f}")
    print(f"correlation of predicted and true IoU {report['correlation']:.3f}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def ask_photo(model: keras.Model, photos: Path, image: TruthImage) -> Iterator[Answer]:
    """Prompts the model for every object of a photo."""
    photo = load_photo(photos, image)
    if not len(photo.masks):
        return
    size = resized_hw(image.size_hw, FRAME)
    pixels = network.normalize(tf.constant(to_frame(photo.pixels, FRAME)[None]), tf.constant([size]))
    embedding = model.image_encoder(pixels)
    embedding = tf.reshape(embedding, (1, -1, embedding.shape[-1]))
    upsampling = Upsampling.build(image.size_hw, LOW_RES, FRAME)
    for mask, instance in zip(photo.masks, image.objects(), strict=True):
        x, y, width, height = instance.bbox_xywh
        corners = np.array([[x, y], [x + width, y + height]])
        yield ask_object(partial(_ask, model, embedding, image.size_hw), upsampling, mask, corners, instance.area)


def ask_object(ask: Ask, upsampling: Upsampling, truth: np.ndarray, corners: np.ndarray, area: float) -> Answer:
    """Prompts the model for one object.

    Args:
      ask: answers tokens (kind, x and y in the photo) and a mask prompt (LOW_RES, LOW_RES) or None with logits
        (4, LOW_RES, LOW_RES) and predicted IoU (4,).
      truth: (H, W) bool.
      corners: (2, 2), of its box, x and y.
    """

    def full(logits: np.ndarray) -> np.ndarray:
        height, width = truth.shape
        return upsampling.apply(logits, slice(0, height), slice(0, width)).T > 0

    logits, predicted = ask([(FOREGROUND, interior_point(truth)), (PADDING, np.zeros(2))], None)
    click_ious = np.array([iou(full(answer), truth) for answer in logits[1:]])
    box = [(TOP_LEFT, corners[0]), (BOTTOM_RIGHT, corners[1])]
    first = ask(box, None)[0][0]
    ious = {"click, best of 3": click_ious.max(), "box": iou(full(first), truth)}
    for name, with_mask in (("", False), (" and mask", True)):
        answer, clicks = first, list(box)
        for count in (1, 2):
            clicks.append(correction(full(answer), truth))
            answer = ask(clicks, answer if with_mask else None)[0][0]
            ious[f"box, {count} clicks{name}"] = iou(full(answer), truth)
    for name, coarse in coarse_masks(truth, corners).items():
        ious[f"box, coarse mask ({name})"] = iou(full(ask(box, to_mask_prompt(coarse))[0][0]), truth)
    return Answer(area, {kind: float(value) for kind, value in ious.items()}, click_ious, predicted[1:])


def _ask(
    model: keras.Model,
    embedding: tf.Tensor,
    size_hw: tuple[int, int],
    tokens: list[tuple[int, np.ndarray]],
    mask: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    places = to_frame_points(np.array([place for _, place in tokens], float), size_hw, FRAME)
    coords = np.zeros((1, TOKENS, 2), np.float32)
    kinds = np.full((1, TOKENS), ABSENT, np.int32)
    coords[0, : len(tokens)] = places
    kinds[0, : len(tokens)] = [kind for kind, _ in tokens]
    given = np.zeros((1, LOW_RES, LOW_RES), np.float32) if mask is None else mask[None]
    logits, predicted = _decode(model, embedding, coords, kinds, given, tf.constant([mask is not None]))
    return logits[0].numpy(), predicted[0].numpy()


@tf.function(reduce_retracing=True)
def _decode(
    model: keras.Model, embedding: tf.Tensor, coords: tf.Tensor, kinds: tf.Tensor, mask: tf.Tensor, given: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    image = embedding + network.embed_masks(model, mask, given)
    return network.decode(model, image, coords, kinds, (0, 1, 2, 3), None)


def to_mask_prompt(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) bool of the photo as logits (LOW_RES, LOW_RES) of the frame; padding is outside."""
    height, width = resized_hw(mask.shape, FRAME)
    step = FRAME // LOW_RES
    rows = np.arange(step // 2, height, step) * mask.shape[0] // height
    columns = np.arange(step // 2, width, step) * mask.shape[1] // width
    logits = np.full((LOW_RES, LOW_RES), -COARSE_LOGIT, np.float32)
    logits[: len(rows), : len(columns)][mask[rows[:, None], columns]] = COARSE_LOGIT
    return logits


def coarse_masks(truth: np.ndarray, corners: np.ndarray) -> dict[str, np.ndarray]:
    """Coarse versions of a mask (H, W) bool, by name."""
    (left, top), (right, bottom) = corners
    filled = np.zeros(truth.shape, bool)
    filled[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = True
    distance = ndimage.distance_transform_edt(np.pad(truth, 1))[1:-1, 1:-1]
    moved = np.round(SHIFT * np.array([bottom - top, right - left])).astype(int)
    return {
        "box filled": filled,
        "eroded": distance > 0.3 * distance.max(),
        "shifted": ndimage.shift(truth.astype(np.uint8), moved, order=0) > 0,
    }


def interior_point(mask: np.ndarray) -> np.ndarray:
    """x and y of the point of (H, W) bool that is farthest from where the mask and the photo end."""
    distance = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(np.argmax(distance), mask.shape)
    return np.array([column, row], float)


def correction(answer: np.ndarray, truth: np.ndarray) -> tuple[int, np.ndarray]:
    """A click on the point that is deepest inside of what is missing or too much: kind, x and y."""
    depths = [ndimage.distance_transform_edt(np.pad(wrong, 1)).max() for wrong in (truth & ~answer, answer & ~truth)]
    if depths[0] >= depths[1]:
        return FOREGROUND, interior_point(truth & ~answer if depths[0] else truth)
    return BACKGROUND, interior_point(answer & ~truth)


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Of two (H, W) bool."""
    return float((mask & truth).sum() / max((mask | truth).sum(), 1))


def summarize(answers: list[Answer]) -> dict:
    """Mean IoU by kind of prompt, over all objects and over those above 32x32, and the correlation of predictions."""
    report: dict = {}
    for name, smallest in (("all", 0), ("over 32x32", 32**2)):
        chosen = [answer.ious for answer in answers if answer.area > smallest]
        means = {kind: float(np.mean([ious[kind] for ious in chosen])) for kind in answers[0].ious}
        report[name] = {"objects": len(chosen), **means}
    true = np.concatenate([answer.click_ious for answer in answers])
    predicted = np.concatenate([answer.click_predicted for answer in answers])
    return {**report, "correlation": float(np.corrcoef(true, predicted)[0, 1])}


if __name__ == "__main__":
    main()
