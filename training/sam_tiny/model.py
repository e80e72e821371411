"""The model to train: a SAMBackbone whose image encoder is EfficientNet-Lite0 with a neck, and where its weights start.

The encoder is a functional Keras model of plain layers: the trunk of "EfficientNet" (arXiv:1905.11946) in its Lite form
(ReLU6, no squeeze-and-excitation) with batch normalization folded into its convolutions; features of strides 4 to 32
are brought to stride 16, summed, and mixed by three blocks of ConvNeXt (arXiv:2201.03545).
"""

from __future__ import annotations

import keras
import keras_hub
import numpy as np
from keras import layers

FRAME = 512  # side of the input in pixels
STRIDE = 16
GRID = FRAME // STRIDE
LOW_RES = 4 * GRID  # side of the masks

CHANNELS = 128  # of the embedding and the decoder
DECODER_HEADS = 4
NECK_BLOCKS = 3

# EfficientNet-Lite0: blocks, kernel, stride of the first, expansion, channels of each stage.
STEM = 32
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
FEATURES = {2: 4, 3: 8, 5: 16, 7: 32}  # number of the stage from 1 that ends a resolution: its stride
BATCH_NORM_EPSILON = 1e-3

# (x - 127) / 128 of the ImageNet training, for pixels from 0 to 1.
SCALE, OFFSET = 255 / 128, -127 / 128


def build_encoder(frame: int = FRAME) -> keras.Model:
    """Pixels (B, frame, frame, 3) from 0 to 1 to an embedding (B, frame / 16, frame / 16, CHANNELS)."""
    pixels = keras.Input((frame, frame, 3), name="images")
    x = layers.Rescaling(SCALE, OFFSET, name="rescaling")(pixels)
    x = layers.ReLU(6, name="stem_relu")(layers.Conv2D(STEM, 3, 2, "same", name="stem")(x))
    laterals = []
    block = 0
    for stage, (count, kernel, stride, expansion, channels) in enumerate(STAGES, 1):
        for index in range(count):
            x = _inverted_residual(x, f"block{block}", kernel, stride if index == 0 else 1, expansion, channels)
            block += 1
        if stage in FEATURES:
            laterals.append(_lateral(x, FEATURES[stage]))
    x = layers.LayerNormalization(epsilon=1e-6, name="neck_norm")(layers.Add(name="neck_sum")(laterals))
    for index in range(NECK_BLOCKS):
        x = _mixing_block(x, f"neck{index}")
    x = layers.LayerNormalization(epsilon=1e-6, name="output_norm1")(x)
    x = layers.Conv2D(CHANNELS, 3, 1, "same", name="output_conv")(x)
    x = layers.LayerNormalization(epsilon=1e-6, name="output_norm2")(x)
    return keras.Model(pixels, x, name="image_encoder")


def _inverted_residual(
    x: keras.KerasTensor, name: str, kernel: int, stride: int, expansion: int, channels: int
) -> keras.KerasTensor:
    y = x
    if expansion != 1:
        y = layers.Conv2D(expansion * x.shape[-1], 1, name=f"{name}_expand")(y)
        y = layers.ReLU(6, name=f"{name}_expand_relu")(y)
    y = layers.DepthwiseConv2D(kernel, stride, "same", name=f"{name}_depthwise")(y)
    y = layers.ReLU(6, name=f"{name}_depthwise_relu")(y)
    y = layers.Conv2D(channels, 1, name=f"{name}_project")(y)
    return layers.Add(name=f"{name}_add")([x, y]) if stride == 1 and x.shape[-1] == channels else y


