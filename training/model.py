"""The model to train: KerasHub's SAM, small, and where its weights start.

Two starts are not random, because they teach a small model in minutes what costs a random one hours:

- The encoder's attention starts local: each head looks at one place beside the query, as a convolution does (d'Ascoli
  et al., "ConViT", 2021). A channel of the query that is constant, set by its bias, turns the relative position tables
  into a fixed pattern; training is free to leave it.
- Query and key projections of the decoder's cross attentions start out equal and orthogonal, so that a click's position
  finds itself in the image.
"""

from __future__ import annotations

import keras
import keras_hub
import numpy as np

from training.scenes import FRAME

PATCH = 8
WIDTH = 192
LAYERS = 6
HEADS = 6
GLOBAL_LAYERS = (2, 5)
WINDOW = 8
CHANNELS = 128
DECODER_HEADS = 4

# Where the heads of a layer look at first: rows and columns beside the query, and how wide (patches).
_PLACES = ((0, 0, 1.0), (0, -1, 0.7), (0, 1, 0.7), (-1, 0, 0.7), (1, 0, 0.7), (0, 0, 3.0))


def build_model(seed: int) -> keras.Model:
    """A SAMBackbone at its start."""
    keras.utils.set_random_seed(seed)
    grid = FRAME // PATCH
    encoder = keras_hub.models.ViTDetBackbone(
        hidden_size=WIDTH,
        num_layers=LAYERS,
        intermediate_dim=4 * WIDTH,
        num_heads=HEADS,
        global_attention_layer_indices=list(GLOBAL_LAYERS),
        patch_size=PATCH,
        num_output_channels=CHANNELS,
        window_size=WINDOW,
        image_shape=(FRAME, FRAME, 3),
    )
    prompt_encoder = keras_hub.layers.SAMPromptEncoder(
        hidden_size=CHANNELS, image_embedding_size=(grid, grid), input_image_size=(FRAME, FRAME), mask_in_channels=16
    )
    mask_decoder = keras_hub.layers.SAMMaskDecoder(
        hidden_size=CHANNELS,
        num_layers=2,
        intermediate_dim=4 * CHANNELS,
        num_heads=DECODER_HEADS,
        embedding_dim=CHANNELS,
        num_multimask_outputs=3,
        iou_head_depth=3,
        iou_head_hidden_dim=CHANNELS,
    )
    backbone = keras_hub.models.SAMBackbone(
        image_encoder=encoder, prompt_encoder=prompt_encoder, mask_decoder=mask_decoder
    )
    if not mask_decoder.built:
        mask_decoder.build()
    rng = np.random.default_rng(seed)
    for layer in encoder.layers:
        if hasattr(layer, "attention"):
            look_around(layer.attention)
        if hasattr(layer, "pos_embed"):
            # Not 0, as KerasHub has it: padding would be 0 in every norm, and its gradient grow a thousandfold in each.
            layer.pos_embed.assign(rng.normal(0, 0.1, layer.pos_embed.shape).astype(np.float32))
    for layer in mask_decoder.transformer.layers:
        tie(rng, layer.cross_attention_token_to_image)
        tie(rng, layer.cross_attention_image_to_token)
    tie(rng, mask_decoder.transformer.final_attention_token_to_image)
    spread_frequencies(rng, prompt_encoder.positional_embedding_layer.positional_encoding_gaussian_matrix)
    return backbone


def look_around(attention: keras.layers.Layer) -> None:
    """Starts each head of an encoder's attention near its place in _PLACES; its other channels stay random."""
    size = attention.key_dim
    tables = [np.array(table) for table in _tables(attention)]
    # All heads share one table, so each has a channel of its own in it.
    kernel, bias = np.array(attention.qkv.kernel), np.array(attention.qkv.bias)
    for head, (row, column, spread) in enumerate(_PLACES[: attention.num_heads]):
        query, key = head * size + head, WIDTH + head * size + head
        kernel[:, query] = kernel[:, key] = 0
        bias[query] = 1
        for table, place in zip(tables, (row, column), strict=True):
            distance = np.arange(len(table)) - len(table) // 2  # query less key
            table[:, head] = np.maximum(-((distance + place) ** 2) / (2 * spread**2), -8)
    attention.qkv.kernel.assign(kernel)
    attention.qkv.bias.assign(bias)
    for weight, table in zip(_tables(attention), tables, strict=True):
        weight.assign(table)


def tie(rng: np.random.Generator, attention: keras.layers.Layer) -> None:
    """Starts an attention's query and key projections at the same orthogonal matrix."""
    inputs, outputs = attention.query_proj.kernel.shape
    orthogonal = np.linalg.qr(rng.normal(size=(inputs, outputs)))[0] * 1.5
    for projection in (attention.query_proj, attention.key_proj):
        projection.kernel.assign(orthogonal.astype(np.float32))


def spread_frequencies(rng: np.random.Generator, matrix: keras.Variable) -> None:
    """Draws the position encoding's frequencies from coarse to fine; SAM's own are all coarse.

    With its standard deviation of 1, places 20 pixels of 256 apart look alike.
    """
    frequencies = rng.normal(size=matrix.shape) * np.exp(rng.uniform(np.log(0.5), np.log(4), (1, matrix.shape[1])))
    matrix.assign(frequencies.astype(np.float32))


def _tables(attention: keras.layers.Layer) -> tuple[keras.Variable, keras.Variable]:
    positions = attention.add_decomposed_relative_pe
    return positions.rel_pos_h, positions.rel_pos_w
