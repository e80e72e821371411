"""The few layers that SAM's encoder and decoder share, as functions of their weights.

The networks are written out over KerasHub's weights instead of calling its layers, because the exact rearrangements
that make them fast cut across layer borders. Weights are arguments, never closed over: a closure would bake them into
the compiled program as constants. Only sam*.py import keras.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from keras import ops

Weights = dict[str, Any]  # nested dicts and lists of tensors


def dense_weights(layer: Any) -> Weights:
    """kernel (in, out) and bias (out,) of a Dense layer."""
    kernel = np.asarray(ops.convert_to_numpy(layer.kernel))
    bias = ops.convert_to_numpy(layer.bias) if layer.use_bias else np.zeros(kernel.shape[-1], np.float32)
    return {"kernel": kernel, "bias": np.asarray(bias)}


def norm_weights(layer: Any) -> Weights:
    """gamma, beta (C,) and epsilon () of a LayerNormalization; they stay float32 in every precision."""
    return {
        "gamma": np.asarray(ops.convert_to_numpy(layer.gamma)),
        "beta": np.asarray(ops.convert_to_numpy(layer.beta)),
        "epsilon": np.float32(layer.epsilon),
    }


def mlp_weights(sequential: Any) -> list[Weights]:
    """The Dense layers of a Sequential of Dense and Activation layers."""
    return [dense_weights(layer) for layer in sequential.layers if hasattr(layer, "kernel")]


def dense(weights: Weights, x: Any) -> Any:
    """x @ kernel + bias over the last axis."""
    return ops.matmul(x, weights["kernel"]) + weights["bias"]


def mlp(weights: list[Weights], x: Any, activation: Any) -> Any:
    """Dense layers with an activation between them."""
    for layer in weights[:-1]:
        x = activation(dense(layer, x))
    return dense(weights[-1], x)


def layer_norm(weights: Weights, x: Any) -> Any:
    """LayerNormalization over the last axis, computed in float32, returned in x's dtype."""
    wide = ops.cast(x, "float32")
    centered = wide - ops.mean(wide, axis=-1, keepdims=True)
    variance = ops.mean(ops.square(centered), axis=-1, keepdims=True)
    normalized = centered * ops.rsqrt(variance + weights["epsilon"]) * weights["gamma"] + weights["beta"]
    return ops.cast(normalized, x.dtype)


def softmax(x: Any, axis: int) -> Any:
    """Softmax in float32, returned in x's dtype."""
    return ops.cast(ops.softmax(ops.cast(x, "float32"), axis=axis), x.dtype)


def gelu(x: Any) -> Any:
    """The exact GELU, by erf as torch computes it: ops.gelu goes through erfc, which XLA does ten times as slowly."""
    return 0.5 * x * (1 + ops.erf(x * math.sqrt(0.5)))
