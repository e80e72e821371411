"""Presets with a convolutional image encoder, against Keras's own layers called plainly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
from keras import layers, ops

from maskbeam.transforms.masks.frame import resized_hw, to_frame
from maskbeam.transforms.models.check_preset import ENCODER_LAYERS, check_preset
from maskbeam.transforms.models.sam.conv_encoder import _SETTINGS, encode_image, read_encoder
from maskbeam.transforms.models.sam.model import Sam, load_sam
from maskbeam.transforms.presets.embedded import PresetError

pytestmark = pytest.mark.model

FRAME, STRIDE, CHANNELS = 96, 16, 16
GRID = FRAME // STRIDE
SCALE, OFFSET = [2.0, 1.5, 1.8], [-1.0, -0.5, -0.7]


def build_encoder(frame: int = FRAME) -> keras.Model:
    """Every kind of layer and of convolution; sides that strides do not divide, where the frame allows."""
    pixels = keras.Input((frame, frame, 3), name="images")
    x = layers.Rescaling(SCALE, OFFSET, name="rescaling")(pixels)
    x = layers.ReLU(6, name="relu")(layers.Conv2D(8, 3, 2, "same", name="stem")(x))
    x = layers.DepthwiseConv2D(5, 2, "same", name="down")(x)
    fine = layers.Conv2D(12, 1, activation="gelu", name="pointwise")(x)
    coarse = layers.DepthwiseConv2D(3, 2, "same", name="down_again")(fine)
    coarse = layers.Conv2D(CHANNELS, 3, 4, "same", name="far")(coarse)
    x = layers.UpSampling2D(2, interpolation="bilinear", name="up")(coarse)
    x = layers.Add(name="sum")([layers.Conv2D(CHANNELS, 4, 4, name="patches")(fine), x]) if frame == FRAME else x
    x = layers.DepthwiseConv2D(3, 1, "valid" if frame != FRAME else "same", name="mix")(x)
    x = layers.LayerNormalization(epsilon=1e-6, name="norm")(x)
    return keras.Model(pixels, x, name="image_encoder")


def randomize(model: keras.Model) -> None:
    """Random weights, none of which is 0 or 1 everywhere."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if weight.path.endswith(("bias", "beta")):
            weight.assign(rng.normal(0, 0.3, weight.shape))
        elif weight.path.endswith("gamma"):
            weight.assign(rng.normal(1, 0.2, weight.shape))


def build_backbone(encoder: keras.Model) -> keras_hub.models.SAMBackbone:
    prompt_encoder = keras_hub.layers.SAMPromptEncoder(
        hidden_size=CHANNELS, image_embedding_size=(GRID, GRID), input_image_size=(FRAME, FRAME), mask_in_channels=8
    )
    mask_decoder = keras_hub.layers.SAMMaskDecoder(
        **{"hidden_size": CHANNELS, "embedding_dim": CHANNELS, "iou_head_hidden_dim": CHANNELS},
        **{"num_layers": 2, "intermediate_dim": 32, "num_heads": 2},
    )
    backbone = keras_hub.models.SAMBackbone(
        image_encoder=encoder, prompt_encoder=prompt_encoder, mask_decoder=mask_decoder
    )
    if not mask_decoder.built:
        mask_decoder.build()
    return backbone


@pytest.fixture(scope="module")
def backbone() -> keras_hub.models.SAMBackbone:
    keras.utils.set_random_seed(0)
    backbone = build_backbone(build_encoder())
    for part in (backbone.image_encoder, backbone.prompt_encoder, backbone.mask_decoder):
        randomize(part)
    return backbone


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (72, 110, 3), np.uint8)


def plain_input(pixels: np.ndarray, frame: int = FRAME) -> np.ndarray:
    """What Keras's layers take: 0 to 1, padded with what the normalization makes 0."""
    height, width = resized_hw(pixels.shape[:2], frame)
    image = np.broadcast_to(-np.array(OFFSET, np.float32) / np.array(SCALE, np.float32), (1, frame, frame, 3)).copy()
    image[0, :height, :width] = to_frame(pixels, frame)[:height, :width] / np.float32(255)
    return image


