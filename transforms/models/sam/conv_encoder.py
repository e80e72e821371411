"""A convolutional image encoder over its weights: a functional Keras model of plain layers.

The layers are those that transforms/models/check_preset.py admits (ENCODER_LAYERS). XLA's own convolutions are slow on
a CPU: here a depthwise convolution is a sum of shifted products, which XLA fuses into one loop over the channels, and
any other one is a matrix product: of the pixels where the kernel is 1x1, of whole patches where the stride is the
kernel, of shifted copies side by side elsewhere. As with SAM's own encoder, padding of the frame is 0 after
normalization, whatever the frame holds there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import ops

from maskbeam.transforms.models.sam.layers import Weights, gelu, layer_norm, norm_weights


@dataclass(frozen=True)
class Step:
    """One layer.

    Attributes:
      name: of the layer and of its weights.
      kind: its class, a key of _SETTINGS.
      inputs: names of the layers it takes.
      stride: of a convolution, or the factor of an upsampling.
      same: whether a convolution pads with zeros as Keras's "same" does.
      gelu: whether GELU follows a convolution.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    stride: int = 1
    same: bool = False
    gelu: bool = False


@dataclass(frozen=True)
class ConvEncoderShape:
    """What the encoder's program depends on beside its weights.

    Attributes:
      frame_size: side of the input in pixels.
      scale, offset: () or (3,) float32, the normalization of pixels from 0 to 1.
      normalization: name of the layer that does it.
      steps: the layers after it, each after those it takes; the last one gives the embedding.
    """

    frame_size: int
    scale: np.ndarray
    offset: np.ndarray
    normalization: str
    steps: tuple[Step, ...]


def read_encoder(encoder: keras.Model) -> tuple[ConvEncoderShape, Weights]:
    """Shape and weights (numpy, by layer) of a functional Keras model: (B, frame, frame, 3) pixels to an embedding.

    Raises:
      ValueError: a layer, or the way it is set up, is not among those that this module runs.
    """
    described = encoder.get_config()["layers"]
    kinds = [layer["class_name"] for layer in described]
    if kinds[:2] != ["InputLayer", "Rescaling"] or kinds.count("InputLayer") != 1 or kinds.count("Rescaling") != 1:
        raise ValueError("the image encoder must start with an InputLayer and one Rescaling, which normalizes pixels")
    frame_size, width, channels = encoder.input_shape[1:]
    if frame_size is None or (width, channels) != (frame_size, 3):
        raise ValueError(f"the image encoder takes {encoder.input_shape[1:]}, expected a square frame of 3 channels")
    normalization, *layers = (encoder.get_layer(layer["name"]) for layer in described[1:])
    steps = tuple(
        _read_step(layer, kind, tuple(_names_taken(description["inbound_nodes"])))
        for layer, kind, description in zip(layers, kinds[2:], described[2:], strict=True)
    )
    scale, offset = (np.asarray(value, np.float32) for value in (normalization.scale, normalization.offset))
    weights = {layer.name: _read_weights(layer) for layer in layers if layer.weights}
    return ConvEncoderShape(frame_size, scale, offset, normalization.name, steps), weights


def _names_taken(inbound_nodes: Any) -> Iterator[str]:
    """Names of the layers whose tensors are in a layer's call, in order, as Keras describes them."""
    if isinstance(inbound_nodes, dict):
        if "keras_history" in inbound_nodes:
            yield inbound_nodes["keras_history"][0]
        inbound_nodes = list(inbound_nodes.values())
    if isinstance(inbound_nodes, list | tuple):
        for value in inbound_nodes:
            yield from _names_taken(value)


# What a layer's configuration must say, beside what Step holds. Kernels and strides are square.
_CONVOLUTION: dict[str, Any] = {"data_format": "channels_last", "dilation_rate": (1, 1), "use_bias": True}
_SETTINGS: dict[str, dict[str, Any]] = {
    "Conv2D": {**_CONVOLUTION, "groups": 1},
    "DepthwiseConv2D": {**_CONVOLUTION, "depth_multiplier": 1, "activation": "linear"},
    "ReLU": {"max_value": 6, "negative_slope": 0, "threshold": 0},
    "Add": {},
    "LayerNormalization": {"axis": (-1,), "center": True, "scale": True, "rms_scaling": False},
    "UpSampling2D": {"data_format": "channels_last", "interpolation": "bilinear"},
}


def _read_step(layer: keras.layers.Layer, kind: str, inputs: tuple[str, ...]) -> Step:
    if kind not in _SETTINGS:
        raise ValueError(f"layer {layer.name} of the image encoder is a {kind}, expected {', '.join(_SETTINGS)}")
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in layer.get_config().items()}
    for name, expected in _SETTINGS[kind].items():
        _check(layer, name, config[name], (expected,))
    step = Step(layer.name, kind, inputs)
    if kind == "UpSampling2D":
        return replace(step, stride=_square(layer, "size", config["size"]))
    if kind not in ("Conv2D", "DepthwiseConv2D"):
        return step
    _square(layer, "kernel_size", config["kernel_size"])
    _check(layer, "padding", config["padding"], ("same", "valid"))
    _check(layer, "activation", config["activation"], ("linear", "gelu"))
    stride = _square(layer, "strides", config["strides"])
    return replace(step, stride=stride, same=config["padding"] == "same", gelu=config["activation"] == "gelu")


