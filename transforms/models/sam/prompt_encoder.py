"""SAM's prompt encoder (KerasHub SAMPromptEncoder) over its weights: prompts -> tokens, coarse masks -> rows.

A prompt is T = 5 + K tokens: the IoU token, mask tokens 0 to 3, and K sparse tokens of a point each:

    sparse = encode(xy) + types[label],     encode(xy) = [sin, cos](2 pi (2 xy - 1) @ frequencies), 0 if label < 0

The label says what the point is: 0 background, 1 foreground, 2 and 3 the corners of a box, -1 the padding point that
SAM adds where there is no box. That one is a real token: it takes part in every softmax. -2 is no token: it fills a
prompt up to the K of its program, and the decoder keeps it out of every softmax. One program serves points and boxes.

A coarse mask adds an embedding of its own to every image token. Its network ends in a 1x1 convolution of only M = 16
channels h (M, L), so that this is a sum of 17 rows which all prompts share, as decoder.py wants it:

    dense[l] - no_mask = sum_m h[m, l] * kernel[m] + 1 * (bias - no_mask)

Reference: segment_anything/modeling/prompt_encoder.py, commit dca509f.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from keras import ops

from maskbeam.transforms.masks.prompts import ABSENT
from maskbeam.transforms.models.sam.layers import Weights, dense, gelu, layer_norm, norm_weights


def read_prompt_encoder(encoder: Any) -> Weights:
    """Weights (numpy) of a KerasHub SAMPromptEncoder, but for the position encoding of the image.

    Returns:
      point: frequencies (2, C/2), foreground and padding (1, C), and types (6, C): row label + 2.
      no_mask: (1, C).
      mask: the layers of the mask's network before the last; mask_rows: (M + 1, C), what the last one amounts to.
    """
    position = encoder.positional_embedding_layer
    absent = np.zeros((1, encoder.hidden_size), np.float32)
    embeddings = [
        encoder.not_a_point_embed,
        encoder.background_point_embed,
        encoder.foreground_point_embed,
        encoder.top_left_corner_embed,
        encoder.bottom_right_corner_embed,
    ]
    first, norm1, _, second, norm2, _, last = encoder.mask_downscaler.layers
    no_mask, last = _table(encoder.no_mask_embed), _read_convolution(last)
    return {
        "point": {
            "frequencies": np.asarray(ops.convert_to_numpy(position.positional_encoding_gaussian_matrix)),
            "foreground": _table(encoder.foreground_point_embed),
            "padding": _table(encoder.not_a_point_embed),
            "types": np.concatenate([absent, *(_table(embedding) for embedding in embeddings)]),
        },
        "no_mask": no_mask,
        "mask": {
            "first": _read_convolution(first),
            "norm1": norm_weights(norm1),
            "second": _read_convolution(second),
            "norm2": norm_weights(norm2),
        },
        "mask_rows": np.concatenate([last["kernel"], last["bias"] - no_mask]),
    }


def _table(embedding: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(embedding.embeddings))


def _read_convolution(layer: Any) -> Weights:
    """A convolution whose stride is its kernel's size as a matrix (h * w * in, out): windows do not overlap."""
    kernel = np.asarray(ops.convert_to_numpy(layer.kernel))
    return {"kernel": kernel.reshape(-1, kernel.shape[-1]), "bias": np.asarray(ops.convert_to_numpy(layer.bias))}


def foreground_tokens(weights: Weights, points: Any) -> Any:
    """(N, 2) points -> (N, 7, C): one foreground point a prompt and the padding point, as the grid has them.

    Positions are encoded in float32: bfloat16 would round coordinates to whole pixels.
    """
    point = weights["point"]
    encoded = _encode(point, points) + point["foreground"]
    count, width = encoded.shape
    outputs = weights["output_tokens"]
    dtype = outputs.dtype
    return ops.concatenate(
        [
            ops.broadcast_to(outputs[None], (count, *outputs.shape)),
            ops.cast(encoded, dtype)[:, None],
            ops.broadcast_to(ops.cast(point["padding"], dtype)[None], (count, 1, width)),
        ],
        axis=1,
    )


def prompt_tokens(weights: Weights, coords: Any, labels: Any) -> Any:
    """Tokens of any prompts, in float32 until the last step.

    Args:
      coords: (N, K, 2) float32 (x, y) in [0, 1] of the frame; of labels below 0 they are not looked at.
      labels: (N, K) int32, see the module's docstring.

    Returns:
      (N, 5 + K, C).
    """
    point = weights["point"]
    is_somewhere = ops.cast(labels >= 0, "float32")[..., None]
    sparse = _encode(point, coords) * is_somewhere + ops.take(point["types"], labels - ABSENT, axis=0)
    outputs = weights["output_tokens"]
    outputs = ops.broadcast_to(outputs[None], (coords.shape[0], *outputs.shape))
    return ops.concatenate([outputs, ops.cast(sparse, outputs.dtype)], axis=1)


def absent_bias(labels: Any, count_outputs: int, dtype: Any) -> Any:
    """(N, K) labels -> (N, 5 + K): what takes absent tokens out of a softmax when added to its logits, else 0."""
    outputs = ops.zeros((labels.shape[0], count_outputs), dtype)
    return ops.concatenate([outputs, ops.cast(ops.where(labels == ABSENT, -1e30, 0.0), dtype)], axis=1)


def embed_masks(weights: Weights, masks: Any) -> Any:
    """Coarse masks -> the weights of mask_rows at every image token.

    Args:
      masks: (N, 4 * grid, 4 * grid) float32 logits in the model's frame.

    Returns:
      (N, M + 1, L): h of the module's docstring, and ones.
    """
    network = weights["mask"]
    x = ops.cast(masks, network["first"]["kernel"].dtype)[..., None]
    for convolution, norm in (("first", "norm1"), ("second", "norm2")):
        x = gelu(layer_norm(network[norm], dense(network[convolution], _windows(x))))
    count, height, width, channels = x.shape
    x = ops.transpose(ops.reshape(x, (count, height * width, channels)), (0, 2, 1))
    return ops.concatenate([x, ops.ones((count, 1, height * width), x.dtype)], axis=1)


def _windows(x: Any) -> Any:
    """(N, H, W, C) -> (N, H/2, W/2, 4 * C): the four pixels of each window as channels."""
    count, height, width, channels = x.shape
    x = ops.reshape(x, (count, height // 2, 2, width // 2, 2, channels))
    return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (count, height // 2, width // 2, 4 * channels))


def _encode(point: Weights, coords: Any) -> Any:
    """Position encoding of (..., 2) coordinates in [0, 1], (..., C)."""
    angles = ops.matmul(2 * coords - 1, point["frequencies"]) * np.float32(2 * math.pi)
    return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)
