"""Trains the embedded model from scratch.

python -m training.train --photos DIR --truth instances.json --work DIR [--steps N]

Resumes from what is in --work, and ends there with weights.npz (the mean of the last steps' weights), log.jsonl and
curve.png. python -m training.finish makes a preset of it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from tqdm import tqdm

from training.losses import prompt_loss
from training.model import build_model
from training.network import predict
from training.photos import load_photos, read_photos
from training.scenes import LOW_RES, Batch, batches

SEED = 0
IMAGES, PROMPTS = 4, 24  # a step
STEPS = 8300
PEAK_RATE, LAST_SHARE, WARM_UP = 2e-3, 0.01, 150
ADAM_RATIO = 0.25  # of the rate, for what is not a matrix
IOU_WEIGHT = 5.0  # of the loss of predicted IoU, which is a twentieth of the masks'
SAVE_EVERY, LOG_EVERY = 250, 25


def main(argv: list[str] | None = None) -> None:
    """Trains until --steps."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="directory of COCO photos")
    parser.add_argument("--truth", type=Path, required=True, help="their instances.json")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, log and curve; resumed from")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"length, also of a run that goes on (default: {STEPS})"
    )
    parser.add_argument("--stop_after", type=float, help="seconds, and on to the next line of the log")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    training, _ = read_photos(args.truth)
    photos = load_photos(args.photos, training, args.work / "regions")

    model = build_model(SEED)
    optimizer = build_optimizer(model, args.steps)
    variables = [*model.variables, *optimizer.variables]
    checkpoint, log = args.work / "checkpoint.npz", args.work / "log.jsonl"
    start = restore(checkpoint, variables) if checkpoint.exists() else 0
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= start))

    train = tf.function(lambda *batch: train_step(model, optimizer, *batch))
    made = batches(SEED, start, photos, IMAGES, PROMPTS)
    sums, began, stopped = np.zeros(4), time.monotonic(), False
    with tqdm(total=args.steps, initial=start, unit="step", desc="training", mininterval=5) as bar:
        for step in range(start + 1, args.steps + 1):
            sums += [float(value) for value in train(*as_tensors(next(made)))]
            bar.update()
            if step % LOG_EVERY == 0:
                names = ("masks_loss", "iou_loss", "best_iou", "gradient")
                means = [round(value / LOG_EVERY, 5) for value in sums]
                line = {"step": step, **dict(zip(names, means, strict=True))}
                sums[:] = 0
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                bar.set_postfix(loss=line["masks_loss"], iou=line["best_iou"])
                stopped = args.stop_after is not None and time.monotonic() - began > args.stop_after
            if step % SAVE_EVERY == 0 or step == args.steps or stopped:
                save(args.work / "weights.npz", mean_weights(model, optimizer))
                plot_curve(log, args.work / "curve.png")
                save(checkpoint, checkpoint_of(step, variables))  # last, so that a finished run has all three
            if stopped:
                break


def build_optimizer(model: keras.Model, steps: int) -> keras.optimizers.Optimizer:
    """Muon (Jordan et al., 2024) for the matrices, AdamW for all else, and a running mean of the weights.

    With AdamW alone a masks' loss of 0.93 took 1000 steps; with Muon it took 500.
    """
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps - WARM_UP, alpha=LAST_SHARE, warmup_target=PEAK_RATE, warmup_steps=WARM_UP
    )
    optimizer = keras.optimizers.Muon(
        rate,
        adam_lr_ratio=ADAM_RATIO,
        adam_beta_2=0.99,
        weight_decay=0.03,
        adam_weight_decay=0.03,
        # Tables of positions and of learned tokens are no matrices, and neither is what ends in four numbers.
        exclude_layers=["rel_pos", "embed", f"{model.mask_decoder.iou_prediction_head.name}/"],
        global_clipnorm=1.0,
        use_ema=True,
        ema_momentum=0.998,
    )
    optimizer.build(model.trainable_variables)
    return optimizer


def train_step(model: keras.Model, optimizer: keras.Optimizer, *batch: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """One step; returns both losses, the mean IoU of best masks, and the gradient's norm."""
    pixels, sizes, coords, is_box, targets, weights, qualities = batch
    with tf.GradientTape() as tape:
        logits, predicted = predict(model, pixels, sizes, coords, is_box, tf.bfloat16)
        prompts = logits.shape[0]
        shape = (prompts, targets.shape[2], LOW_RES * LOW_RES)
        masks_loss, iou_loss, best_iou = prompt_loss(
            tf.reshape(logits, (prompts, 4, -1)),
            predicted,
            tf.reshape(is_box, (prompts,)),
            tf.reshape(tf.cast(targets, tf.float32) / 4.0, shape),
            tf.reshape(weights, shape[:2]),
            tf.reshape(qualities, shape[:2]),
        )
        loss = masks_loss + IOU_WEIGHT * iou_loss
    gradients = tape.gradient(loss, model.trainable_variables)
    size = tf.linalg.global_norm([gradient for gradient in gradients if gradient is not None])
    # Mask prompts and points to leave out are not trained: the loss does not depend on what embeds them.
    given = [
        tf.zeros_like(weight) if gradient is None else gradient
        for gradient, weight in zip(gradients, model.trainable_variables, strict=True)
    ]
    optimizer.apply_gradients(zip(given, model.trainable_variables, strict=True))
    return masks_loss, iou_loss, best_iou, size


def as_tensors(batch: Batch) -> list[tf.Tensor]:
    """A batch's arrays in the order in which train_step takes them."""
    return [
        tf.constant(value)
        for value in (
            *(batch.pixels, batch.sizes, batch.coords, batch.is_box),
            *(batch.targets, batch.weights, batch.qualities),
        )
    ]


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays by name; a reader sees the old file or the new one."""
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)  # type: ignore[arg-type]  # one of its own keywords has another type
    os.replace(part, path)


def checkpoint_of(step: int, variables: list[keras.Variable]) -> dict[str, np.ndarray]:
    """All that a run needs to go on."""
    return {f"arr_{index}": np.array(variable) for index, variable in enumerate(variables)} | {"step": np.array(step)}


def restore(path: Path, variables: list[keras.Variable]) -> int:
    """Reads a checkpoint; returns its step."""
    stored = np.load(path)
    for index, variable in enumerate(variables):
        variable.assign(stored[f"arr_{index}"])
    return int(stored["step"])


def mean_weights(model: keras.Model, optimizer: keras.Optimizer) -> dict[str, np.ndarray]:
    """The running mean of the model's weights, by path."""
    means = {
        weight.path: np.array(mean)
        for weight, mean in zip(model.trainable_variables, optimizer._model_variables_moving_average, strict=True)
    }
    return {weight.path: means.get(weight.path, np.array(weight)) for weight in model.variables}


def plot_curve(log: Path, picture: Path) -> None:
    """The best masks' mean IoU and the losses over the steps."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, [line["best_iou"] for line in lines], linewidth=0.8)
    left.set(xlabel="step", title="mean IoU of the best mask, training prompts")
    for name in ("masks_loss", "iou_loss"):
        right.plot(steps, [line[name] for line in lines], linewidth=0.8, label=name)
    right.set(xlabel="step", title="loss")
    right.legend()
    figure.savefig(picture)


if __name__ == "__main__":
    main()