def _check(layer: keras.layers.Layer, name: str, value: Any, expected: tuple[Any, ...]) -> None:
    if value not in expected:
        known = " or ".join(str(each) for each in expected)
        raise ValueError(f"layer {layer.name} of the image encoder has {name} {value}, expected {known}")


def _square(layer: keras.layers.Layer, name: str, sides: tuple[int, int]) -> int:
    _check(layer, name, sides, ((sides[0], sides[0]),))
    return sides[0]


def _read_weights(layer: keras.layers.Layer) -> Weights:
    if isinstance(layer, keras.layers.LayerNormalization):
        return norm_weights(layer)
    return {name: np.asarray(ops.convert_to_numpy(getattr(layer, name))) for name in ("kernel", "bias")}


def encode_image(weights: Weights, shape: ConvEncoderShape, frame: Any, resized_hw: Any, dtype: str) -> Any:
    """Image embedding of one frame.

    Args:
      frame: (frame_size, frame_size, 3) uint8.
      resized_hw: (2,) int32, the part of the frame that is image; the rest becomes 0 after normalization.
      dtype: of the matrix products.

    Returns:
      (grid, grid, channels) in dtype.
    """
    x = ops.cast(frame, "float32") / np.float32(255) * shape.scale + shape.offset
    index = ops.arange(shape.frame_size, dtype="int32")
    inside = ops.logical_and((index < resized_hw[0])[:, None], (index < resized_hw[1])[None, :])
    outputs = {shape.normalization: ops.cast(ops.where(inside[:, :, None], x, np.float32(0)), dtype)}
    for step in shape.steps:
        outputs[step.name] = _run(step, weights.get(step.name, {}), [outputs[name] for name in step.inputs])
    return outputs[shape.steps[-1].name]


def _run(step: Step, weights: Weights, inputs: list[Any]) -> Any:
    """The output of one layer, of tensors (H, W, C)."""
    x = inputs[0]
    if step.kind == "Conv2D":
        x = _convolve(step, weights, x)
        return gelu(x) if step.gelu else x
    if step.kind == "DepthwiseConv2D":
        kernel = weights["kernel"][..., 0]
        met = _shifted(step, x, kernel.shape[0])
        return sum((pixels * kernel[place] for place, pixels in met), weights["bias"])
    if step.kind == "ReLU":
        return ops.clip(x, 0, 6)
    if step.kind == "Add":
        return sum(inputs[1:], x)
    if step.kind == "LayerNormalization":
        return layer_norm(weights, x)
    size = (x.shape[0] * step.stride, x.shape[1] * step.stride)
    resized = ops.image.resize(x, size, interpolation="bilinear", data_format="channels_last")
    return ops.cast(resized, x.dtype)


def _convolve(step: Step, weights: Weights, x: Any) -> Any:
    """A convolution with bias as one matrix product."""
    side, _, channels, filters = weights["kernel"].shape
    height, width = x.shape[:2]
    if side == step.stride and height % side == 0 and width % side == 0:  # whole patches; pixels, if side is 1
        x = ops.reshape(x, (height // side, side, width // side, side, channels))
        x = ops.reshape(ops.transpose(x, (0, 2, 1, 3, 4)), (height // side, width // side, side * side * channels))
    else:
        x = ops.concatenate([pixels for _, pixels in _shifted(step, x, side)], axis=-1)
    return ops.matmul(x, ops.reshape(weights["kernel"], (side * side * channels, filters))) + weights["bias"]


def _shifted(step: Step, x: Any, side: int) -> Iterator[tuple[tuple[int, int], Any]]:
    """For each place of a kernel, row and column, the input pixels (H', W', C) that it meets."""
    stride = step.stride
    pads = [_padding(length, side, stride) if step.same else (0, 0) for length in x.shape[:2]]
    x = ops.pad(x, (*pads, (0, 0)))
    height, width = ((length - side) // stride * stride + 1 for length in x.shape[:2])
    for row in range(side):
        for column in range(side):
            yield (row, column), x[row : row + height : stride, column : column + width : stride]


def _padding(length: int, side: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis, by the rule of "same": as many after it as before it, or one more.

    >>> _padding(8, 3, 1), _padding(8, 3, 2), _padding(7, 3, 2), _padding(8, 1, 2)
    ((1, 1), (0, 1), (1, 1), (0, 0))
    """
    total = max((-(-length // stride) - 1) * stride + side - length, 0)
    return total // 2, total - total // 2