def encode(encoder: keras.Model, pixels: np.ndarray, dtype: str = "float32") -> np.ndarray:
    shape, weights = read_encoder(encoder)
    frame = to_frame(pixels, shape.frame_size)
    size_hw = np.array(resized_hw(pixels.shape[:2], shape.frame_size))
    return np.asarray(ops.convert_to_numpy(encode_image(weights, shape, frame, size_hw, dtype)))


@pytest.mark.parametrize("frame", [FRAME, 70, 61])
def test_encoder_equals_keras_layers(frame: int, pixels: np.ndarray) -> None:
    keras.utils.set_random_seed(frame)
    encoder = build_encoder(frame)
    randomize(encoder)
    expected = ops.convert_to_numpy(encoder(plain_input(pixels, frame)))[0]
    assert expected.std() > 0.3
    np.testing.assert_allclose(encode(encoder, pixels), expected, atol=3e-5)


def test_predictions_equal_keras_hubs(backbone: Any, pixels: np.ndarray) -> None:
    sam = Sam(backbone)
    prompts = np.random.default_rng(2).uniform(0, 60, (5, 2))
    sparse = backbone.prompt_encoder(
        points=np.concatenate([prompts[:, None], np.zeros((5, 1, 2))], axis=1).astype(np.float32),
        labels=np.tile(np.array([[1, -1]], np.float32), (5, 1)),
    )
    expected = backbone.mask_decoder(backbone.image_encoder(plain_input(pixels)), **sparse)
    context = sam.embed(to_frame(pixels, FRAME), resized_hw(pixels.shape[:2], FRAME))
    scored = sam.score(context, prompts, points_per_batch=8)
    logits = sam.low_res_logits(scored, np.arange(5))
    assert logits.shape == (5, 3, 4 * GRID, 4 * GRID)
    np.testing.assert_allclose(scored.predicted_iou(), ops.convert_to_numpy(expected["iou_pred"])[:, 1:], atol=3e-5)
    np.testing.assert_allclose(logits, ops.convert_to_numpy(expected["masks"])[:, 1:], atol=3e-4)


def test_content_of_the_padding_does_not_matter(backbone: Any, pixels: np.ndarray) -> None:
    shape, weights = read_encoder(backbone.image_encoder)
    height, width = resized_hw(pixels.shape[:2], FRAME)
    clean = to_frame(pixels, FRAME)
    dirty = np.full_like(clean, 200)
    dirty[:height, :width] = clean[:height, :width]
    of_clean, of_dirty = (
        ops.convert_to_numpy(encode_image(weights, shape, frame, np.array([height, width]), "float32"))
        for frame in (clean, dirty)
    )
    np.testing.assert_array_equal(of_clean, of_dirty)


def test_bfloat16_stays_near(backbone: Any, pixels: np.ndarray) -> None:
    prompts = np.random.default_rng(2).uniform(0, 60, (4, 2))

    def predicted(dtype: str) -> np.ndarray:
        sam = Sam(backbone, dtype)
        context = sam.embed(to_frame(pixels, FRAME), resized_hw(pixels.shape[:2], FRAME))
        return sam.score(context, prompts, 4).predicted_iou()

    difference = np.abs(predicted("bfloat16") - predicted("float32"))
    assert 0 < difference.max() < 0.3


@pytest.fixture(scope="module")
def preset(backbone: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preset")
    converter = keras_hub.layers.SAMImageConverter(image_size=(FRAME, FRAME), scale=1 / 255)
    preprocessor = keras_hub.models.SAMImageSegmenterPreprocessor(image_converter=converter)
    keras_hub.models.SAMImageSegmenter(backbone=backbone, preprocessor=preprocessor).save_to_preset(str(folder))
    return folder


def test_a_preset_is_loaded_as_it_was_saved(preset: Path, backbone: Any, pixels: np.ndarray) -> None:
    prompts = np.random.default_rng(2).uniform(0, 60, (4, 2))

    def predicted(sam: Sam) -> np.ndarray:
        context = sam.embed(to_frame(pixels, FRAME), resized_hw(pixels.shape[:2], FRAME))
        return sam.score(context, prompts, 4).predicted_iou()

    np.testing.assert_array_equal(predicted(load_sam(str(preset))), predicted(Sam(backbone)))


def with_layer(preset: Path, folder: Path, name: str, changes: dict[str, Any]) -> Path:
    """A copy of the preset's configuration with one of the encoder's layers changed; its weights are of no interest."""
    for file in preset.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name_of_file in ("config.json", "task.json"):
        config = json.loads((folder / name_of_file).read_text())
        part = config["config"]["backbone"] if name_of_file == "task.json" else config
        described = part["config"]["image_encoder"]["config"]["layers"]
        (layer,) = (layer for layer in described if layer["name"] == name)
        layer.update(changes)
        (folder / name_of_file).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["Lambda", "TFSMLayer", "TorchModuleWrapper", "Conv3D", "MaxPooling2D"])
