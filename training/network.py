"""KerasHub's SAM written out for training on a CPU: a step takes 1.25 s instead of 2.1 s on two cores.

The weights are those of the SAMBackbone. What differs is how they are used:

- Matrix products are bfloat16 and left to oneDNN, which runs them on AMX; everything between them is float32 within one
  XLA function each (TensorFlow's own norms and GELU take longer than the products).
- The first decoder layer's projections of the image are done once an image, not once a prompt; positions are projected
  apart and added; heads are kept side by side in block-diagonal products of tokens, so that no image is transposed.
- A transposed convolution whose kernel is its stride is a matrix product.

tests/training/test_training.py compares it with the layers.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from maskbeam.transforms.models.sam.encoder import PIXEL_MEAN, PIXEL_STD


def predict(
    model: keras.Model,
    pixels: tf.Tensor,
    sizes: tf.Tensor,
    coords: tf.Tensor,
    is_box: tf.Tensor,
    dtype: tf.DType = tf.float32,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Masks and predicted IoU of B frames with P prompts each, as scenes.Batch holds them.

    Args:
      dtype: of the matrix products.

    Returns:
      (B * P, 4, H, W) low-res logits and (B * P, 4) float32.
    """
    frame = pixels.shape[1]
    rows, columns = tf.range(frame)[None, :, None], tf.range(frame)[None, None]
    inside = (rows < sizes[:, 0, None, None]) & (columns < sizes[:, 1, None, None])
    normal = (tf.cast(pixels, tf.float32) / 255 - PIXEL_MEAN) / PIXEL_STD * tf.cast(inside[..., None], tf.float32)
    embedding = encode(model.image_encoder, normal, dtype)

    encoder = model.prompt_encoder
    sparse = embed_prompts(encoder, tf.reshape(coords, (-1, 2, 2)), tf.reshape(is_box, (-1, 1, 1)))
    positions = encoder.positional_embedding_layer.encode_image(encoder.image_embedding_size)
    image = embedding + encoder.no_mask_embed(tf.range(1))[:, None, None]
    return decode(model.mask_decoder, image, positions, sparse, dtype)


