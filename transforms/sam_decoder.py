"""SAM's prompt encoder and mask decoder (KerasHub SAMPromptEncoder, SAMMaskDecoder) over their weights.

All prompts of a crop share one image embedding and none has a mask prompt. That allows, exactly up to rounding,
 - hoisting: everything before a prompt first changes the image tokens is done once an image (embed_context);
 - absorbing: a prompt has 7 tokens x 8 heads = 56 rows where the image has 4096 tokens x 256 channels, so tokens are
   projected through the weights instead of the image tokens: q.(Wk k) = (Wk' q).k, sum a(Wv k) = Wv sum(a k),
   (a V) Wo = a (V Wo);
 - two stages: predict_iou stops before the upscaling; upscale_masks does the rest for the prompts that passed the
   filter, and only for mask tokens 1..3.
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
        "upscale1": _read_upscaling(upscaling[0]),
        "upscale_norm": norm_weights(upscaling[1]),
        "upscale2": _read_upscaling(upscaling[3]),
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
    bias = np.asarray(ops.convert_to_numpy(layer.bias))
    return {"kernel": kernel.transpose(3, 0, 1, 2).reshape(kernel.shape[3], -1), "bias": np.tile(bias, 4)}


def embed_context(weights: Weights, shape: DecoderShape, embedding: Any) -> Weights:
    """All that the prompts of one image have in common.

    Args:
      embedding: (grid, grid, C).

    Returns:
      image (L, C): image tokens with the no-mask embedding, L = grid**2; image_with_position (L, C); and of the first
      layer the keys and values of token-to-image and the queries of image-to-token attention, each (heads, L, d).
    """
    image = ops.reshape(embedding, (shape.grid**2, -1)) + weights["no_mask"]
    with_position = image + weights["image_position"]
    first = weights["layers"][0]

    def heads(x: Any) -> Any:
        return ops.transpose(ops.reshape(x, (shape.grid**2, shape.num_heads, -1)), (1, 0, 2))

    return {
        "image": image,
        "image_with_position": with_position,
        "keys": heads(dense(first["to_image"]["key"], with_position)),
        "values": heads(dense(first["to_image"]["value"], image)),
        "queries": heads(dense(first["to_token"]["query"], with_position)),
    }


def predict_iou(weights: Weights, shape: DecoderShape, context: Weights, points: Any) -> tuple[Any, Any, Any]:
    """Runs the decoder up to the predicted IoU.

    Args:
      context: of embed_context.
      points: (N, 2) float32 (x, y) in [0, 1] of the frame, one foreground point a prompt.

    Returns:
      predicted IoU (N, 3) float32, mask embeddings (N, 3, C/8), image tokens (N, L, C).
    """
    heads = shape.num_heads
    position = weights["image_position"][None]
    tokens = _prompt_tokens(weights, points, context["image"].dtype)
    queries, image, with_position = tokens, context["image"][None], context["image_with_position"][None]
    for index, layer in enumerate(weights["layers"]):
        if index == 0:
            queries = _self_attention(layer["self"], queries, queries, heads)
        else:
            queries = queries + _self_attention(layer["self"], queries + tokens, queries, heads)
        queries = layer_norm(layer["norm1"], queries)
        if index == 0:
            attended = _first_to_image(layer["to_image"], queries + tokens, context["keys"], context["values"], heads)
        else:
            attended = _to_image(layer["to_image"], queries + tokens, with_position, image, heads)
        queries = layer_norm(layer["norm2"], queries + attended)
        queries = layer_norm(layer["norm3"], queries + mlp(layer["mlp"], queries, ops.relu))
        if index == 0:
            update = _first_to_token(layer["to_token"], context["queries"], queries + tokens, queries, heads)
        else:
            update = _to_token(layer["to_token"], with_position, queries + tokens, queries, heads)
        image = layer_norm(layer["norm4"], image + update)
        with_position = image + position
    # Mask token 0 and the prompt's own tokens are read no more.
    outputs = [0, *range(2, len(weights["hypernetworks"]) + 2)]
    queries = ops.stack([queries[:, i] for i in outputs], axis=1)
    tokens = ops.stack([tokens[:, i] for i in outputs], axis=1)
    queries = queries + _to_image(weights["final"], queries + tokens, with_position, image, heads)
    queries = layer_norm(weights["final_norm"], queries)
    predicted_iou = mlp(weights["iou_head"], queries[:, 0], ops.relu)[:, 1:]
    embeddings = [mlp(network, queries[:, 1 + i], ops.relu) for i, network in enumerate(weights["hypernetworks"])]
    return ops.cast(predicted_iou, "float32"), ops.stack(embeddings, axis=1), image


def upscale_masks(weights: Weights, shape: DecoderShape, embeddings: Any, image: Any, prompts: Any) -> Any:
    """Mask logits of some prompts of a batch.

    The transposed convolutions are matrix products whose 2x2 outputs stay beside each other as channels; the pixels are
    put in their places once, in the three channels of the result.

    Args:
      embeddings, image: of predict_iou.
      prompts: (K,) int32 rows of the batch.

    Returns:
      (K, 3, 4 * grid, 4 * grid) float32.
    """
    grid = shape.grid
    x = dense(weights["upscale1"], ops.take(image, prompts, axis=0))  # (K, L, 4 * C/4)
    count, pixels, width = x.shape
    x = gelu(layer_norm(weights["upscale_norm"], ops.reshape(x, (count, pixels * 4, width // 4))))
    x = gelu(dense(weights["upscale2"], x))  # (K, L * 4, 4 * C/8)
    x = ops.reshape(x, (count, pixels * 16, -1))
    logits = ops.matmul(ops.take(embeddings, prompts, axis=0), ops.transpose(x, (0, 2, 1)))
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


def _first_to_image(weights: Weights, queries: Any, keys: Any, values: Any, heads: int) -> Any:
    """Token-to-image attention on the image's own keys and values (heads, L, d): one product a head for all prompts."""
    q = _scaled_heads(weights["query"], queries, heads)
    count, _, tokens, depth = q.shape
    q = ops.reshape(ops.transpose(q, (1, 0, 2, 3)), (heads, count * tokens, depth))
    scores = softmax(ops.matmul(q, ops.transpose(keys, (0, 2, 1))), axis=-1)
    attended = ops.reshape(ops.matmul(scores, values), (heads, count, tokens, depth))
    return dense(weights["out"], _join_heads(ops.transpose(attended, (1, 0, 2, 3))))


