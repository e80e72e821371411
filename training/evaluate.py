"""How good a SAM is on photos it was not trained on: one click, one box, and what it thinks of its masks.

python -m training.evaluate --photos DIR --truth instances.json [--preset sam_tiny] [--json FILE]

The photos are the 60 with the highest ids. A click is put on the most interior point of each object (the one farthest
from its edge and from the photo's), and the best of its three masks counts; a box is the annotation's. Masks are scaled
to the photo's own size as SAM does it. Objects are small below 32x32 pixels, large above 96x96, as in COCO. Recall of
the whole generator is measured by `maskbeam label` and `maskbeam evaluate`; README.md has the commands.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from PIL import Image
from scipy import ndimage

from training.network import predict
from training.photos import decode_instance, read_truth, split_images
from training.train import VALIDATION
from transforms.embedded import resolve_preset

SIZES = {
    "all": (0, np.inf),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, np.inf),
    "over 32x32": (32**2, np.inf),
}


@dataclass(frozen=True)
class Answer:
    """What the model said about one object.

    Attributes:
      area: of the annotation, in pixels.
      click_ious: (3,), of masks 1 to 3 for a click.
      click_predicted: (3,), what the model predicted for them.
      box_iou: of mask 0 for the annotation's box.
    """

    area: float
    click_ious: np.ndarray
    click_predicted: np.ndarray
    box_iou: float


def main(argv: list[str] | None = None) -> None:
    """Evaluates and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--preset", default="sam_tiny")
    parser.add_argument("--copy_to", type=Path, help="copy the photos into this directory, for maskbeam label")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    truth = read_truth(args.truth)
    _, images = split_images(truth, VALIDATION)
    if args.copy_to:
        args.copy_to.mkdir(parents=True, exist_ok=True)
        for image in images:
            shutil.copy(args.photos / image["file_name"], args.copy_to)
    model = keras_hub.models.SAMBackbone.from_preset(resolve_preset(args.preset))
    answers = [answer for image in images for answer in ask(model, args.photos, truth, image)]
    report = summarize(answers)
    print(f"{len(images)} photos, {len(answers)} objects")
    for size, values in report["sizes"].items():
        print(f"{size:12}{values['objects']:6}   click {values['click_iou']:.3f}   box {values['box_iou']:.3f}")
    print(f"correlation of predicted and true IoU {report['correlation']:.3f}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def ask(model: keras.Model, photos: Path, truth: dict, image: dict) -> list[Answer]:
    """Prompts the model for every object of a photo."""
    annotations = [
        annotation
        for annotation in truth["annotations"]
        if annotation["image_id"] == image["id"] and not annotation["iscrowd"]
    ]
    if not annotations:
        return []
    frame = model.prompt_encoder.input_image_size[0]
    height, width = image["height"], image["width"]
    factor = frame / max(height, width)
    size = (int(height * factor + 0.5), int(width * factor + 0.5))
    with Image.open(photos / image["file_name"]) as file:
        resized = file.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = np.zeros((1, frame, frame, 3), np.uint8)
    pixels[0, : size[0], : size[1]] = np.asarray(resized)

    masks = [decode_instance(annotation, height, width) for annotation in annotations]
    clicks = [np.array([interior_point(mask)[::-1], (0, 0)]) for mask in masks]
    boxes = [np.array([[x, y], [x + w, y + h]]) for x, y, w, h in (annotation["bbox"] for annotation in annotations)]
    coords = np.stack([*clicks, *boxes])[None] * factor
    is_box = np.arange(2 * len(masks))[None] >= len(masks)
    logits, predicted = predict(
        model, tf.constant(pixels), tf.constant([size]), tf.constant(coords, tf.float32), tf.constant(is_box)
    )
    predicted = predicted.numpy()
    answers = []
    for index, (annotation, mask) in enumerate(zip(annotations, masks, strict=True)):
        clicked = upscale(logits[index, 1:], frame, size, (height, width))
        boxed = upscale(logits[len(masks) + index, :1], frame, size, (height, width))
        ious = np.array([mask_iou(mask, answer) for answer in clicked])
        answers.append(Answer(annotation["area"], ious, predicted[index, 1:], mask_iou(mask, boxed[0])))
    return answers


def interior_point(mask: np.ndarray) -> tuple[int, int]:
    """Row and column of the point of (H, W) bool that is farthest from where the mask and the photo end."""
    distance = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(np.argmax(distance), mask.shape)
    return int(row), int(column)


def upscale(logits: tf.Tensor, frame: int, size: tuple[int, int], original: tuple[int, int]) -> np.ndarray:
    """SAM's two bilinear steps: (N, h, w) logits to (N, *original) bool."""
    framed = tf.image.resize(logits[..., None], (frame, frame))
    return (tf.image.resize(framed[:, : size[0], : size[1]], original)[..., 0] > 0).numpy()


def mask_iou(one: np.ndarray, other: np.ndarray) -> float:
    """IoU of two masks, 0 if both are empty."""
    return float((one & other).sum() / max(1, (one | other).sum()))


def summarize(answers: list[Answer]) -> dict:
    """Mean IoU by size of the object, and the correlation over all clicks' masks."""
    sizes = {}
    for name, (low, high) in SIZES.items():
        chosen = [answer for answer in answers if low <= answer.area < high]
        sizes[name] = {
            "objects": len(chosen),
            "click_iou": float(np.mean([answer.click_ious.max() for answer in chosen])),
            "box_iou": float(np.mean([answer.box_iou for answer in chosen])),
        }
    true = np.concatenate([answer.click_ious for answer in answers])
    predicted = np.concatenate([answer.click_predicted for answer in answers])
    return {"sizes": sizes, "correlation": float(np.corrcoef(true, predicted)[0, 1])}


if __name__ == "__main__":
    main()