def encode(encoder: keras.Model, images: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """ViTDetBackbone: (B, frame, frame, 3) to (B, grid, grid, C) float32."""
    embed = next(layer for layer in encoder.layers if type(layer).__name__ == "ViTDetPatchingAndEmbedding").projection
    positions = next(layer for layer in encoder.layers if type(layer).__name__ == "AddPositionalEmbedding").pos_embed
    patch, grid = embed.kernel_size[0], images.shape[1] // embed.kernel_size[0]
    patches = tf.nn.space_to_depth(images, patch)
    x = add(product(patches, tf.reshape(embed.kernel, (-1, embed.filters)), dtype), embed.bias + positions)
    for block in encoder.layers:
        if hasattr(block, "attention"):
            window = block.window_partitioning.window_size or grid
            normed = norm(x, block.layer_norm1, dtype)
            x = add(x, attend_image(block.attention, normed, window, dtype))
            hidden, _, output = block.mlp_block.dense_net.layers
            normed = norm(x, block.layer_norm2, dtype)
            x = add(x, dense(output, gelu(product(normed, hidden.kernel, dtype), hidden, dtype), dtype))
    reduce, norm1, convolve, norm2 = encoder.neck.layers
    x = norm(product(x, tf.reshape(reduce.kernel, reduce.kernel.shape[-2:]), dtype), norm1, dtype)
    x = tf.nn.conv2d(x, tf.cast(convolve.kernel, dtype), 1, "SAME")
    return norm(x, norm2, tf.float32)


def attend_image(attention: keras.layers.Layer, x: tf.Tensor, window: int, dtype: tf.DType) -> tf.Tensor:
    """Attention with relative positions within windows: (B, grid, grid, C) to the same.

    Raises:
      ValueError: the grid is not made of whole windows, as SAM's published ones are not.
    """
    images, grid, heads, size = x.shape[0], x.shape[1], attention.num_heads, attention.key_dim
    if grid % window:
        raise ValueError(f"windows of {window} do not fill a grid of {grid}, and padding is not written out here")
    side, pixels = grid // window, window * window
    shape = (images, side, window, side, window, 3, heads, size)
    qkv = tf.transpose(tf.reshape(dense(attention.qkv, x, dtype), shape), (5, 0, 1, 3, 6, 2, 4, 7))
    queries, keys, values = tf.unstack(tf.reshape(qkv, (3, -1, pixels, size)))
    distance = np.arange(window)[:, None] - np.arange(window) + window - 1
    tables = attention.add_decomposed_relative_pe
    rows, columns = (tf.cast(tf.gather(table, distance), dtype) for table in (tables.rel_pos_h, tables.rel_pos_w))
    grid_queries = tf.reshape(queries, (-1, window, window, size))
    by_row = tf.einsum("nyxc,ykc->nyxk", grid_queries, rows)
    by_column = tf.einsum("nyxc,xkc->nyxk", grid_queries, columns)
    scores = tf.matmul(queries, keys, transpose_b=True)
    out = tf.matmul(_softmax_with_positions(scores, by_row, by_column, size**-0.5, dtype), values)
    out = tf.reshape(out, (images, side, side, heads, window, window, size))
    out = tf.reshape(tf.transpose(out, (0, 1, 4, 2, 5, 3, 6)), (images, grid, grid, heads * size))
    return dense(attention.projection, out, dtype)


def embed_prompts(encoder: keras.layers.Layer, coords: tf.Tensor, is_box: tf.Tensor) -> tf.Tensor:
    """SAMPromptEncoder for a click and SAM's padding point, or for a box: (N, 2, 2) x, y to (N, 2, C) float32.

    Its own product of (N, 1, 2, 2) with (2, C / 2) ends TensorFlow 2.21 with "free(): invalid size" on CPUs with AMX.
    """
    size = encoder.input_image_size
    unit = (coords + 0.5) / tf.constant([size[1], size[0]], tf.float32) * 2 - 1
    frequencies = tf.convert_to_tensor(encoder.positional_embedding_layer.positional_encoding_gaussian_matrix)
    angles = 2 * np.pi * (unit[..., :1] * frequencies[0] + unit[..., 1:] * frequencies[1])
    places = tf.concat([tf.sin(angles), tf.cos(angles)], axis=-1)

    def learned(layer: keras.layers.Layer) -> tf.Tensor:
        return layer(tf.range(1))[None]

    foreground, padding = learned(encoder.foreground_point_embed), learned(encoder.not_a_point_embed)
    click = tf.concat([places[:, :1] + foreground, tf.repeat(padding, coords.shape[0], axis=0)], axis=1)
    corners = tf.concat([learned(encoder.top_left_corner_embed), learned(encoder.bottom_right_corner_embed)], axis=1)
    return tf.where(is_box, places + corners, click)


def decode(
    decoder: keras.layers.Layer, image: tf.Tensor, positions: tf.Tensor, prompts: tf.Tensor, dtype: tf.DType
) -> tuple[tf.Tensor, tf.Tensor]:
    """SAMMaskDecoder.

    Args:
      image: (B, H, W, C), image embedding plus dense prompt embedding.
      positions: (H, W, C).
      prompts: (B * P, 2, C), those of the first image first.

    Returns:
      masks (B * P, 4, 4H, 4W) and predicted IoU (B * P, 4), float32.
    """
    images, height, width, channels = image.shape
    count, masks = prompts.shape[0], decoder.num_mask_tokens
    learned = tf.concat([decoder.iou_token(tf.range(1)), decoder.mask_tokens(tf.range(masks))], axis=0)
    prompts = tf.concat([tf.repeat(learned[None], count, axis=0), prompts], axis=1)
    tokens = prompts
    pixels = tf.reshape(image, (images, height * width, channels))  # per image, then per prompt
    positions = tf.reshape(positions, (height * width, channels))
    transformer = decoder.transformer
    for layer in transformer.layers:
        if layer is transformer.layers[0]:
            tokens = norm(layer.self_attention(query=tokens, key=tokens, value=tokens), layer.layer_norm1)
        else:
            placed = tokens + prompts
            attended = layer.self_attention(query=placed, key=placed, value=tokens)
            tokens = norm(tokens + attended, layer.layer_norm1)
        found = look_at_pixels(layer.cross_attention_token_to_image, tokens + prompts, pixels, positions, dtype)
        tokens = norm(tokens + found, layer.layer_norm2)
        hidden, _, output = layer.mlp_block.mlp_block.layers
        tokens = norm(tokens + output(tf.nn.relu(hidden(tokens))), layer.layer_norm3)
        told = tell_pixels(layer.cross_attention_image_to_token, tokens + prompts, tokens, pixels, positions, dtype)
        pixels = add_norm(pixels, told, layer.layer_norm4, dtype)
    found = look_at_pixels(transformer.final_attention_token_to_image, tokens + prompts, pixels, positions, dtype)
    tokens = norm(tokens + found, transformer.final_layer_norm)

    first, norm1, _, second, _ = decoder.output_upscaling.layers
    upscaled = transposed_conv(first, pixels, dtype)  # (N, HW, 4, C / 4)
    upscaled = norm(upscaled + tf.cast(first.bias, dtype), norm1, dtype)
    upscaled = _bias_gelu(upscaled, tf.zeros(first.filters), dtype)
    upscaled = gelu(transposed_conv(second, upscaled, dtype), second, dtype)  # (N, HW, 4, 4, C / 8)
    hyper = tf.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], axis=1)
    upscaled = tf.reshape(upscaled, (count, -1, second.filters))
    logits = tf.matmul(tf.cast(hyper, dtype), upscaled, transpose_b=True)
    logits = tf.reshape(tf.cast(logits, tf.float32), (count, masks, height, width, 2, 2, 2, 2))
    logits = tf.reshape(tf.transpose(logits, (0, 1, 2, 4, 6, 3, 5, 7)), (count, masks, 4 * height, 4 * width))
    return logits, decoder.iou_prediction_head(tokens[:, 0])