def _to_image(weights: Weights, queries: Any, with_position: Any, image: Any, heads: int) -> Any:
    """Token-to-image attention on a prompt's own image tokens (N, L, C). The keys' bias drops out of the softmax."""
    q = _scaled_heads(weights["query"], queries, heads)
    count, _, tokens, depth = q.shape
    q = ops.reshape(ops.matmul(q, _input_side(weights["key"], heads)[None]), (count, heads * tokens, -1))
    scores = softmax(ops.matmul(q, ops.transpose(with_position, (0, 2, 1))), axis=-1)
    gathered = ops.reshape(ops.matmul(scores, image), (count, heads, tokens, -1))
    attended = ops.matmul(gathered, ops.transpose(_input_side(weights["value"], heads), (0, 2, 1))[None])
    attended = attended + ops.reshape(weights["value"]["bias"], (1, heads, 1, depth))
    return dense(weights["out"], _join_heads(attended))


def _first_to_token(weights: Weights, queries: Any, keys: Any, values: Any, heads: int) -> Any:
    """Image-to-token attention with the image's own queries (heads, L, d) -> (N, L, C)."""
    k = _scaled_heads(weights["key"], keys, heads)
    v = _split_heads(dense(weights["value"], values), heads)
    # Scores are (N, heads, T, L), so that the softmax over the tokens runs along contiguous image positions.
    scores = softmax(ops.einsum("nhtd,hld->nhtl", k, queries), axis=2)
    return _token_update(weights, scores, v)


def _to_token(weights: Weights, with_position: Any, keys: Any, values: Any, heads: int) -> Any:
    """Image-to-token attention with a prompt's own image tokens as queries."""
    k = _scaled_heads(weights["key"], keys, heads)
    v = _split_heads(dense(weights["value"], values), heads)
    count, _, tokens, depth = k.shape
    projected = ops.reshape(ops.matmul(k, _input_side(weights["query"], heads)[None]), (count, heads * tokens, -1))
    bias = ops.sum(k * ops.reshape(weights["query"]["bias"], (1, heads, 1, depth)), axis=-1, keepdims=True)
    scores = ops.matmul(projected, ops.transpose(with_position, (0, 2, 1)))
    scores = softmax(ops.reshape(scores, (count, heads, tokens, -1)) + bias, axis=2)
    return _token_update(weights, scores, v)


def _token_update(weights: Weights, scores: Any, values: Any) -> Any:
    """Output of image-to-token attention: scores (N, heads, T, L), values (N, heads, T, d) -> (N, L, C)."""
    count, heads, tokens, positions = scores.shape
    out = weights["out"]["kernel"]
    out = ops.reshape(out, (heads, -1, out.shape[-1]))
    through = ops.reshape(ops.matmul(values, out[None]), (count, heads * tokens, -1))
    scores = ops.transpose(ops.reshape(scores, (count, heads * tokens, positions)), (0, 2, 1))
    return ops.matmul(scores, through) + weights["out"]["bias"]
