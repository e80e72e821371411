"""SAM's prompt encoder and mask decoder (KerasHub SAMPromptEncoder, SAMMaskDecoder) over their weights.

The decoder gives every prompt image tokens of its own, L = 4096 of C = 256 channels, and goes over them some twenty
times. They never exist here. All prompts start from the same image tokens, and each layer adds an attention over only
T = 7 prompt tokens in H = 8 heads of d = 16 channels, so a prompt's image tokens stay a sum of few terms, exactly up to
rounding:

    tokens[l] = scale[l] * (base[l] + sum_r weights[r, l] * rows[r]) + constant

with base (L, C) and constant (C,) shared by all prompts and R = 49 or 98 rows a prompt. An attention adds rows (values
through the output projection) with its softmax as their weights. Layer normalisation is linear but for the variance,
which follows from the inner products of base and rows; so it changes scale and rows.

What the prompts multiply with the shared parts has only d channels: queries and values of a head. So embed_context
projects base for every head once an image, and a prompt's products with it take d, not C, multiplications a pixel.

And there are two stages: predict_iou stops before the upscaling; upscale_masks does the rest for the prompts that
passed the filter, and only for mask tokens 1..3.
Reference: segment_anything/modeling/mask_decoder.py and transformer.py, commit dca509f.
"""

from __future__ import annotations

import functools
import math
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
    softmax,
)


@dataclass(frozen=True)
class DecoderShape:
    """What the decoder's programs depend on beside their weights."""

    grid: int
    num_heads: int


def read_decoder(prompt_encoder: Any, decoder: Any) -> tuple[DecoderShape, Weights]:
    """Shape and weights (numpy) of a KerasHub SAMPromptEncoder and SAMMaskDecoder."""

    def table(embedding: Any) -> np.ndarray:
        return np.asarray(ops.convert_to_numpy(embedding.embeddings))

    grid = prompt_encoder.image_embedding_size[0]
    position = prompt_encoder.positional_embedding_layer
    upscaling = decoder.output_upscaling.layers
    transformer = decoder.transformer
    weights = {
        "point": {
            "frequencies": np.asarray(ops.convert_to_numpy(position.positional_encoding_gaussian_matrix)),
            "foreground": table(prompt_encoder.foreground_point_embed),
            "padding": table(prompt_encoder.not_a_point_embed),
        },
        "image_position": np.asarray(ops.convert_to_numpy(position.encode_image((grid, grid)))).reshape(
            grid * grid, -1
        ),
        "no_mask": table(prompt_encoder.no_mask_embed),
        "output_tokens": np.concatenate([table(decoder.iou_token), table(decoder.mask_tokens)]),
        "layers": [
            {
                "self": _read_attention(layer.self_attention),
                "norm1": norm_weights(layer.layer_norm1),
                "to_image": _read_attention(layer.cross_attention_token_to_image),
                "norm2": norm_weights(layer.layer_norm2),
                "mlp": mlp_weights(layer.mlp_block.mlp_block),
                "norm3": norm_weights(layer.layer_norm3),
                "to_token": _read_attention(layer.cross_attention_image_to_token),
                "norm4": norm_weights(layer.layer_norm4),
            }
            for layer in transformer.layers
        ],
        "final": _read_attention(transformer.final_attention_token_to_image),
        "final_norm": norm_weights(transformer.final_layer_norm),
        "iou_head": mlp_weights(decoder.iou_prediction_head.mlp_block),
        # Mask token 0 is SAM's single-mask answer, which automatic mask generation never reads.
        "hypernetworks": [mlp_weights(network.mlp_block) for network in decoder.output_hypernetworks_mlps[1:]],
        "upscaling": {
            "first": _read_first_upscaling(upscaling[0], transformer.layers[-1].layer_norm4),
            "norm": norm_weights(upscaling[1]),
            "second": _read_upscaling(upscaling[3]),
        },
    }
    return DecoderShape(grid, decoder.num_heads), weights


def _read_attention(layer: Any) -> Weights:
    return {
        "query": dense_weights(layer.query_proj),
        "key": dense_weights(layer.key_proj),
        "value": dense_weights(layer.value_proj),
        "out": dense_weights(layer.out_proj),
    }


def _read_upscaling(layer: Any) -> Weights:
    """A transposed convolution of kernel 2, stride 2 as a matrix (in, 2 * 2 * out): pixels do not overlap."""
    kernel = np.asarray(ops.convert_to_numpy(layer.kernel))  # (2, 2, out, in)
    kernel = kernel.transpose(3, 0, 1, 2).reshape(kernel.shape[3], -1)
    return {"kernel": kernel, "bias": np.tile(np.asarray(ops.convert_to_numpy(layer.bias)), 4)}