def _lateral(x: keras.KerasTensor, stride: int) -> keras.KerasTensor:
    """Features of a stride at STRIDE and CHANNELS."""
    down = max(STRIDE // stride, 1)
    x = layers.Conv2D(CHANNELS, down, down, name=f"lateral{stride}")(x)
    up = stride // STRIDE
    return layers.UpSampling2D(up, interpolation="bilinear", name=f"upsample{stride}")(x) if up > 1 else x


def _mixing_block(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    y = layers.DepthwiseConv2D(5, 1, "same", name=f"{name}_depthwise")(x)
    y = layers.LayerNormalization(epsilon=1e-6, name=f"{name}_norm")(y)
    y = layers.Conv2D(3 * CHANNELS, 1, activation="gelu", name=f"{name}_expand")(y)
    y = layers.Conv2D(CHANNELS, 1, name=f"{name}_project")(y)
    return layers.Add(name=f"{name}_add")([x, y])


def build_model(seed: int = 0) -> keras_hub.models.SAMBackbone:
    """The SAMBackbone at its start, its trunk without the ImageNet weights."""
    keras.utils.set_random_seed(seed)
    prompt_encoder = keras_hub.layers.SAMPromptEncoder(
        hidden_size=CHANNELS, image_embedding_size=(GRID, GRID), input_image_size=(FRAME, FRAME), mask_in_channels=16
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
        image_encoder=build_encoder(), prompt_encoder=prompt_encoder, mask_decoder=mask_decoder
    )
    if not mask_decoder.built:
        mask_decoder.build()
    _start_decoder(np.random.default_rng(seed), backbone)
    return backbone


def _start_decoder(rng: np.random.Generator, backbone: keras_hub.models.SAMBackbone) -> None:
    """Starts that a small model would take hours to find.

    Query and key projections of the cross attentions are equal and orthogonal, so that a click's position finds itself
    in the image; what prompts write into the image is 0; embeddings are as large as positions; the frequencies of the
    positions go from coarse to fine, where SAM's are all coarse.
    """
    prompts, decoder = backbone.prompt_encoder, backbone.mask_decoder
    for layer in decoder.transformer.layers:
        _tie(rng, layer.cross_attention_token_to_image)
        _tie(rng, layer.cross_attention_image_to_token)
        output = layer.cross_attention_image_to_token.out_proj
        output.kernel.assign(np.zeros(output.kernel.shape, np.float32))
    _tie(rng, decoder.transformer.final_attention_token_to_image)
    for embedding in (
        *(prompts.foreground_point_embed, prompts.background_point_embed, prompts.not_a_point_embed),
        *(prompts.top_left_corner_embed, prompts.bottom_right_corner_embed, decoder.iou_token, decoder.mask_tokens),
    ):
        embedding.embeddings.assign(rng.normal(0, 0.5, embedding.embeddings.shape).astype(np.float32))
    for layer in prompts.mask_downscaler.layers:
        if isinstance(layer, layers.Conv2D):  # with 0, masks of one logit would be 0 in the norms, whose slope is 1000
            layer.bias.assign(rng.normal(0, 1, layer.bias.shape).astype(np.float32))
    no_mask = prompts.no_mask_embed.embeddings
    no_mask.assign(np.zeros(no_mask.shape, np.float32))
    frequencies = prompts.positional_embedding_layer.positional_encoding_gaussian_matrix
    values = rng.normal(size=frequencies.shape) * np.exp(rng.uniform(np.log(0.5), np.log(4), (1, frequencies.shape[1])))
    frequencies.assign(values.astype(np.float32))


def _tie(rng: np.random.Generator, attention: keras.layers.Layer) -> None:
    orthogonal = np.linalg.qr(rng.normal(size=attention.query_proj.kernel.shape))[0] * 1.5
    for projection in (attention.query_proj, attention.key_proj):
        projection.kernel.assign(orthogonal.astype(np.float32))


def load_imagenet(encoder: keras.Model, state: dict[str, np.ndarray]) -> None:
    """Puts ImageNet weights (names of the efficientnet_lite_pytorch package) into the trunk, batch norms folded."""
    _load_folded(encoder.get_layer("stem"), state, "_conv_stem", "_bn0")
    block = 0
    for count, _, _, expansion, _ in STAGES:
        for _ in range(count):
            source, target = f"_blocks.{block}.", f"block{block}_"
            if expansion != 1:
                _load_folded(encoder.get_layer(f"{target}expand"), state, f"{source}_expand_conv", f"{source}_bn0")
            _load_folded(encoder.get_layer(f"{target}depthwise"), state, f"{source}_depthwise_conv", f"{source}_bn1")
            _load_folded(encoder.get_layer(f"{target}project"), state, f"{source}_project_conv", f"{source}_bn2")
            block += 1


def _load_folded(layer: keras.layers.Layer, state: dict[str, np.ndarray], conv: str, norm: str) -> None:
    """A convolution and the batch norm after it as one convolution."""
    scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + BATCH_NORM_EPSILON)
    kernel = state[f"{conv}.weight"] * scale[:, None, None, None]  # (out, in or 1, height, width)
    order = (2, 3, 0, 1) if isinstance(layer, layers.DepthwiseConv2D) else (2, 3, 1, 0)
    layer.kernel.assign(kernel.transpose(order))
    layer.bias.assign(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale)
