"""The model written out for training on a CPU, over the weights of the SAMBackbone (tests compare it with its layers).

- A prompt's projections into heads go to the few tokens instead of to the many pixels: q . (K x) = (K^T q) . x.
- The image of the first decoder layer is shared by the prompts of a frame that have no mask.
- Masks are made on a quarter of their pixels, a lattice that moves from step to step.

Shapes: B frames, P prompts each, N = B * P; S sparse tokens a prompt; L = GRID * GRID image tokens of C channels.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from training.sam_tiny.model import FRAME, GRID, LOW_RES

# Kinds of sparse tokens.
ABSENT, PADDING, BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = range(6)


def normalize(pixels: tf.Tensor, sizes: tf.Tensor) -> tf.Tensor:
    """(B, F, F, 3) uint8 to 0..1; padding is the grey that the encoder's rescaling turns into 0."""
    rows, columns = tf.range(pixels.shape[1])[None, :, None], tf.range(pixels.shape[2])[None, None]
    inside = (rows < sizes[:, 0, None, None]) & (columns < sizes[:, 1, None, None])
    return tf.where(inside[..., None], tf.cast(pixels, tf.float32), 127.0) / 255


def embed_positions(backbone: keras.Model, unit: tf.Tensor) -> tf.Tensor:
    """Places (..., 2) x, y from 0 to 1 as (..., C)."""
    frequencies = backbone.prompt_encoder.positional_embedding_layer.positional_encoding_gaussian_matrix
    frequencies = tf.stop_gradient(tf.convert_to_tensor(frequencies))
    unit = unit * 2 - 1
    angles = 2 * np.pi * (unit[..., :1] * frequencies[0] + unit[..., 1:] * frequencies[1])
    return tf.concat([tf.sin(angles), tf.cos(angles)], axis=-1)


def image_positions(backbone: keras.Model) -> tf.Tensor:
    """(L, C)."""
    middle = (np.arange(GRID, dtype=np.float32) + 0.5) / GRID
    return embed_positions(backbone, tf.constant(np.stack(np.meshgrid(middle, middle), axis=-1).reshape(-1, 2)))


def embed_sparse(backbone: keras.Model, coords: tf.Tensor, kinds: tf.Tensor) -> tf.Tensor:
    """Coordinates (N, S, 2) in pixels of the frame, and their kinds (N, S): (N, S, C)."""
    encoder = backbone.prompt_encoder
    learned = tf.concat(
        [
            tf.zeros((1, encoder.hidden_size)),
            *(
                layer.embeddings.value
                for layer in (
                    *(encoder.not_a_point_embed, encoder.background_point_embed, encoder.foreground_point_embed),
                    *(encoder.top_left_corner_embed, encoder.bottom_right_corner_embed),
                )
            ),
        ],
        axis=0,
    )
    # A product with one-hot rows: the gradient of a gather is slow.
    rows = tf.linalg.matmul(tf.one_hot(tf.reshape(kinds, (-1,)), 6), learned)
    placed = tf.cast(kinds >= BACKGROUND, tf.float32)[..., None]
    return tf.reshape(rows, (*kinds.shape, -1)) + placed * embed_positions(backbone, (coords + 0.5) / FRAME)


def embed_masks(backbone: keras.Model, masks: tf.Tensor, given: tf.Tensor) -> tf.Tensor:
    """Dense embedding (N, L, C) of logits (N, LOW_RES, LOW_RES), that of no mask where not `given` (N,)."""
    first, norm1, _, second, norm2, _, last = backbone.prompt_encoder.mask_downscaler.layers
    count = masks.shape[0]
    x = tf.reshape(masks, (count, GRID, 2, 2, GRID, 2, 2))
    x = tf.reshape(tf.transpose(x, (0, 1, 4, 2, 5, 3, 6)), (count * GRID * GRID * 4, 4))  # of a 2x2 patch
    x = tf.matmul(x, tf.reshape(first.kernel.value, (4, -1))) + first.bias
    x = tf.nn.gelu(norm(x, norm1))
    x = tf.matmul(tf.reshape(x, (count * GRID * GRID, -1)), tf.reshape(second.kernel.value, (-1, second.filters)))
    x = tf.nn.gelu(norm(x + second.bias, norm2))
    x = tf.matmul(x, tf.reshape(last.kernel.value, (-1, last.filters))) + last.bias
    x = tf.reshape(x, (count, GRID * GRID, -1))
    return tf.where(given[:, None, None], x, backbone.prompt_encoder.no_mask_embed.embeddings.value)