def _read_first_upscaling(layer: Any, norm_before: Any) -> Weights:
    """The first one, between two LayerNormalizations.

    The constant that the one before adds goes into the bias, and the mean that the one after removes is not there: its
    channels are centered, so that only their variance is left to do.
    """
    upscaling = _read_upscaling(layer)
    kernel = upscaling["kernel"]
    bias = upscaling["bias"] + np.asarray(ops.convert_to_numpy(norm_before.beta)) @ kernel

    def center(x: np.ndarray) -> np.ndarray:
        pixels = x.reshape(*x.shape[:-1], 4, -1)
        return (pixels - pixels.mean(axis=-1, keepdims=True)).reshape(x.shape)

    return {"kernel": center(kernel), "bias": center(bias)}


def embed_context(weights: Weights, shape: DecoderShape, embedding: Any) -> Weights:
    """All that the prompts of one image have in common.

    Args:
      embedding: (grid, grid, C).

    Returns:
      layers: for each layer
        to_image, to_token: the tables of its attentions, see _logit_tables and _value_tables;
        outputs: for this layer and each before it, (H, d, L): what a value of that layer's to_token attention gives
          when its row meets the centered base;
        centered: (L, C), base less its mean over the channels; square: (L,) float32, its squared length;
        constant: (C,).
      final: the tables of the final attention.
      upscaling: (L, 4 * C/4), base through the first upscaling.
    """
    heads = shape.num_heads
    base = ops.reshape(embedding, (shape.grid**2, -1)) + weights["no_mask"]
    constant = ops.zeros_like(weights["no_mask"][0])
    outputs: list[Any] = []
    layers = []
    for layer in weights["layers"]:
        position = weights["image_position"] + constant
        centered = _center(base)
        outputs.append(_center(_output_kernel(layer["to_token"]["out"], heads)))
        layers.append(
            {
                "to_image": _logit_tables(layer["to_image"]["key"], base, position, heads)
                | _value_tables(layer["to_image"]["value"], base, constant, heads),
                "to_token": _logit_tables(layer["to_token"]["query"], base, position, heads),
                "outputs": [ops.matmul(kernel, ops.transpose(centered)) for kernel in outputs],
                "centered": centered,
                "square": ops.sum(ops.square(ops.cast(centered, "float32")), axis=-1),
                "constant": constant,
            }
        )
        gamma, constant = (ops.cast(layer["norm4"][name], base.dtype) for name in ("gamma", "beta"))
        base = centered * gamma
        outputs = [_center(kernel * gamma) for kernel in outputs]
    position = weights["image_position"] + constant
    final = _logit_tables(weights["final"]["key"], base, position, heads)
    final |= _value_tables(weights["final"]["value"], base, constant, heads)
    return {"layers": layers, "final": final, "upscaling": ops.matmul(base, weights["upscaling"]["first"]["kernel"])}


def _logit_tables(projection: Weights, base: Any, position: Any, heads: int) -> Weights:
    """What the vectors of a head meet in the image: base and position, projected to heads, (H, d, L)."""

    def project(x: Any) -> Any:
        x = ops.reshape(ops.matmul(x, projection["kernel"]), (x.shape[0], heads, -1))
        return ops.transpose(x, (1, 2, 0))

    bias = ops.reshape(projection["bias"], (heads, -1, 1))
    return {"base": project(base), "position": project(position) + bias}


def _value_tables(projection: Weights, base: Any, constant: Any, heads: int) -> Weights:
    """What a head gathers from the image: base (H, L, d) and constant (H, 1, d), projected to heads."""
    values = ops.reshape(ops.matmul(base, projection["kernel"]), (base.shape[0], heads, -1))
    constant = ops.matmul(constant[None], projection["kernel"]) + projection["bias"]
    return {"value": ops.transpose(values, (1, 0, 2)), "constant": ops.reshape(constant, (heads, 1, -1))}


@dataclass(frozen=True)
class _ImageTokens:
    """The image tokens of N prompts, as the module's docstring writes them: what is the prompts' own.

    Attributes:
      scale: (N, L) float32.
      weights: (N, R, L), rows: (N, R, C). A layer adds H * (T - 1) rows, its values through its output projection, and
        one for what no head adds.
      values: (N, H, T - 1, d) of each layer.
    """

    scale: Any
    weights: Any
    rows: Any
    values: tuple[Any, ...]


