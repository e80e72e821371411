"""SAM's mask decoder (KerasHub SAMMaskDecoder) over its weights.

The decoder gives every prompt image tokens of its own, L = 4096 of C = 256 channels, and goes over them some twenty
times. They never exist here. All prompts start from the same image tokens, and each layer adds an attention over only
T prompt tokens, 7 for a point or a box, in H = 8 heads of d = 16 channels, so a prompt's image tokens stay a sum of few
terms, exactly up to rounding:

    tokens[l] = scale[l] * (base[l] + sum_r weights[r, l] * rows[r]) + constant

with base (L, C) and constant (C,) shared by all prompts and R = 49 or 98 rows a prompt, H * (T - 1) + 1 a layer. An
attention adds rows (values through the output projection) with its softmax as their weights. Layer normalisation is
linear but for the variance, which follows from the inner products of base and rows; so it changes scale and rows.

A coarse mask as a prompt is 17 rows at the start, the same for all prompts (prompt_encoder.py), so that prompts with
and without masks share all that is the image's.

The cost of that sum grows with R**2. Above MAX_SHARED_SPARSE sparse tokens, image tokens are cheaper written out: from
the first layer on their rows are the C unit vectors, with the tokens themselves, less base, as weights.

What the prompts multiply with the shared parts has only d channels: queries and values of a head. So embed_context
projects base for every head once an image, and a prompt's products with it take d, not C, multiplications a pixel.

And there are two stages: predict_iou (one point a prompt, as the grid has it) and predict_prompts (any prompts) stop
before the upscaling; upscale_masks does the rest for the prompts that passed the filter, for mask tokens 1..3, and
upscale_pairs for one mask token of each.
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
from maskbeam.transforms.models.sam.prompt_encoder import (
    absent_bias,
    embed_masks,
    foreground_tokens,
    prompt_tokens,
    read_prompt_encoder,
)

# Most sparse tokens of a prompt whose image tokens stay a sum. On two CPU cores a prompt of 16 took 66 ms with the sum
# and 81 ms without, one of 24 took 104 and 84 ms.
MAX_SHARED_SPARSE = 16


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
    weights = read_prompt_encoder(prompt_encoder) | {
        "image_position": np.asarray(ops.convert_to_numpy(position.encode_image((grid, grid)))).reshape(
            grid * grid, -1
        ),
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
        "hypernetworks": [mlp_weights(network.mlp_block) for network in decoder.output_hypernetworks_mlps],
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
      values: (N, H, T - 1, d) of each layer; none if the tokens are written out.
      mask_rows: how many of the rows are those of the coarse masks. They come first, alike for all prompts.
    """

    scale: Any
    weights: Any
    rows: Any
    values: tuple[Any, ...]
    mask_rows: int = 0


def predict_iou(weights: Weights, shape: DecoderShape, context: Weights, points: Any) -> tuple[Any, ...]:
    """Runs the decoder up to the predicted IoU, for the grid: mask token 0, SAM's single-mask answer, is not read.

    Args:
      context: of embed_context.
      points: (N, 2) float32 (x, y) in [0, 1] of the frame, one foreground point a prompt.

    Returns:
      predicted IoU (N, 3) float32, and for upscale_masks: mask embeddings (N, 3, C/8) and the image tokens' scale
      (N, L), weights (N, R, L) and rows (N, R, C).
    """
    return _decode(weights, shape, context, foreground_tokens(weights, points), first_mask=1)


def predict_prompts(
    weights: Weights, shape: DecoderShape, context: Weights, coords: Any, labels: Any, masks: Any = None
) -> tuple[Any, ...]:
    """Runs the decoder up to the predicted IoU, for prompts of any kind.

    Args:
      context: of embed_context.
      coords: (N, K, 2) float32 (x, y) in [0, 1] of the frame.
      labels: (N, K) int32, see prompt_encoder.py.
      masks: (N, 4 * grid, 4 * grid) float32 logits in the model's frame, one a prompt; None = no prompt has one.

    Returns:
      as predict_iou, of all four masks, for upscale_pairs.
    """
    tokens = prompt_tokens(weights, coords, labels)
    bias = absent_bias(labels, tokens.shape[1] - labels.shape[1], tokens.dtype)
    image = None if masks is None else _mask_tokens(weights, masks)
    write_out = labels.shape[1] > MAX_SHARED_SPARSE
    return _decode(weights, shape, context, tokens, 0, bias, image, write_out)


