"""SAM's image encoder (KerasHub ViTDetBackbone) over its weights.

The ViT of "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv:2203.16527) with windowed blocks
and a few global ones. Exact up to rounding, but
 - the score map of global attention, (heads, 4096, 4096) at full size, never exists: it is made a few query rows of one
   head at a time, small enough for the processor's cache;
 - queries, keys and values of the padding around windows are their bias, not a matrix product, and the output
   projection skips padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from maskbeam.transforms.models.sam.layers import (
    Weights,
    dense,
    dense_weights,
    gelu,
    layer_norm,
    mlp,
    mlp_weights,
    norm_weights,
)

# KerasHub normalises inside ViTDetBackbone: (x / 255 - mean) / std.
PIXEL_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
PIXEL_STD = np.array([0.229, 0.224, 0.225], np.float32)

# Attention scores computed at once, in values: 4 MB of float32 stay in the cache of one core.
_SCORE_VALUES = 2**20


@dataclass(frozen=True)
class EncoderShape:
    """What the encoder's program depends on beside its weights.

    Attributes:
      frame_size: side of the input in pixels.
      patch_size: side of a patch in pixels.
      num_heads: attention heads of every block.
      windows: window size of each block in patches; 0 = global attention.
    """

    frame_size: int
    patch_size: int
    num_heads: int
    windows: tuple[int, ...]

    @property
    def grid(self) -> int:
        """Side of the embedding in patches."""
        return self.frame_size // self.patch_size


def read_encoder(encoder: Any) -> tuple[EncoderShape, Weights]:
    """Shape and weights (numpy) of a KerasHub ViTDetBackbone."""
    layers = {type(layer).__name__: layer for layer in encoder.layers}
    blocks = [layer for layer in encoder.layers if type(layer).__name__ == "WindowedTransformerEncoder"]
    shape = EncoderShape(
        frame_size=encoder.image_shape[0],
        patch_size=encoder.patch_size,
        num_heads=encoder.num_heads,
        windows=tuple(block.window_size for block in blocks),
    )
    patching = layers["ViTDetPatchingAndEmbedding"].projection
    patch_kernel = np.asarray(ops.convert_to_numpy(patching.kernel))
    position = (
        np.asarray(ops.convert_to_numpy(layers["AddPositionalEmbedding"].pos_embed))[0]
        if encoder.use_abs_pos
        else np.zeros((shape.grid, shape.grid, patch_kernel.shape[-1]), np.float32)
    )
    neck = encoder.neck.layers
    weights = {
        "patch": {
            "kernel": patch_kernel.reshape(-1, patch_kernel.shape[-1]),
            "bias": np.asarray(ops.convert_to_numpy(patching.bias)),
        },
        "position": position,
        "blocks": [_read_block(block, shape) for block in blocks],
        "neck": {
            "conv1": np.asarray(ops.convert_to_numpy(neck[0].kernel))[0, 0],
            "norm1": norm_weights(neck[1]),
            "conv2": np.asarray(ops.convert_to_numpy(neck[2].kernel)),
            "norm2": norm_weights(neck[3]),
        },
    }
    return shape, weights


def _read_block(block: Any, shape: EncoderShape) -> Weights:
    attention = block.attention
    side = block.window_size or shape.grid
    head_dim = attention.key_dim
    if attention.use_rel_pos:
        # Row q, column k of these tables is the embedding of the offset q - k.
        offset = np.arange(side)[:, None] - np.arange(side)[None, :] + side - 1
        relative = attention.add_decomposed_relative_pe
        relative_y = np.asarray(ops.convert_to_numpy(relative.rel_pos_h))[offset]
        relative_x = np.asarray(ops.convert_to_numpy(relative.rel_pos_w))[offset]
    else:
        relative_y = relative_x = np.zeros((side, side, head_dim), np.float32)
    return {
        "norm1": norm_weights(block.layer_norm1),
        "qkv": dense_weights(attention.qkv),
        "relative_y": relative_y,
        "relative_x": relative_x,
        "projection": dense_weights(attention.projection),
        "norm2": norm_weights(block.layer_norm2),
        "mlp": mlp_weights(block.mlp_block.dense_net),
    }


def encode_image(weights: Weights, shape: EncoderShape, frame: Any, resized_hw: Any, dtype: str) -> Any:
    """Image embedding of one frame.

    Args:
      frame: (frame_size, frame_size, 3) uint8.
      resized_hw: (2,) int32, the part of the frame that is image; the rest becomes 0 after normalisation.
      dtype: of the matrix products.

    Returns:
      (grid, grid, channels) in dtype.
    """
    grid, patch = shape.grid, shape.patch_size
    x = (ops.cast(frame, "float32") / np.float32(255) - PIXEL_MEAN) / PIXEL_STD
    index = ops.arange(shape.frame_size, dtype="int32")
    inside = ops.logical_and((index < resized_hw[0])[:, None], (index < resized_hw[1])[None, :])
    x = ops.cast(ops.where(inside[:, :, None], x, np.float32(0)), dtype)
    x = ops.transpose(ops.reshape(x, (grid, patch, grid, patch, 3)), (0, 2, 1, 3, 4))
    x = dense(weights["patch"], ops.reshape(x, (grid, grid, patch * patch * 3))) + weights["position"]
    for block, window in zip(weights["blocks"], shape.windows, strict=True):
        x = _block(block, x, window, shape.num_heads)
    neck = weights["neck"]
    x = layer_norm(neck["norm1"], ops.matmul(x, neck["conv1"]))
    x = ops.conv(x[None], neck["conv2"], padding="same", data_format="channels_last")[0]
    return layer_norm(neck["norm2"], x)


def _block(weights: Weights, x: Any, window: int, num_heads: int) -> Any:
    """One transformer block on (grid, grid, width)."""
    grid, width = x.shape[0], x.shape[2]
    qkv = dense(weights["qkv"], layer_norm(weights["norm1"], x))
    if window:
        # The reference pads with zeros before the projection, so the padding's q, k and v are the bias. Padding takes
        # part in attention as keys.
        pad = -grid % window
        bias = weights["qkv"]["bias"]
        side = grid + pad
        if pad:
            qkv = ops.concatenate([qkv, ops.broadcast_to(bias, (pad, grid, 3 * width))], axis=0)
            qkv = ops.concatenate([qkv, ops.broadcast_to(bias, (side, pad, 3 * width))], axis=1)
        count = side // window
        qkv = ops.reshape(qkv, (count, window, count, window, 3, num_heads, -1))
        qkv = ops.transpose(qkv, (4, 0, 2, 5, 1, 3, 6))  # (3, window row, window column, head, y, x, head_dim)
        attended = _window_attention(weights, ops.reshape(qkv, (3, count * count * num_heads, window, window, -1)))
        attended = ops.reshape(attended, (count, count, num_heads, window, window, -1))
        attended = ops.reshape(ops.transpose(attended, (0, 3, 1, 4, 2, 5)), (side, side, width))[:grid, :grid]
    else:
        qkv = ops.transpose(ops.reshape(qkv, (grid, grid, 3, num_heads, -1)), (2, 3, 0, 1, 4))
        attended = ops.reshape(ops.transpose(_global_attention(weights, qkv), (1, 2, 0, 3)), (grid, grid, width))
    x = x + dense(weights["projection"], attended)
    return x + mlp(weights["mlp"], layer_norm(weights["norm2"], x), gelu)


def _relative_scores(weights: Weights, q: Any) -> tuple[Any, Any]:
    """The decomposed relative position terms of unscaled queries (n, y, x, head_dim): each (n, y, x, side)."""
    return (
        ops.einsum("nyxc,ykc->nyxk", q, weights["relative_y"]),
        ops.einsum("nyxc,xkc->nyxk", q, weights["relative_x"]),
    )


def _window_attention(weights: Weights, qkv: Any) -> Any:
    """Attention within windows: qkv (3, n, side, side, head_dim) -> (n, side, side, head_dim)."""
    q, k, v = qkv[0], qkv[1], qkv[2]
    n, side, _, head_dim = q.shape
    y_scores, x_scores = _relative_scores(weights, q)
    flat = (n, side * side, head_dim)
    scores = ops.matmul(ops.reshape(q * head_dim**-0.5, flat), ops.transpose(ops.reshape(k, flat), (0, 2, 1)))
    y_scores = ops.reshape(y_scores, (n, side * side, side, 1))
    x_scores = ops.reshape(x_scores, (n, side * side, 1, side))
    scores = ops.reshape(scores, (n, side * side, side, side)) + y_scores + x_scores
    return ops.reshape(_gather(scores, ops.reshape(v, flat)), (n, side, side, head_dim))


def _gather(scores: Any, values: Any) -> Any:
    """Means of values (..., y * x, head_dim) with the softmax of scores (..., queries, y, x): (..., queries, head_dim).

    y and x stay apart until the exponentials are there: XLA would put their index arithmetic into the same loop.
    """
    wide = ops.cast(scores, "float32")
    shares = ops.exp(wide - ops.max(wide, axis=(-2, -1), keepdims=True))
    total = ops.sum(shares, axis=(-2, -1))[..., None]
    shares = ops.reshape(ops.cast(shares, scores.dtype), (*scores.shape[:-2], -1))
    return ops.matmul(shares, values) / ops.cast(total, scores.dtype)


def _global_attention(weights: Weights, qkv: Any) -> Any:
    """Attention over the whole grid, a few query rows of one head at a time: like _window_attention, n = heads."""
    q, k, v = qkv[0], qkv[1], qkv[2]
    heads, side, _, head_dim = q.shape
    tokens = side * side
    rows = next(r for r in range(side, 0, -1) if side % r == 0 and (r * side * tokens <= _SCORE_VALUES or r == 1))
    y_scores, x_scores = _relative_scores(weights, q)
    chunks = (heads * (side // rows), rows * side)
    head_of_chunk = np.repeat(np.arange(heads, dtype=np.int32), side // rows)
    keys = ops.transpose(ops.reshape(k, (heads, tokens, head_dim)), (0, 2, 1))
    values = ops.reshape(v, (heads, tokens, head_dim))

    def attend(chunk: Any) -> Any:
        queries, chunk_y, chunk_x, head = chunk
        scores = ops.reshape(ops.matmul(queries, ops.take(keys, head, axis=0)), (rows * side, side, side))
        return _gather(scores + chunk_y[:, :, None] + chunk_x[:, None, :], ops.take(values, head, axis=0))

    attended = ops.map(
        attend,
        (
            ops.reshape(q * head_dim**-0.5, (*chunks, head_dim)),
            ops.reshape(y_scores, (*chunks, side)),
            ops.reshape(x_scores, (*chunks, side)),
            ops.convert_to_tensor(head_of_chunk),
        ),
    )
    return ops.reshape(attended, (heads, side, side, head_dim))