def predict_iou(weights: Weights, shape: DecoderShape, context: Weights, points: Any) -> tuple[Any, ...]:
    """Runs the decoder up to the predicted IoU.

    Args:
      context: of embed_context.
      points: (N, 2) float32 (x, y) in [0, 1] of the frame, one foreground point a prompt.

    Returns:
      predicted IoU (N, 3) float32, and for upscale_masks: mask embeddings (N, 3, C/8) and the image tokens' scale
      (N, L), weights (N, R, L) and rows (N, R, C).
    """
    heads = shape.num_heads
    image = None
    tokens = _prompt_tokens(weights, points)
    queries = tokens
    for index, (layer, tables) in enumerate(zip(weights["layers"], context["layers"], strict=True)):
        if index == 0:
            queries = _self_attention(layer["self"], queries, queries, heads)
        else:
            queries = queries + _self_attention(layer["self"], queries + tokens, queries, heads)
        queries = layer_norm(layer["norm1"], queries)
        attended = _to_image(layer["to_image"], tables["to_image"], queries + tokens, image, heads)
        queries = layer_norm(layer["norm2"], queries + attended)
        queries = layer_norm(layer["norm3"], queries + mlp(layer["mlp"], queries, ops.relu))
        image = _to_token(layer, tables, image, queries + tokens, queries, heads)
    assert image is not None  # SAM has two layers
    # Mask token 0 and the prompt's own tokens are read no more.
    outputs = [0, *range(2, len(weights["hypernetworks"]) + 2)]
    queries = ops.stack([queries[:, i] for i in outputs], axis=1)
    tokens = ops.stack([tokens[:, i] for i in outputs], axis=1)
    attended = _to_image(weights["final"], context["final"], queries + tokens, image, heads)
    queries = layer_norm(weights["final_norm"], queries + attended)
    predicted_iou = mlp(weights["iou_head"], queries[:, 0], ops.relu)[:, 1:]
    embeddings = [mlp(network, queries[:, 1 + i], ops.relu) for i, network in enumerate(weights["hypernetworks"])]
    return ops.cast(predicted_iou, "float32"), ops.stack(embeddings, axis=1), image.scale, image.weights, image.rows


