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
import numpy as np
import tensorflow as tf
from PIL import Image
from scipy import ndimage

from maskbeam.transforms.evaluation.recall import AREA_RANGES
from maskbeam.transforms.evaluation.truth import TruthImage, TruthObject
from maskbeam.transforms.masks import rle
from maskbeam.transforms.masks.candidates import mask_to_runs
from maskbeam.transforms.masks.frame import Upsampling, resized_hw, to_frame, to_frame_points
from maskbeam.transforms.models.sam.model import load_backbone
from training.network import predict
from training.photos import read_photos

SIZES = {**AREA_RANGES, "over 32x32": (AREA_RANGES["medium"][0], np.inf)}


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
    _, images = read_photos(args.truth)
    if args.copy_to:
        for image in images:
            copy = args.copy_to / image.file_name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(args.photos / image.file_name, copy)
    model = load_backbone(args.preset)
    answers = [answer for image in images for answer in ask(model, args.photos, image)]
    report = summarize(answers)
    print(f"{len(images)} photos, {len(answers)} objects")
    for size, values in report["sizes"].items():
        if values["objects"]:
            print(f"{size:12}{values['objects']:6}   click {values['click_iou']:.3f}   box {values['box_iou']:.3f}")
    print(f"correlation of predicted and true IoU {report['correlation']:.3f}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def ask(model: keras.Model, photos: Path, image: TruthImage) -> list[Answer]:
    """Prompts the model for every object of a photo."""
    objects = image.objects()
    if not objects:
        return []
    frame = model.prompt_encoder.input_image_size[0]
    with Image.open(photos / image.file_name) as file:
        pixels = to_frame(np.asarray(file.convert("RGB")), frame)
    masks = [rle.counts_to_mask(instance.counts, image.size_hw).astype(bool) for instance in objects]
    clicks = [np.array([interior_point(mask)[::-1], (0, 0)]) for mask in masks]
    boxes = [np.array([[x, y], [x + w, y + h]]) for x, y, w, h in (instance.bbox_xywh for instance in objects)]
    coords = to_frame_points(np.stack([*clicks, *boxes]), image.size_hw, frame)
    is_box = np.arange(2 * len(masks)) >= len(masks)
    logits, predicted = (
        output.numpy()
        for output in predict(
            model,
            tf.constant(pixels[None]),
            tf.constant([resized_hw(image.size_hw, frame)]),
            tf.constant(coords[None], tf.float32),
            tf.constant(is_box[None]),
        )
    )
    upsampling = Upsampling.build(image.size_hw, logits.shape[-1], frame)

    def ious(instance: TruthObject, answers: np.ndarray) -> np.ndarray:
        counts = [
            rle.runs_to_counts(mask_to_runs(answer, upsampling, 0.0, (0, 0), image.size_hw)) for answer in answers
        ]
        return rle.iou(instance.counts, counts, image.size_hw)

    return [
        Answer(
            area=instance.area,
            click_ious=ious(instance, logits[index, 1:]),
            click_predicted=predicted[index, 1:],
            box_iou=float(ious(instance, logits[len(objects) + index, :1])[0]),
        )
        for index, instance in enumerate(objects)
    ]


def interior_point(mask: np.ndarray) -> tuple[int, int]:
    """Row and column of the point of (H, W) bool that is farthest from where the mask and the photo end."""
    distance = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(np.argmax(distance), mask.shape)
    return int(row), int(column)


def summarize(answers: list[Answer]) -> dict:
    """Mean IoU by size of the object, None where there is no object, and the correlation over all clicks' masks."""
    sizes = {}
    for name, (low, high) in SIZES.items():
        chosen = [answer for answer in answers if low <= answer.area <= high]
        sizes[name] = {
            "objects": len(chosen),
            "click_iou": float(np.mean([answer.click_ious.max() for answer in chosen])) if chosen else None,
            "box_iou": float(np.mean([answer.box_iou for answer in chosen])) if chosen else None,
        }
    true = np.concatenate([answer.click_ious for answer in answers])
    predicted = np.concatenate([answer.click_predicted for answer in answers])
    return {"sizes": sizes, "correlation": float(np.corrcoef(true, predicted)[0, 1])}


if __name__ == "__main__":
    main()