def test_a_preset_of_other_layers_is_refused_before_it_is_built(kind: str, preset: Path, tmp_path: Path) -> None:
    changed = with_layer(preset, tmp_path, "relu", {"class_name": kind})
    with pytest.raises(ValueError, match=rf"names keras.layers.{kind}, which is no part of SAM. Nothing of it was run"):
        load_sam(str(changed))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.Conv2D(3, 3, dilation_rate=2, name="odd"), r"odd .* has dilation_rate \(2, 2\)"),
        (lambda: layers.Conv2D(3, 3, activation="relu", name="odd"), "odd .* has activation relu"),
        (lambda: layers.Conv2D(3, (1, 3), name="odd"), r"odd .* has kernel_size \(1, 3\)"),
        (lambda: layers.Conv2D(3, 1, use_bias=False, name="odd"), "odd .* has use_bias False, expected True"),
        (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, name="odd"), "odd .* has depth_multiplier 2"),
        (lambda: layers.ReLU(name="odd"), "odd .* has max_value None, expected 6"),
        (lambda: layers.UpSampling2D(2, name="odd"), "odd .* has interpolation nearest, expected bilinear"),
        (lambda: layers.LayerNormalization(axis=1, name="odd"), r"odd .* has axis \(1,\), expected \(-1,\)"),
        (lambda: layers.MaxPooling2D(name="odd"), "odd .* is a MaxPooling2D, expected Conv2D"),
    ],
)
def test_a_layer_that_is_not_run_here_is_an_error(make: Any, message: str) -> None:
    pixels = keras.Input((32, 32, 3))
    encoder = keras.Model(pixels, make()(layers.Rescaling(1.0)(pixels)))
    with pytest.raises(ValueError, match=message):
        read_encoder(encoder)


def test_what_is_admitted_is_what_is_run() -> None:
    assert {"InputLayer", "Rescaling", *_SETTINGS} == ENCODER_LAYERS


@pytest.mark.parametrize(
    "changes",
    [
        {"build_config": {"input_shape": [None, 96, 96, 2**40]}},
        {"build_config": None},
        {"config": {"filters": 2**40, "kernel_size": [3, 3]}},
    ],
)
def test_a_convolution_larger_than_the_weights_is_refused(
    changes: dict[str, Any], preset: Path, tmp_path: Path
) -> None:
    changed = with_layer(preset, tmp_path, "stem", changes)
    with pytest.raises(PresetError, match="describes a larger model than its weights are of"):
        check_preset(str(changed))


def test_an_encoder_that_does_not_normalize_is_an_error() -> None:
    pixels = keras.Input((32, 32, 3))
    with pytest.raises(ValueError, match="must start with an InputLayer and one Rescaling"):
        read_encoder(keras.Model(pixels, layers.Conv2D(3, 1)(pixels)))


def test_the_references_twin_equals_keras_layers(backbone: Any, pixels: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    sam = pytest.importorskip("benchmarks.reference").build_torch_sam(backbone)
    height, width = resized_hw(pixels.shape[:2], FRAME)
    image = torch.from_numpy(to_frame(pixels, FRAME)[:height, :width]).permute(2, 0, 1).float()
    with torch.no_grad():
        actual = sam.image_encoder(sam.preprocess(image[None]))[0].permute(1, 2, 0).numpy()
    expected = ops.convert_to_numpy(backbone.image_encoder(plain_input(pixels)))[0]
    np.testing.assert_allclose(actual, expected, atol=3e-5)
