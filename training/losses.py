"""What the model is trained for. All functions take float32 tensors of any Keras backend.

SAM's own focal and dice loss, 20 to 1, ends in empty masks when nothing is trained yet; cross-entropy with both classes
of pixels at the same weight, plus dice, does not.
"""

from __future__ import annotations

from keras import ops

from training.sam_tiny.losses import OTHERS_SHARE, Tensor, pair_losses


def prompt_loss(
    logits: Tensor, predicted_iou: Tensor, is_box: Tensor, targets: Tensor, weights: Tensor, qualities: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of N prompts.

    A click's targets each go to the best of masks 1 to 3; a box's target goes to mask 0, as SAM uses them. A mask's IoU
    to predict is that with the best of the prompt's targets, times what the target is worth.

    Args:
      logits: (N, 4, pixels).
      predicted_iou: (N, 4).
      is_box: (N,) bool.
      targets, weights, qualities: as in scenes.Batch, (N, K, pixels) and (N, K).

    Returns:
      loss of the masks, loss of the predicted IoU, mean IoU of the best mask for targets of weight 1; scalars.
    """
    losses, ious = pair_losses(logits, targets)
    first = ops.cast(ops.arange(4) == 0, "float32")
    allowed = ops.where(is_box[:, None], first, 1.0 - first)[:, None]  # (N, 1, 4)
    best = ops.min(losses + 1e4 * (1.0 - allowed), axis=-1)
    mean = ops.sum(losses * allowed, axis=-1) / ops.sum(allowed, axis=-1)
    masks_loss = ops.sum(weights * ((1 - OTHERS_SHARE) * best + OTHERS_SHARE * mean)) / (ops.sum(weights) + 1e-6)

    worth = ops.stop_gradient(ops.max(ious * qualities[:, :, None], axis=1))  # (N, 4)
    error = ops.square(predicted_iou - worth) * allowed[:, 0]
    iou_loss = ops.sum(error) / ops.sum(allowed)

    objects = ops.cast(weights == 1.0, "float32")
    best_iou = ops.sum(objects * ops.max(ious * allowed, axis=-1)) / (ops.sum(objects) + 1e-6)
    return masks_loss, iou_loss, best_iou