def look_at_pixels(
    attention: keras.layers.Layer, tokens: tf.Tensor, pixels: tf.Tensor, positions: tf.Tensor, dtype: tf.DType
) -> tf.Tensor:
    """Attention of tokens to the image.

    Args:
      tokens: (N, T, C).
      pixels: (N, HW, C), or (B, HW, C) while all prompts of an image have the same.

    Returns:
      (N, T, C) float32.
    """
    count, length = tokens.shape[:2]
    heads = attention.num_heads
    queries = spread_heads(attention.query_proj(tokens), heads) * attention.internal_dims**-0.5  # (N, heads T, D)
    keys = product(pixels, attention.key_proj.kernel, dtype)
    keys += tf.cast(attention.key_proj(positions), dtype)
    values = dense(attention.value_proj, pixels, dtype)
    per_image = (pixels.shape[0], -1, queries.shape[-1])  # prompts of an image side by side, if they share the pixels
    scores = tf.matmul(tf.reshape(tf.cast(queries, dtype), per_image), keys, transpose_b=True)
    found = tf.reshape(tf.matmul(_softmax(scores, dtype), values), (count, heads, length, heads, -1))
    found = tf.einsum("nhthd->nthd", tf.cast(found, tf.float32))
    return attention.out_proj(tf.reshape(found, (count, length, -1)))


