"""What the model is trained for. All functions take float32 tensors of any Keras backend.

SAM's own focal and dice loss, 20 to 1, ends in empty masks when nothing is trained yet; cross-entropy with both classes
of pixels at the same weight, plus dice, does not.
"""

from __future__ import annotations

from typing import Any

from keras import ops

Tensor = Any  # of the backend

# A target's loss is that of its best mask, and a little of the others', so that no token dies.
OTHERS_SHARE = 0.1


def pair_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and IoU of every target with every mask.

    Args:
      logits: (N, M, pixels).
      targets: (N, K, pixels), covered shares from 0 to 1.

    Returns:
      loss, class-balanced cross-entropy plus dice, and IoU of the masks at threshold 0: (N, K, M) each.
    """
    pixels = logits.shape[-1]
    softplus = ops.softplus(logits)
    area = ops.sum(targets, axis=-1)[:, :, None] + 1.0
    absent = ops.sum(softplus, axis=-1)[:, None] - _product(targets, softplus)  # -log(1 - p), where there is no target
    present = _product(targets, softplus - logits)  # -log(p), where there is
    # A small target's pixels weigh at most 20 times as much as those of a target that fills half the frame.
    present_weight = ops.minimum(1.0 / area, 40.0 / pixels)
    entropy = 0.5 * (present * present_weight + absent / (pixels - area + 2.0))
    probability = ops.sigmoid(logits)
    overlap = _product(targets, probability)
    dice = 1.0 - (2.0 * overlap + 1.0) / (area + ops.sum(probability, axis=-1)[:, None])
    mask = ops.cast(logits > 0, targets.dtype)
    intersection = _product(targets, mask)
    iou = intersection / (area - 1.0 + ops.sum(mask, axis=-1)[:, None] - intersection + 1e-6)
    return entropy + dice, iou


def prompt_loss(
    logits: Tensor, predicted_iou: Tensor, single: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of N prompts.

    The targets of a single click each go to the best of masks 1 to 3; any other prompt's target goes to mask 0, as SAM
    uses them. A mask's IoU to predict is that with the best of the prompt's targets, 0 where there is none.

    Args:
      logits: (N, 4, pixels).
      predicted_iou: (N, 4).
      single: (N,) bool.
      targets: (N, K, pixels), covered shares from 0 to 1.
      weights: (N, K).

    Returns:
      loss of the masks, loss of the predicted IoU, mean IoU of the best mask; (N,) each, to be weighted by `weights`.
    """
    losses, ious = pair_losses(logits, targets)
    first = ops.cast(ops.arange(4) == 0, "float32")
    allowed = ops.where(single[:, None], 1.0 - first, first)[:, None]  # (N, 1, 4)
    best = ops.min(losses + 1e4 * (1.0 - allowed), axis=-1)
    mean = ops.sum(losses * allowed, axis=-1) / ops.sum(allowed, axis=-1)
    masks_loss = ops.sum(weights * ((1 - OTHERS_SHARE) * best + OTHERS_SHARE * mean), axis=-1)

    worth = ops.stop_gradient(ops.max(ious * ops.cast(weights[:, :, None] > 0, "float32"), axis=1))  # (N, 4)
    error = ops.square(predicted_iou - worth) * allowed[:, 0]
    iou_loss = ops.sum(error, axis=-1) / ops.sum(allowed[:, 0], axis=-1)

    best_iou = ops.sum(weights * ops.max(ious * allowed, axis=-1), axis=-1)
    return masks_loss, iou_loss, best_iou


def _product(targets: Tensor, values: Tensor) -> Tensor:
    """Inner products over the pixels of every target with every mask: (N, K, M)."""
    return ops.matmul(targets, ops.transpose(values, (0, 2, 1)))