def _mask_tokens(weights: Weights, masks: Any) -> _ImageTokens:
    """The image tokens that prompts with coarse masks start from."""
    mask_weights = embed_masks(weights, masks)
    count, _, positions = mask_weights.shape
    rows = weights["mask_rows"]
    shared = ops.broadcast_to(rows[None], (count, *rows.shape))
    return _ImageTokens(ops.ones((count, positions)), mask_weights, shared, (), mask_rows=rows.shape[0])


def _decode(
    weights: Weights,
    shape: DecoderShape,
    context: Weights,
    tokens: Any,
    first_mask: int,
    bias: Any = None,
    image: _ImageTokens | None = None,
    write_out: bool = False,
) -> tuple[Any, ...]:
    """The decoder up to the predicted IoU, as predict_iou returns it, for the masks from first_mask on.

    Args:
      tokens: (N, T, C).
      bias: (N, T), added where tokens are the keys of an attention: -1e30 takes one out. Image tokens need none, since
        the queries of an attention do not see each other. None: no token is absent.
      image: what the prompts' image tokens start from; None: from the image alone.
      write_out: see the module's docstring.
    """
    heads = shape.num_heads
    queries = tokens
    for index, (layer, tables) in enumerate(zip(weights["layers"], context["layers"], strict=True)):
        if index == 0:
            queries = _self_attention(layer["self"], queries, queries, heads, bias)
        else:
            queries = queries + _self_attention(layer["self"], queries + tokens, queries, heads, bias)
        queries = layer_norm(layer["norm1"], queries)
        attended = _to_image(layer["to_image"], tables["to_image"], queries + tokens, image, heads)
        queries = layer_norm(layer["norm2"], queries + attended)
        queries = layer_norm(layer["norm3"], queries + mlp(layer["mlp"], queries, ops.relu))
        image = _to_token(layer, tables, image, queries + tokens, queries, heads, bias, write_out)
    assert image is not None  # SAM has two layers
    # The other mask tokens and the prompt's own tokens are read no more.
    hypernetworks = weights["hypernetworks"][first_mask:]
    outputs = [0, *range(1 + first_mask, 1 + first_mask + len(hypernetworks))]
    queries = ops.stack([queries[:, i] for i in outputs], axis=1)
    tokens = ops.stack([tokens[:, i] for i in outputs], axis=1)
    attended = _to_image(weights["final"], context["final"], queries + tokens, image, heads)
    queries = layer_norm(weights["final_norm"], queries + attended)
    predicted_iou = mlp(weights["iou_head"], queries[:, 0], ops.relu)[:, first_mask:]
    embeddings = [mlp(network, queries[:, 1 + i], ops.relu) for i, network in enumerate(hypernetworks)]
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
    parts = (ops.take(part, prompts, axis=0) for part in (embeddings, scale, token_weights, rows))
    return _upscale(weights, shape, shared, *parts)


def upscale_pairs(
    weights: Weights,
    shape: DecoderShape,
    shared: Any,
    embeddings: Any,
    scale: Any,
    token_weights: Any,
    rows: Any,
    pairs: Any,
) -> Any:
    """Mask logits of one mask token of each of some prompts.

    Args:
      weights, shared: as in upscale_masks.
      embeddings (N, 4, C/8), scale, token_weights, rows: of predict_prompts.
      pairs: (K, 2) int32: row of the batch, and mask token from 0 to 3.

    Returns:
      (K, 4 * grid, 4 * grid) float32.
    """
    prompts, tokens = pairs[:, 0], pairs[:, 1]
    count, masks, width = embeddings.shape
    chosen = ops.take(ops.reshape(embeddings, (count * masks, width)), prompts * masks + tokens, axis=0)[:, None]
    parts = (ops.take(part, prompts, axis=0) for part in (scale, token_weights, rows))
    return _upscale(weights, shape, shared, chosen, *parts)[:, 0]