def tell_pixels(
    attention: keras.layers.Layer,
    tokens: tf.Tensor,
    values: tf.Tensor,
    pixels: tf.Tensor,
    positions: tf.Tensor,
    dtype: tf.DType,
) -> tf.Tensor:
    """Attention of the image to tokens: (N, HW, C) in `dtype`. Arguments as above."""
    count, length = tokens.shape[:2]
    heads, size = attention.num_heads, attention.internal_dims
    keys = spread_heads(attention.key_proj(tokens), heads) * size**-0.5  # (N, heads T, D)
    queries = product(pixels, attention.query_proj.kernel, dtype)
    queries += tf.cast(attention.query_proj(positions), dtype)
    # What a token tells in a head, already projected: (N, heads T, C).
    told = tf.reshape(attention.value_proj(values), (count, length, heads, size))
    kernel = tf.reshape(attention.out_proj.kernel, (heads, size, -1))
    told = tf.reshape(tf.einsum("nthd,hdc->nhtc", told, kernel), (count, heads * length, -1))
    if pixels.shape[0] != count:
        queries = tf.repeat(queries, count // pixels.shape[0], axis=0)
    scores = tf.matmul(queries, tf.cast(keys, dtype), transpose_b=True)
    scores = tf.reshape(scores, (count, -1, heads, length))
    weights = tf.reshape(_softmax(scores, dtype), (count, -1, heads * length))
    return tf.matmul(weights, tf.cast(told, dtype)) + tf.cast(attention.out_proj.bias, dtype)


def spread_heads(x: tf.Tensor, heads: int) -> tf.Tensor:
    """Block-diagonal by head: (N, T, D) to (N, heads T, D), zero outside of each head's channels."""
    count, length, channels = x.shape
    own = np.repeat(np.eye(heads, dtype=np.float32), channels // heads, axis=1)  # (heads, D)
    return tf.reshape(x[:, None] * own[:, None], (count, heads * length, channels))


def transposed_conv(layer: keras.layers.Layer, pixels: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """A 2x2 transposed convolution of stride 2, without bias: (..., C) to (..., 4, C'), the four pixels row by row."""
    kernel = tf.reshape(layer.kernel, (4 * layer.filters, -1))
    return tf.reshape(product(pixels, tf.transpose(kernel), dtype), (*pixels.shape[:-1], 4, layer.filters))


def product(x: tf.Tensor, kernel: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """x @ kernel over the last axis, in `dtype`."""
    flat = tf.reshape(tf.cast(x, dtype), (-1, x.shape[-1]))
    return tf.reshape(tf.matmul(flat, tf.cast(kernel, dtype)), (*x.shape[:-1], kernel.shape[-1]))


def dense(layer: keras.layers.Layer, x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """A Dense layer in `dtype`."""
    return product(x, layer.kernel, dtype) + tf.cast(layer.bias, dtype)


def norm(x: tf.Tensor, layer: keras.layers.Layer, dtype: tf.DType = tf.float32) -> tf.Tensor:
    """A LayerNormalization over the last axis, computed in float32, in `dtype`."""

    @tf.custom_gradient
    def normed(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, Any]:
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            down, scaled = _norm_gradient(x, gamma, upstream, layer.epsilon)
            return down, sum_rows(scaled), sum_rows(upstream)

        return _norm_forward(x, gamma, beta, layer.epsilon, dtype), gradient

    return normed(x, tf.convert_to_tensor(layer.gamma), tf.convert_to_tensor(layer.beta))


def add_norm(pixels: tf.Tensor, told: tf.Tensor, layer: keras.layers.Layer, dtype: tf.DType) -> tf.Tensor:
    """A LayerNormalization of pixels + told: (N, HW, C); pixels may be (B, HW, C), the same for an image's prompts."""
    return norm(_add_shared(pixels, told, dtype), layer, dtype)


def gelu(x: tf.Tensor, layer: keras.layers.Layer, dtype: tf.DType) -> tf.Tensor:
    """GELU of x plus the layer's bias, computed in float32, in `dtype`."""
    return _bias_gelu(x, tf.convert_to_tensor(layer.bias), dtype)


@tf.function(jit_compile=True)
def _norm_gradient(x: tf.Tensor, gamma: tf.Tensor, upstream: tf.Tensor, epsilon: float) -> tuple[tf.Tensor, tf.Tensor]:
    """The gradient by x, and what sums up to that by gamma."""
    wide = tf.cast(x, tf.float32)
    centered = wide - tf.reduce_mean(wide, axis=-1, keepdims=True)
    scale = tf.math.rsqrt(tf.reduce_mean(tf.square(centered), axis=-1, keepdims=True) + epsilon)
    normal, wide_upstream = centered * scale, tf.cast(upstream, tf.float32)
    down = wide_upstream * gamma
    along = tf.reduce_mean(down * normal, axis=-1, keepdims=True)
    down = scale * (down - tf.reduce_mean(down, axis=-1, keepdims=True) - normal * along)
    return tf.cast(down, x.dtype), tf.cast(wide_upstream * normal, upstream.dtype)


@tf.function(jit_compile=True)
def _norm_forward(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float, dtype: tf.DType) -> tf.Tensor:
    x = tf.cast(x, tf.float32)
    centered = x - tf.reduce_mean(x, axis=-1, keepdims=True)
    variance = tf.reduce_mean(tf.square(centered), axis=-1, keepdims=True)
    return tf.cast(centered * tf.math.rsqrt(variance + epsilon) * gamma + beta, dtype)


@tf.function(jit_compile=True)
def _add_shared(pixels: tf.Tensor, told: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    images, length, channels = pixels.shape
    told = tf.reshape(tf.cast(told, tf.float32), (images, -1, length, channels))
    return tf.cast(tf.reshape(tf.cast(pixels, tf.float32)[:, None] + told, (-1, length, channels)), dtype)


@tf.function(jit_compile=True)
def add(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """The sum in float32."""
    return tf.cast(x, tf.float32) + tf.cast(y, tf.float32)


def _bias_gelu(x: tf.Tensor, bias: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    @tf.custom_gradient
    def with_slope(x: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, Any]:
        y, slope = _gelu_and_slope(x, bias, dtype)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            down = _times_slope(upstream, slope)
            return down, sum_rows(down)

        return y, gradient

    return with_slope(x, bias)


def sum_rows(x: tf.Tensor) -> tf.Tensor:
    """Sum over all axes but the last, (C,) float32, as a product with ones: XLA's own takes many times as long."""
    flat = tf.reshape(x, (-1, x.shape[-1]))
    return tf.cast(tf.matmul(tf.ones((1, flat.shape[0]), x.dtype), flat)[0], tf.float32)


@tf.function(jit_compile=True)
def _gelu_and_slope(x: tf.Tensor, bias: tf.Tensor, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """GELU by tanh, which is off by 5e-4, less than bfloat16 is; by erf in float32."""
    x = tf.cast(x, tf.float32) + bias
    inner = tf.tanh(x * (0.7978845608 + 0.0356774081 * x * x))
    y = 0.5 * x * (1 + inner) if dtype == tf.bfloat16 else tf.nn.gelu(x)
    slope = 0.5 * (1 + inner) + 0.5 * x * (1 - inner * inner) * (0.7978845608 + 0.1070322243 * x * x)
    return tf.cast(y, dtype), tf.cast(slope, dtype)


@tf.function(jit_compile=True)
def _times_slope(upstream: tf.Tensor, slope: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.cast(upstream, tf.float32) * tf.cast(slope, tf.float32), upstream.dtype)


@tf.function(jit_compile=True)
def _softmax(scores: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    return tf.cast(tf.nn.softmax(tf.cast(scores, tf.float32)), dtype)


@tf.function(jit_compile=True)
def _softmax_with_positions(
    scores: tf.Tensor, by_row: tf.Tensor, by_column: tf.Tensor, scale: float, dtype: tf.DType
) -> tf.Tensor:
    windows, height, width, _ = by_row.shape
    grid = tf.reshape(tf.cast(scores, tf.float32) * scale, (windows, height, width, height, width))
    grid += tf.cast(by_row, tf.float32)[..., None] + tf.cast(by_column, tf.float32)[..., None, :]
    return tf.cast(tf.nn.softmax(tf.reshape(grid, scores.shape)), dtype)