def decode(
    backbone: keras.Model,
    image: tf.Tensor,
    coords: tf.Tensor,
    kinds: tf.Tensor,
    masks: tuple[int, ...],
    lattice: tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """SAMMaskDecoder.

    Args:
      image: embedding plus dense prompt embedding, (B, L, C) shared by the prompts of a frame, or (N, L, C).
      coords, kinds: (N, S, 2) and (N, S), those of the first frame first.
      masks: numbers of the masks wanted.
      lattice: () int32 from 0 to 3: masks only on this pixel of each 2x2 of the first upscaling; all if None.

    Returns:
      logits (N, masks, LOW_RES, LOW_RES), half the side on a lattice, and predicted IoU (N, 4).
    """
    decoder = backbone.mask_decoder
    count = coords.shape[0]
    learned = tf.concat([decoder.iou_token.embeddings.value, decoder.mask_tokens.embeddings.value], axis=0)
    sparse = embed_sparse(backbone, coords, kinds)
    prompts = tf.concat([tf.repeat(learned[None], count, axis=0), sparse], axis=1)
    present = tf.concat([tf.ones((count, learned.shape[0]), tf.bool), kinds != ABSENT], axis=1)
    bias = tf.where(present, 0.0, -1e9)  # (N, T)
    positions = image_positions(backbone)
    tokens, pixels = prompts, image
    for layer in decoder.transformer.layers:
        if layer is decoder.transformer.layers[0]:
            tokens = norm(attend_tokens(layer.self_attention, tokens, tokens, bias), layer.layer_norm1)
        else:
            tokens = norm(
                tokens + attend_tokens(layer.self_attention, tokens + prompts, tokens, bias), layer.layer_norm1
            )
        found = look_at_pixels(layer.cross_attention_token_to_image, tokens + prompts, pixels, positions)
        tokens = norm(tokens + found, layer.layer_norm2)
        hidden, _, output = layer.mlp_block.mlp_block.layers
        tokens = norm(tokens + dense(output, tf.nn.relu(dense(hidden, tokens))), layer.layer_norm3)
        told = write_to_pixels(layer.cross_attention_image_to_token, tokens + prompts, tokens, pixels, positions, bias)
        if pixels.shape[0] != count:
            told = tf.reshape(told, (pixels.shape[0], -1, *told.shape[1:]))
            pixels = tf.reshape(pixels[:, None] + told, (count, *told.shape[2:]))
        else:
            pixels = pixels + told
        pixels = norm(pixels, layer.layer_norm4)
    last = decoder.transformer
    found = look_at_pixels(last.final_attention_token_to_image, tokens + prompts, pixels, positions)
    tokens = norm(tokens + found, last.final_layer_norm)
    hyper = tf.stack([mlp(decoder.output_hypernetworks_mlps[mask], tokens[:, 1 + mask]) for mask in masks], axis=1)
    return upscale(decoder, pixels, hyper, lattice), mlp(decoder.iou_prediction_head, tokens[:, 0])


def attend_tokens(attention: keras.layers.Layer, placed: tf.Tensor, values: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """Attention among tokens (N, T, C); bias (N, T) keeps absent ones out."""
    heads = attention.num_heads
    count, length, _ = placed.shape

    def split(layer: keras.layers.Layer, x: tf.Tensor) -> tf.Tensor:
        return tf.transpose(tf.reshape(dense(layer, x), (count, length, heads, -1)), (0, 2, 1, 3))

    queries, keys = split(attention.query_proj, placed), split(attention.key_proj, placed)
    scores = tf.matmul(queries, keys, transpose_b=True) * queries.shape[-1] ** -0.5 + bias[:, None, None]
    out = tf.matmul(tf.nn.softmax(scores), split(attention.value_proj, values))
    return dense(attention.out_proj, tf.reshape(tf.transpose(out, (0, 2, 1, 3)), (count, length, -1)))


def look_at_pixels(
    attention: keras.layers.Layer, tokens: tf.Tensor, pixels: tf.Tensor, positions: tf.Tensor
) -> tf.Tensor:
    """Attention of tokens (N, T, C) to pixels (B or N, L, C). The keys' bias cancels in the softmax."""
    heads, (count, length, channels) = attention.num_heads, tokens.shape
    size = attention.query_proj.kernel.shape[1] // heads
    queries = tf.reshape(dense(attention.query_proj, tokens), (count, length, heads, size)) * size**-0.5
    key_kernel = tf.reshape(attention.key_proj.kernel.value, (channels, heads, size))
    asked = tf.reshape(tf.einsum("nthd,chd->nhtc", queries, key_kernel), (count, heads * length, channels))
    weights = tf.nn.softmax(_scores(asked, pixels, positions))
    found = _grouped(weights, pixels)
    value_kernel = tf.reshape(attention.value_proj.kernel.value, (channels, heads, size))
    found = tf.einsum("nhtc,chd->nthd", tf.reshape(found, (count, heads, length, channels)), value_kernel)
    found = tf.reshape(found, (count, length, heads * size)) + attention.value_proj.bias
    return dense(attention.out_proj, found)


def write_to_pixels(
    attention: keras.layers.Layer,
    placed: tf.Tensor,
    tokens: tf.Tensor,
    pixels: tf.Tensor,
    positions: tf.Tensor,
    bias: tf.Tensor,
) -> tf.Tensor:
    """What an attention of pixels to tokens adds to the pixels: (N, L, C)."""
    heads, (count, length, channels) = attention.num_heads, tokens.shape
    size = attention.query_proj.kernel.shape[1] // heads
    keys = tf.reshape(dense(attention.key_proj, placed), (count, length, heads, size)) * size**-0.5
    query_kernel = tf.reshape(attention.query_proj.kernel.value, (channels, heads, size))
    asked = tf.reshape(tf.einsum("nthd,chd->nhtc", keys, query_kernel), (count, heads * length, channels))
    constant = tf.einsum("nthd,hd->nht", keys, tf.reshape(attention.query_proj.bias.value, (heads, size)))
    scores = tf.reshape(_scores(asked, pixels, positions), (count, heads, length, -1))
    weights = tf.nn.softmax(scores + (constant + bias[:, None])[..., None], axis=2)
    values = tf.reshape(dense(attention.value_proj, tokens), (count, length, heads, size))
    output = tf.reshape(attention.out_proj.kernel.value, (heads, size, channels))
    values = tf.reshape(tf.einsum("nthd,hdc->nhtc", values, output), (count, heads * length, channels))
    weights = tf.reshape(weights, (count, heads * length, -1))
    return tf.matmul(weights, values, transpose_a=True) + attention.out_proj.bias


def _scores(asked: tf.Tensor, pixels: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
    """Products of (N, R, C) with pixels plus positions: (N, R, L)."""
    count, rows, channels = asked.shape
    groups = pixels.shape[0]
    scores = tf.matmul(tf.reshape(asked, (groups, -1, channels)), pixels + positions, transpose_b=True)
    return tf.reshape(scores, (count, rows, -1))


def _grouped(weights: tf.Tensor, pixels: tf.Tensor) -> tf.Tensor:
    """Sums of pixels (B or N, L, C) with weights (N, R, L): (N, R, C)."""
    count, rows, length = weights.shape
    summed = tf.matmul(tf.reshape(weights, (pixels.shape[0], -1, length)), pixels)
    return tf.reshape(summed, (count, rows, -1))


def upscale(decoder: keras.layers.Layer, pixels: tf.Tensor, hyper: tf.Tensor, lattice: tf.Tensor | None) -> tf.Tensor:
    """Logits of masks (N, M, C / 8) on pixels (N, L, C): a transposed convolution of stride 2 is a matrix product."""
    first, norm1, _, second, _ = decoder.output_upscaling.layers
    count, _, channels = pixels.shape
    kernel = tf.reshape(first.kernel.value, (4, first.filters, channels))
    kernel = kernel if lattice is None else tf.gather(kernel, lattice[None])
    corners = kernel.shape[0]
    x = tf.matmul(tf.reshape(pixels, (-1, channels)), tf.reshape(kernel, (-1, channels)), transpose_b=True)
    x = gelu(norm(tf.reshape(x, (-1, first.filters)) + first.bias, norm1))
    kernel = tf.reshape(second.kernel.value, (4 * second.filters, first.filters))
    x = tf.reshape(tf.matmul(x, kernel, transpose_b=True), (-1, second.filters))
    x = tf.reshape(gelu(x + second.bias), (count, -1, second.filters))
    logits = tf.matmul(hyper, x, transpose_b=True)
    side = int(corners**0.5)
    logits = tf.reshape(logits, (count, -1, GRID, GRID, side, side, 2, 2))
    return tf.reshape(tf.transpose(logits, (0, 1, 2, 4, 6, 3, 5, 7)), (count, -1, 2 * side * GRID, 2 * side * GRID))


def on_lattice(masks: tf.Tensor, lattice: tf.Tensor) -> tf.Tensor:
    """The pixels of masks (..., LOW_RES, LOW_RES) that decode gives for a lattice."""
    shape = masks.shape[:-2]
    x = tf.reshape(masks, (-1, GRID, 2, 2, GRID, 2, 2))
    x = tf.gather(tf.gather(x, lattice // 2, axis=2), lattice % 2, axis=4)
    return tf.reshape(x, (*shape, LOW_RES // 2, LOW_RES // 2))


def dense(layer: keras.layers.Layer, x: tf.Tensor) -> tf.Tensor:
    """A Dense layer."""
    flat = tf.matmul(tf.reshape(x, (-1, x.shape[-1])), layer.kernel.value) + layer.bias
    return tf.reshape(flat, (*x.shape[:-1], flat.shape[-1]))


def mlp(block: keras.layers.Layer, x: tf.Tensor) -> tf.Tensor:
    """KerasHub's MLP: Dense layers with ReLU between them."""
    *hidden, last = (layer for layer in block.mlp_block.layers if hasattr(layer, "kernel"))
    for layer in hidden:
        x = tf.nn.relu(dense(layer, x))
    return dense(last, x)


def norm(x: tf.Tensor, layer: keras.layers.Layer) -> tf.Tensor:
    """A LayerNormalization over the last axis."""
    centered = x - tf.reduce_mean(x, axis=-1, keepdims=True)
    variance = tf.reduce_mean(tf.square(centered), axis=-1, keepdims=True)
    return centered * tf.math.rsqrt(variance + layer.epsilon) * layer.gamma + layer.beta


def gelu(x: tf.Tensor) -> tf.Tensor:
    """The exact GELU."""
    return tf.nn.gelu(x)