def upscale_masks(
    weights: Weights,
    shape: DecoderShape,
    shared: Any,
    embeddings: Any,
    scale: Any,
    token_weights: Any,
    rows: Any,
    prompts: Any,
) -> Any:
    """Mask logits of some prompts of a batch.

    The transposed convolutions are matrix products whose 2x2 outputs stay beside each other as channels; the pixels are
    put in their places once, in the three channels of the result. The first one is applied to the parts of the image
    tokens, so that these are not needed here either.

    Args:
      weights: those under "upscaling".
      shared: (L, 4 * C/4), upscaling of embed_context.
      embeddings, scale, token_weights, rows: of predict_iou.
      prompts: (K,) int32 rows of the batch.

    Returns:
      (K, 3, 4 * grid, 4 * grid) float32.
    """
    grid = shape.grid
    embeddings, scale, token_weights, rows = (
        ops.take(part, prompts, axis=0) for part in (embeddings, scale, token_weights, rows)
    )
    kernel = weights["first"]["kernel"]
    own = ops.matmul(ops.transpose(token_weights, (0, 2, 1)), ops.matmul(rows, kernel))
    x = (shared + own) * ops.cast(scale, kernel.dtype)[:, :, None] + weights["first"]["bias"]  # (K, L, 4 * C/4)
    count, pixels, width = x.shape
    x = ops.reshape(x, (count, pixels * 4, width // 4))
    x = gelu(_norm_centered(weights["norm"], x))
    x = gelu(dense(weights["second"], x))  # (K, L * 4, 4 * C/8)
    # One product for the four pixels beside each other: the embeddings stand on the diagonal of a matrix.
    four = ops.cast(np.eye(4)[:, None, :, None], embeddings.dtype)
    diagonal = ops.reshape(four * ops.transpose(embeddings, (0, 2, 1))[:, None, :, None], (count, x.shape[-1], -1))
    logits = ops.reshape(ops.matmul(x, diagonal), (count, grid, grid, 2, 2, 2, 2, -1))
    # y, x, (dy, dx) of the first upscaling and of the second, mask
    logits = ops.transpose(logits, (0, 7, 1, 3, 5, 2, 4, 6))
    return ops.cast(ops.reshape(logits, (count, -1, 4 * grid, 4 * grid)), "float32")


def _norm_centered(weights: Weights, x: Any) -> Any:
    """LayerNormalization over the last axis of what has no mean."""
    wide = ops.cast(x, "float32")
    variance = ops.mean(ops.square(wide), axis=-1, keepdims=True)
    return ops.cast(wide * ops.rsqrt(variance + weights["epsilon"]) * weights["gamma"] + weights["beta"], x.dtype)


def _prompt_tokens(weights: Weights, points: Any) -> Any:
    """(N, 2) points -> (N, T, C): IoU token, mask tokens, the point, and the padding point SAM adds without a box.

    Positions are encoded in float32: bfloat16 would round coordinates to whole pixels.
    """
    point = weights["point"]
    angles = ops.matmul(2 * points - 1, point["frequencies"]) * np.float32(2 * math.pi)
    encoded = ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1) + point["foreground"]
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


def _split_heads(x: Any, heads: int) -> Any:
    """(N, T, heads * d) -> (N, heads, T, d)"""
    count, tokens, width = x.shape
    return ops.transpose(ops.reshape(x, (count, tokens, heads, width // heads)), (0, 2, 1, 3))


def _join_heads(x: Any) -> Any:
    """(N, heads, T, d) -> (N, T, heads * d)"""
    count, heads, tokens, depth = x.shape
    return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (count, tokens, heads * depth))


def _scaled_heads(weights: Weights, x: Any, heads: int) -> Any:
    """Projects to heads and divides by sqrt(d)."""
    x = _split_heads(dense(weights, x), heads)
    return x * (1 / math.sqrt(x.shape[-1]))


def _output_kernel(weights: Weights, heads: int) -> Any:
    """The kernel of an output projection, (H * d, C), as (H, d, C)."""
    return ops.reshape(weights["kernel"], (heads, -1, weights["kernel"].shape[-1]))


def _center(x: Any) -> Any:
    return x - ops.mean(x, axis=-1, keepdims=True)


def _per_head(x: Any, table: Any) -> Any:
    """(N, H, T, k) times a table (H, k, m) that all prompts share -> (N, H, T, m)"""
    count, heads, tokens, width = x.shape
    x = ops.reshape(ops.transpose(x, (1, 0, 2, 3)), (heads, count * tokens, width))
    return ops.transpose(ops.reshape(ops.matmul(x, table), (heads, count, tokens, -1)), (1, 0, 2, 3))


def _self_attention(weights: Weights, queries: Any, values: Any, heads: int) -> Any:
    """Plain attention among the tokens of a prompt; keys are the queries' inputs."""
    q = _scaled_heads(weights["query"], queries, heads)
    k = _split_heads(dense(weights["key"], queries), heads)
    v = _split_heads(dense(weights["value"], values), heads)
    scores = softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))), axis=-1)
    return dense(weights["out"], _join_heads(ops.matmul(scores, v)))


def _logits(vectors: Any, tables: Weights, projection: Weights, image: _ImageTokens | None) -> Any:
    """Inner products of each head's vectors (N, H, T, d) with image tokens plus positions, projected: (N, H, T, L)."""
    if image is None:
        return _per_head(vectors, tables["base"] + tables["position"])
    count, heads, tokens, _ = vectors.shape
    rows = _split_heads(ops.matmul(image.rows, projection["kernel"]), heads)
    with_rows = ops.reshape(ops.matmul(vectors, ops.transpose(rows, (0, 1, 3, 2))), (count, heads * tokens, -1))
    through_rows = ops.reshape(ops.matmul(with_rows, image.weights), (count, heads, tokens, -1))
    scale = ops.cast(image.scale, vectors.dtype)[:, None, None]
    return scale * (_per_head(vectors, tables["base"]) + through_rows) + _per_head(vectors, tables["position"])


def _to_image(weights: Weights, tables: Weights, queries: Any, image: _ImageTokens | None, heads: int) -> Any:
    """Token-to-image attention: queries (N, T, C) -> (N, T, C)."""
    q = _scaled_heads(weights["query"], queries, heads)
    logits = ops.cast(_logits(q, tables, weights["key"], image), "float32")
    shares = ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))
    total = ops.cast(ops.sum(shares, axis=-1, keepdims=True), q.dtype)
    if image is None:
        gathered = _per_head(ops.cast(shares, q.dtype), tables["value"])
    else:
        count, _, tokens, positions = shares.shape
        shares = ops.cast(shares * image.scale[:, None, None], q.dtype)
        # The rows come first in this product: on a CPU it takes a quarter of the time of its transpose.
        flat = ops.transpose(ops.reshape(shares, (count, heads * tokens, positions)), (0, 2, 1))
        by_row = ops.reshape(ops.matmul(image.weights, flat), (count, -1, heads, tokens))
        rows = _split_heads(ops.matmul(image.rows, weights["value"]["kernel"]), heads)
        gathered = _per_head(shares, tables["value"]) + ops.matmul(ops.transpose(by_row, (0, 2, 3, 1)), rows)
    return dense(weights["out"], _join_heads(gathered / total + tables["constant"]))


