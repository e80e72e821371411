"""Makes the embedded preset of trained weights: calibrates the scores, rounds to float16, writes the files.

python -m training.finish --photos DIR --truth instances.json --work DIR --preset transforms/presets/sam_tiny

A small model is sure of little, so SAM's default thresholds would keep next to nothing. Two numbers change that, found
on photos of the training set with a grid of clicks, at the network's own resolution, and put into the weights of the
last layers:

- predicted IoU is scaled and shifted, so that KEPT of the masks lie above SAM's threshold of 0.88 and a thousandth
  above 1: it ranks masks, and is no longer an estimate;
- logits are multiplied, so that STABLE of those lie above SAM's stability of 0.95. Masks stay what they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from maskbeam.transforms.masks.prompts import build_point_grid
from maskbeam.transforms.masks.select import SelectionConfig
from training.model import build_model
from training.network import predict
from training.photos import Photo, load_photos, read_photos
from training.sam_tiny.finish import write_preset
from training.scenes import FRAME, place
from training.train import SEED

PHOTOS = 60  # to calibrate on
POINTS_PER_SIDE = 16
KEPT = 0.5  # of all masks, above PRED_IOU_THRESH
BEST = 0.001  # of all masks, above 1
STABLE = 0.35  # of those, above STABILITY_SCORE_THRESH; with larger logits float32 rounds by more than 1e-4
PRED_IOU_THRESH, STABILITY_SCORE_THRESH = SelectionConfig.pred_iou_thresh, SelectionConfig.stability_score_thresh


def main(argv: list[str] | None = None) -> None:
    """Calibrates and writes the preset."""
    parser = argparse.ArgumentParser(prog="python -m training.finish", description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="--work of training.train")
    parser.add_argument("--preset", type=Path, required=True, help="directory to write")
    args = parser.parse_args(argv)
    model = build_model(SEED)
    stored = np.load(args.work / "weights.npz")
    for weight in model.variables:
        weight.assign(stored[weight.path])
    training, _ = read_photos(args.truth)
    photos = load_photos(args.photos, training[-PHOTOS:], args.work / "regions")

    answers = [predict_grid(model, photo) for photo in photos]
    predicted = np.concatenate([predicted for _, predicted in answers])
    scale, shift = fit_predicted_iou(predicted)
    high = [logits[scale * ious + shift > PRED_IOU_THRESH] for logits, ious in answers]
    factor = fit_stability(high)
    print(f"predicted IoU: x {scale:.3f} + {shift:.3f}; logits: x {factor:.3f}")
    change_scores(model.mask_decoder, scale, shift, factor)
    write_preset(model, args.preset)


def predict_grid(model: keras.Model, photo: Photo) -> tuple[np.ndarray, np.ndarray]:
    """Masks 1 to 3 of a grid of clicks: logits of what is not padding, (N, h, w), and predicted IoU, (N,)."""
    height, width = photo.pixels.shape[:2]
    scene = place(photo, (0, 0, width, height), 1.0, False, 1.0)
    points = build_point_grid(POINTS_PER_SIDE) * scene.size[::-1]
    coords = np.zeros((1, len(points), 2, 2), np.float32)
    coords[0, :, 0] = points
    logits, predicted = predict(
        model,
        tf.constant(scene.pixels[None]),
        tf.constant([scene.size]),
        tf.constant(coords),
        tf.zeros((1, len(points)), tf.bool),
    )
    used = [-(-side * logits.shape[-1] // FRAME) for side in scene.size]
    return logits.numpy()[:, 1:, : used[0], : used[1]].reshape(-1, *used), predicted.numpy()[:, 1:].ravel()


def fit_predicted_iou(predicted: np.ndarray) -> tuple[float, float]:
    """Scale and shift that put the share KEPT above PRED_IOU_THRESH and the share BEST above 1."""
    edge, best = np.quantile(predicted, [1 - KEPT, 1 - BEST])
    scale = (1 - PRED_IOU_THRESH) / (best - edge)
    return float(scale), float(1 - scale * best)


def fit_stability(logits: list[np.ndarray]) -> float:
    """The smallest of 100 factors from 1 to 100 with which the share STABLE of masks reaches STABILITY_SCORE_THRESH.

    Raises:
      ValueError: none does.
    """
    for factor in np.geomspace(1, 100, 100):
        scores = [(mask > 1 / factor).sum() / max(1, (mask > -1 / factor).sum()) for masks in logits for mask in masks]
        if np.mean(np.array(scores) >= STABILITY_SCORE_THRESH) >= STABLE:
            return float(factor)
    raise ValueError(f"less than {STABLE} of the masks are stable even with logits x 100: train longer")


def change_scores(decoder: keras.layers.Layer, scale: float, shift: float, factor: float) -> None:
    """Puts the calibration into the last layers of the IoU head and of the hypernetworks."""
    last = decoder.iou_prediction_head.mlp_block.layers[-1]
    last.kernel.assign(last.kernel * scale)
    last.bias.assign(last.bias * scale + shift)
    for mlp in decoder.output_hypernetworks_mlps:
        last = mlp.mlp_block.layers[-1]
        last.kernel.assign(last.kernel * factor)
        last.bias.assign(last.bias * factor)


if __name__ == "__main__":
    main()
