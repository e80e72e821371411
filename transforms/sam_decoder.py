"""SAM's prompt encoder and mask decoder (KerasHub SAMPromptEncoder, SAMMaskDecoder) over their weights.

The decoder gives every prompt image tokens of its own, L = 4096 of C = 256 channels, and goes over them some twenty
times. They never exist here. All prompts start from the same image tokens, and each layer adds an attention over only
T = 7 prompt tokens in H = 8 heads, so a prompt's image tokens stay a sum of few terms, exactly up to rounding:

    tokens[l] = scale[l] * base[l] + sum_r weights[r, l] * rows[r] + constant

with base (L, C) shared by all prompts and R = 57 or 114 rows a prompt. Attention adds rows (values through the output
projection) with its softmax as their weights. Layer normalisation is linear but for the variance, which follows from
the inner products of base and rows; so it changes scale, weights and rows. Products with the image tokens become
products with base, shared by all prompts, and with the rows.

Prompt tokens are projected through the weights to C channels instead of the image tokens to the heads:
q.(Wk k) = (Wk' q).k, sum a(Wv k) = Wv sum(a k), (a V) Wo = a (V Wo). And there are two stages: predict_iou stops before
the upscaling; upscale_masks does the rest for the prompts that passed the filter, and only for mask tokens 1..3.
Reference: segment_anything/modeling/mask_decoder.py and transformer.py, commit dca509f.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from transforms.sam_layers import (
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
            "first": _read_upscaling(upscaling[0], transformer.layers[-1].layer_norm4),
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


def _read_upscaling(layer: Any, norm_before: Any = None) -> Weights:
    """A transposed convolution of kernel 2, stride 2 as a matrix (in, 2 * 2 * out): pixels do not overlap.

    The constant that a LayerNormalization before it adds goes into the bias.
    """
    kernel = np.asarray(ops.convert_to_numpy(layer.kernel))  # (2, 2, out, in)
    kernel = kernel.transpose(3, 0, 1, 2).reshape(kernel.shape[3], -1)
    bias = np.tile(np.asarray(ops.convert_to_numpy(layer.bias)), 4)
    if norm_before is not None:
        bias = bias + np.asarray(ops.convert_to_numpy(norm_before.beta)) @ kernel
    return {"kernel": kernel, "bias": bias}


def embed_context(weights: Weights, shape: DecoderShape, embedding: Any) -> list[Weights]:
    """All that the prompts of one image have in common.

    Args:
      embedding: (grid, grid, C).

    Returns:
      for the input of each layer and of the final attention: base (L, C), what the image gives to the image tokens;
      centered (L, C), base less its mean over the channels; square (L,) float32, the squared length of centered;
      position (L, C), the position and the constant of the image tokens, which all images share.
    """
    position = weights["image_position"]
    base = ops.reshape(embedding, (shape.grid**2, -1)) + weights["no_mask"]
    constant = None
    context = []
    for norm in (*(layer["norm4"] for layer in weights["layers"]), None):
        centered = base - ops.mean(base, axis=-1, keepdims=True)
        context.append(
            {
                "base": base,
                "centered": centered,
                "square": ops.sum(ops.square(ops.cast(centered, "float32")), axis=-1),
                "position": position if constant is None else position + constant,
            }
        )
        if norm is not None:
            base = centered * ops.cast(norm["gamma"], centered.dtype)
            constant = ops.cast(norm["beta"], centered.dtype)
    return context


@dataclass(frozen=True)
class _ImageTokens:
    """The image tokens of N prompts, as the module's docstring writes them.

    Attributes:
      base, position: (L, C), the latter with the constant.
      scale: (N, L) float32, weights: (N, R, L), rows: (N, R, C); None before the first layer, where tokens are base.
      constant: (C,); None before the first layer.
    """

    base: Any
    position: Any
    scale: Any = None
    weights: Any = None
    rows: Any = None
    constant: Any = None

    def dot(self, vectors: Any) -> Any:
        """Inner products of vectors (N, A, C) with each image token and its position: (N, A, L)."""
        if self.scale is None:
            return ops.matmul(vectors, ops.transpose(self.base + self.position))
        scaled = ops.matmul(vectors, ops.transpose(self.base)) * ops.cast(self.scale, vectors.dtype)[:, None]
        through_rows = ops.matmul(ops.matmul(vectors, ops.transpose(self.rows, (0, 2, 1))), self.weights)
        return scaled + ops.matmul(vectors, ops.transpose(self.position)) + through_rows

    def sum(self, shares: Any) -> Any:
        """Sums of the image tokens (without position) with shares (N, A, L) that add up to 1: (N, A, C)."""
        if self.scale is None:
            return ops.matmul(shares, self.base)
        scaled = ops.matmul(shares * ops.cast(self.scale, shares.dtype)[:, None], self.base)
        through_rows = ops.matmul(ops.matmul(shares, ops.transpose(self.weights, (0, 2, 1))), self.rows)
        return scaled + through_rows + self.constant

    def add_and_norm(self, shares: Any, rows: Any, bias: Any, norm: Weights, before: Weights, after: Weights) -> Any:
        """LayerNormalization of the tokens plus sum_r shares[r] * rows[r] + bias.

        Args:
          shares: (N, R, L), rows: (N, R, C), bias: (C,).
          before, after: the image's part of this layer and of the next, from embed_context.
        """
        count, _, positions = shares.shape
        dtype = shares.dtype
        constant = bias if self.constant is None else bias + self.constant
        new_rows = [rows, ops.broadcast_to(constant, (count, 1, rows.shape[-1]))]
        new_weights = [shares, ops.ones((count, 1, positions), dtype)]
        if self.scale is not None:
            new_rows.insert(0, self.rows)
            new_weights.insert(0, self.weights)
        rows, weights = ops.concatenate(new_rows, axis=1), ops.concatenate(new_weights, axis=1)
        rows = rows - ops.mean(rows, axis=-1, keepdims=True)
        scale = ops.ones((1, positions)) if self.scale is None else self.scale

        # |scale * centered + sum_r weights[r] * rows[r]|**2, in float32
        with_base = ops.matmul(rows, ops.transpose(before["centered"]))
        among_rows = ops.matmul(ops.matmul(rows, ops.transpose(rows, (0, 2, 1))), weights)
        products = 2 * scale[:, None] * ops.cast(with_base, "float32") + ops.cast(among_rows, "float32")
        length = ops.square(scale) * before["square"] + ops.sum(ops.cast(weights, "float32") * products, axis=1)
        variance = ops.maximum(length / rows.shape[-1], 0)
        factor = ops.rsqrt(variance + norm["epsilon"])

        return _ImageTokens(
            base=after["base"],
            position=after["position"],
            scale=scale * factor,
            weights=weights * ops.cast(factor, dtype)[:, None],
            rows=rows * ops.cast(norm["gamma"], dtype),
            constant=ops.cast(norm["beta"], dtype),
        )


def predict_iou(weights: Weights, shape: DecoderShape, context: list[Weights], points: Any) -> tuple[Any, ...]:
    """Runs the decoder up to the predicted IoU.

    Args:
      context: of embed_context.
      points: (N, 2) float32 (x, y) in [0, 1] of the frame, one foreground point a prompt.

    Returns:
      predicted IoU (N, 3) float32, and for upscale_masks: mask embeddings (N, 3, C/8) and the image tokens' scale
      (N, L), weights (N, R, L) and rows (N, R, C).
    """
    heads = shape.num_heads
    image = _ImageTokens(context[0]["base"], context[0]["position"])
    tokens = _prompt_tokens(weights, points, context[0]["base"].dtype)
    queries = tokens
    for index, layer in enumerate(weights["layers"]):
        if index == 0:
            queries = _self_attention(layer["self"], queries, queries, heads)
        else:
            queries = queries + _self_attention(layer["self"], queries + tokens, queries, heads)
        queries = layer_norm(layer["norm1"], queries)
        queries = layer_norm(layer["norm2"], queries + _to_image(layer["to_image"], queries + tokens, image, heads))
        queries = layer_norm(layer["norm3"], queries + mlp(layer["mlp"], queries, ops.relu))
        shares, rows = _to_token(layer["to_token"], image, queries + tokens, queries, heads)
        bias = layer["to_token"]["out"]["bias"]
        image = image.add_and_norm(shares, rows, bias, layer["norm4"], context[index], context[index + 1])
    # Mask token 0 and the prompt's own tokens are read no more.
    outputs = [0, *range(2, len(weights["hypernetworks"]) + 2)]
    queries = ops.stack([queries[:, i] for i in outputs], axis=1)
    tokens = ops.stack([tokens[:, i] for i in outputs], axis=1)
    queries = layer_norm(weights["final_norm"], queries + _to_image(weights["final"], queries + tokens, image, heads))
    predicted_iou = mlp(weights["iou_head"], queries[:, 0], ops.relu)[:, 1:]
    embeddings = [mlp(network, queries[:, 1 + i], ops.relu) for i, network in enumerate(weights["hypernetworks"])]
    return ops.cast(predicted_iou, "float32"), ops.stack(embeddings, axis=1), image.scale, image.weights, image.rows


def upscale_masks(
    weights: Weights,
    shape: DecoderShape,
    base: Any,
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
      weights: those under "upscaling" alone, since every argument costs time in every call.
      base: (L, C) of the last element of embed_context.
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
    shared = ops.matmul(base, kernel)
    own = ops.matmul(ops.transpose(token_weights, (0, 2, 1)), ops.matmul(rows, kernel))
    x = shared * ops.cast(scale, kernel.dtype)[:, :, None] + own + weights["first"]["bias"]  # (K, L, 4 * C/4)
    count, pixels, width = x.shape
    x = gelu(layer_norm(weights["norm"], ops.reshape(x, (count, pixels * 4, width // 4))))
    x = gelu(dense(weights["second"], x))  # (K, L * 4, 4 * C/8)
    x = ops.reshape(x, (count, pixels * 16, -1))
    logits = ops.matmul(embeddings, ops.transpose(x, (0, 2, 1)))
    logits = ops.reshape(logits, (count, -1, grid, grid, 2, 2, 2, 2))  # y, x, then (dy, dx) of each upscaling
    logits = ops.transpose(logits, (0, 1, 2, 4, 6, 3, 5, 7))
    return ops.cast(ops.reshape(logits, (count, -1, 4 * grid, 4 * grid)), "float32")


def _prompt_tokens(weights: Weights, points: Any, dtype: str) -> Any:
    """(N, 2) points -> (N, T, C): IoU token, mask tokens, the point, and the padding point SAM adds without a box.

    Positions are encoded in float32: bfloat16 would round coordinates to whole pixels.
    """
    point = weights["point"]
    angles = ops.matmul(2 * points - 1, point["frequencies"]) * np.float32(2 * math.pi)
    encoded = ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1) + point["foreground"]
    count, width = encoded.shape
    outputs = weights["output_tokens"]
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


def _input_side(weights: Weights, heads: int) -> Any:
    """A projection's kernel (C, heads * d) as (heads, d, C): what a head's query is multiplied with to reach C."""
    kernel = weights["kernel"]
    return ops.transpose(ops.reshape(kernel, (kernel.shape[0], heads, -1)), (1, 2, 0))


def _self_attention(weights: Weights, queries: Any, values: Any, heads: int) -> Any:
    """Plain attention among the tokens of a prompt; keys are the queries' inputs."""
    q = _scaled_heads(weights["query"], queries, heads)
    k = _split_heads(dense(weights["key"], queries), heads)
    v = _split_heads(dense(weights["value"], values), heads)
    scores = softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))), axis=-1)
    return dense(weights["out"], _join_heads(ops.matmul(scores, v)))