def _upscale(
    weights: Weights, shape: DecoderShape, shared: Any, embeddings: Any, scale: Any, token_weights: Any, rows: Any
) -> Any:
    """Mask logits (K, M, 4 * grid, 4 * grid) of K prompts, for embeddings (K, M, C/8)."""
    grid = shape.grid
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


def _self_attention(weights: Weights, queries: Any, values: Any, heads: int, bias: Any) -> Any:
    """Plain attention among the tokens of a prompt; keys are the queries' inputs. For bias see _decode."""
    q = _scaled_heads(weights["query"], queries, heads)
    k = _split_heads(dense(weights["key"], queries), heads)
    v = _split_heads(dense(weights["value"], values), heads)
    logits = ops.matmul(q, ops.transpose(k, (0, 1, 3, 2)))
    if bias is not None:
        logits = logits + bias[:, None, None]
    return dense(weights["out"], _join_heads(ops.matmul(softmax(logits, axis=-1), v)))


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


def _to_token(
    layer: Weights,
    tables: Weights,
    image: _ImageTokens | None,
    keys: Any,
    values: Any,
    heads: int,
    bias: Any,
    write_out: bool,
) -> _ImageTokens:
    """Image-to-token attention and the layer normalisation after it. For bias and write_out see _decode.

    A softmax over T tokens is that over the differences from the first: T - 1 logits and T - 1 values. The first one,
    the IoU token, is never absent.
    """
    weights = layer["to_token"]
    k = _scaled_heads(weights["key"], keys, heads)
    v = _split_heads(dense(weights["value"], values), heads)
    logits = _logits(k[:, :, 1:] - k[:, :, :1], tables["to_token"], weights["query"], image)
    if bias is not None:
        logits = logits + bias[:, None, 1:, None]
    shares = _softmax_beside_zero(logits)
    row = dense(weights["out"], _join_heads(v[:, :, :1])) + tables["constant"]
    add_and_norm = _write_out if write_out else _add_and_norm
    return add_and_norm(image, shares, v[:, :, 1:] - v[:, :, :1], row, layer, tables)


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
    first = image.mask_rows if image is not None else 0
    if first:
        of_masks = ops.matmul(rows[:1, :first], ops.transpose(tables["centered"]))
        with_base.append(ops.broadcast_to(of_masks, (count, first, positions)))
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
        mask_rows=image.mask_rows if image is not None else 0,
    )


def _write_out(
    image: _ImageTokens | None, shares: Any, values: Any, row: Any, layer: Weights, tables: Weights
) -> _ImageTokens:
    """As _add_and_norm, but the image tokens are written out. What the next layer has as base and constant is known."""
    count, _, _, positions = shares.shape
    x = tables["centered"]  # the mean that it lacks would be removed below
    if image is not None:
        own = ops.matmul(ops.transpose(image.weights, (0, 2, 1)), image.rows)
        x = ops.cast(image.scale, own.dtype)[..., None] * (x + own)
    gathered = _join_heads(ops.matmul(ops.transpose(shares, (0, 1, 3, 2)), values))
    x = layer_norm(layer["norm4"], x + ops.matmul(gathered, layer["to_token"]["out"]["kernel"]) + row)
    gamma, beta = (ops.cast(layer["norm4"][name], x.dtype) for name in ("gamma", "beta"))
    own = ops.transpose(x - (tables["centered"] * gamma + beta), (0, 2, 1))
    unit = ops.eye(x.shape[-1], dtype=x.dtype)
    rows = ops.broadcast_to(unit[None], (count, *unit.shape))
    return _ImageTokens(ops.ones((count, positions)), own, rows, values=())