def _to_token(layer: Weights, tables: Weights, image: _ImageTokens | None, keys: Any, values: Any, heads: int) -> Any:
    """Image-to-token attention and the layer normalisation after it.

    A softmax over T tokens is that over the differences from the first: T - 1 logits and T - 1 values.
    """
    weights = layer["to_token"]
    k = _scaled_heads(weights["key"], keys, heads)
    v = _split_heads(dense(weights["value"], values), heads)
    shares = _softmax_beside_zero(_logits(k[:, :, 1:] - k[:, :, :1], tables["to_token"], weights["query"], image))
    row = dense(weights["out"], _join_heads(v[:, :, :1])) + tables["constant"]
    return _add_and_norm(image, shares, v[:, :, 1:] - v[:, :, :1], row, layer, tables)


def _softmax_beside_zero(logits: Any) -> Any:
    """Softmax over T logits of which the first is zero and not among these (N, H, T - 1, L).

    Written out over the few tokens: as reductions, XLA would first move them to the last axis.
    """
    wide = ops.cast(logits, "float32")
    largest = ops.relu(functools.reduce(ops.maximum, [wide[:, :, i] for i in range(wide.shape[2])]))
    shares = ops.exp(wide - largest[:, :, None])
    total = functools.reduce(ops.add, [shares[:, :, i] for i in range(wide.shape[2])], ops.exp(-largest))
    return ops.cast(shares / total[:, :, None], logits.dtype)


def _add_and_norm(
    image: _ImageTokens | None, shares: Any, values: Any, row: Any, layer: Weights, tables: Weights
) -> _ImageTokens:
    """LayerNormalization of the image tokens plus an attention.

    Args:
      shares: (N, H, T - 1, L) of values (N, H, T - 1, d), to go through the output projection.
      row: (N, 1, C), what is added to all image tokens alike.
    """
    count, heads, _, positions = shares.shape
    dtype = shares.dtype
    rows = _per_head(values, _output_kernel(layer["to_token"]["out"], heads))
    rows = [ops.reshape(rows, (count, -1, row.shape[-1])), row]
    weights = [ops.reshape(shares, (count, -1, positions)), ops.ones((count, 1, positions), dtype)]
    all_values = (values,)
    scale = ops.ones((count, positions))
    if image is not None:
        scale = image.scale
        inverse = ops.cast(1 / scale, dtype)[:, None]
        rows = [image.rows, *rows]
        weights = [image.weights, *(each * inverse for each in weights)]
        all_values = (*image.values, values)
    rows, weights = _center(ops.concatenate(rows, axis=1)), ops.concatenate(weights, axis=1)

    # |centered + sum_r weights[r] * rows[r]|**2, in float32
    with_base = []
    first = 0
    for of_layer, table in zip(all_values, tables["outputs"], strict=True):
        with_base.append(ops.reshape(_per_head(of_layer, table), (count, -1, positions)))
        first += with_base[-1].shape[1] + 1
        with_base.append(ops.matmul(rows[:, first - 1 : first], ops.transpose(tables["centered"])))
    among_rows = ops.matmul(ops.matmul(rows, ops.transpose(rows, (0, 2, 1))), weights)
    products = 2 * ops.concatenate(with_base, axis=1) + among_rows
    products = ops.cast(weights, "float32") * ops.cast(products, "float32")
    # Summed by a matrix product: as a reduction, XLA would fuse it with what is before and go down the columns.
    length = tables["square"] + ops.matmul(ops.ones((count, 1, products.shape[1])), products)[:, 0]
    variance = ops.maximum(ops.square(scale) * length / rows.shape[-1], 0)
    norm = layer["norm4"]
    return _ImageTokens(
        scale=scale * ops.rsqrt(variance + norm["epsilon"]),
        weights=weights,
        rows=rows * ops.cast(norm["gamma"], dtype),
        values=all_values,
    )