def _to_image(weights: Weights, queries: Any, image: _ImageTokens, heads: int) -> Any:
    """Token-to-image attention. The keys' bias drops out of the softmax."""
    q = _scaled_heads(weights["query"], queries, heads)
    count, _, tokens, depth = q.shape
    q = ops.reshape(ops.matmul(q, _input_side(weights["key"], heads)[None]), (count, heads * tokens, -1))
    gathered = image.sum(softmax(image.dot(q), axis=-1))
    gathered = ops.reshape(gathered, (count, heads, tokens, -1))
    attended = ops.matmul(gathered, ops.transpose(_input_side(weights["value"], heads), (0, 2, 1))[None])
    attended = attended + ops.reshape(weights["value"]["bias"], (1, heads, 1, depth))
    return dense(weights["out"], _join_heads(attended))


def _to_token(weights: Weights, image: _ImageTokens, keys: Any, values: Any, heads: int) -> tuple[Any, Any]:
    """Image-to-token attention as what it adds to the image tokens: shares (N, H * T, L) of rows (N, H * T, C).

    The output projection's bias is not in it.
    """
    k = _scaled_heads(weights["key"], keys, heads)
    v = _split_heads(dense(weights["value"], values), heads)
    count, _, tokens, depth = k.shape
    projected = ops.reshape(ops.matmul(k, _input_side(weights["query"], heads)[None]), (count, heads * tokens, -1))
    bias = ops.sum(k * ops.reshape(weights["query"]["bias"], (1, heads, 1, depth)), axis=-1, keepdims=True)
    # Scores are (N, heads, T, L), so that the softmax over the tokens runs along contiguous image positions.
    scores = ops.reshape(image.dot(projected), (count, heads, tokens, -1)) + bias
    shares = ops.reshape(softmax(scores, axis=2), (count, heads * tokens, -1))
    out = weights["out"]["kernel"]
    rows = ops.matmul(v, ops.reshape(out, (heads, -1, out.shape[-1]))[None])
    return shares, ops.reshape(rows, (count, heads * tokens, -1))
