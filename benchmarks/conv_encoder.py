"""A convolutional image encoder (transforms/models/sam/conv_encoder.py) in torch, with torch's own convolutions.

For benchmarks.reference: the reference's Sam takes it in place of its ViT. Its normalization is Sam.preprocess's.
"""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np
import torch
from torch import nn

from maskbeam.transforms.models.sam.conv_encoder import ConvEncoderShape, Step, read_encoder


class ConvEncoder(nn.Module):
    """Normalized pixels (B, 3, frame, frame) to an embedding (B, channels, grid, grid); its weights are random."""

    def __init__(self, shape: ConvEncoderShape, encoder: keras.Model) -> None:
        super().__init__()
        self.img_size = shape.frame_size  # named as the reference's
        self.shape = shape
        layers = {step.name: _make_layer(step, encoder.get_layer(step.name)) for step in shape.steps}
        self.layers = nn.ModuleDict({name: layer for name, layer in layers.items() if layer is not None})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        outputs = {self.shape.normalization: x}
        for step in self.shape.steps:
            outputs[step.name] = self._run(step, [outputs[name] for name in step.inputs])
        return outputs[self.shape.steps[-1].name]

    def _run(self, step: Step, inputs: list[torch.Tensor]) -> torch.Tensor:
        x = inputs[0]
        if step.kind in ("Conv2D", "DepthwiseConv2D"):
            layer = self.layers[step.name]
            if step.same:
                rows, columns = (same_padding(side, layer.kernel_size[0], step.stride) for side in x.shape[2:])
                x = nn.functional.pad(x, (*columns, *rows))
            x = layer(x)
            return nn.functional.gelu(x) if step.gelu else x
        if step.kind == "ReLU":
            return nn.functional.relu6(x)
        if step.kind == "Add":
            return torch.stack(inputs).sum(dim=0)
        if step.kind == "LayerNormalization":
            return self.layers[step.name](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return nn.functional.interpolate(x, scale_factor=step.stride, mode="bilinear", align_corners=False)


def _make_layer(step: Step, layer: keras.layers.Layer) -> nn.Module | None:
    """torch's layer of the same shape, if the step has weights."""
    if step.kind == "LayerNormalization":
        return nn.LayerNorm(layer.gamma.shape[0], eps=layer.epsilon)
    if step.kind not in ("Conv2D", "DepthwiseConv2D"):
        return None
    side, _, inputs, outputs = layer.kernel.shape
    if step.kind == "DepthwiseConv2D":
        return nn.Conv2d(inputs, inputs, side, step.stride, groups=inputs)
    return nn.Conv2d(inputs, outputs, side, step.stride)


def same_padding(length: int, side: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis by TensorFlow's SAME: the output has ceil(length / stride) pixels."""
    total = max((int(np.ceil(length / stride)) - 1) * stride + side - length, 0)
    return total // 2, total - total // 2


def build_conv_encoder(encoder: keras.Model) -> tuple[ConvEncoder, list[float], list[float]]:
    """The encoder, and the mean and the deviation for Sam.preprocess, of pixels from 0 to 255."""
    shape, _ = read_encoder(encoder)
    scale, offset = (np.broadcast_to(value, 3).astype(float) for value in (shape.scale, shape.offset))
    return ConvEncoder(shape, encoder), (-255 * offset / scale).tolist(), (255 / scale).tolist()


def conv_encoder_layers(encoder: keras.Model) -> Iterator[tuple[str, keras.layers.Layer]]:
    """The layers that have weights, with their names in a ConvEncoder."""
    for layer in encoder.layers:
        if layer.weights:
            yield f"layers.{layer.name}", layer
