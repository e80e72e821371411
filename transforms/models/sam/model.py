"""The model: any SAM preset of KerasHub, compiled for the backend. The only seam to Keras (with sam_*.py).

load_sam(preset) -> Sam, whose methods transforms/masks/amg.py describes (the protocol of the same name). Device shapes
depend on the model and on points_per_batch alone: batches are padded, so one compilation serves every image. Prompts of
any kind have a few more shapes, each compiled when it is first needed: a run of boxes compiles four programs (the image
encoder, two sizes of batches, and the upscaling), a run of all kinds about ten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from maskbeam.transforms.native_stderr import native_stderr_silenced

with native_stderr_silenced():
    import keras
    import keras_hub
    from keras import ops

from maskbeam.transforms.masks.amg import DTYPES
from maskbeam.transforms.masks.prompts import ABSENT
from maskbeam.transforms.models.backend import Programs, compile_for_backend, runs_on_cpu
from maskbeam.transforms.models.check_preset import check_preset
from maskbeam.transforms.models.sam import conv_encoder as sam_conv_encoder
from maskbeam.transforms.models.sam import encoder as sam_encoder
from maskbeam.transforms.models.sam.decoder import (
    embed_context,
    predict_iou,
    predict_prompts,
    read_decoder,
    upscale_masks,
    upscale_pairs,
)
from maskbeam.transforms.models.sam.layers import Weights
from maskbeam.transforms.presets.embedded import PresetError, check_model_name, resolve_preset

# Prompts upscaled in one call: at most so many, so that padding the last call wastes little, and at most so many values
# of the largest intermediate (64 MB), which makes 8 prompts for SAM's published models.
_MAX_UPSCALE_BATCH = 16
_MAX_UPSCALE_VALUES = 2**24

# On a CPU the decoder takes so many prompts at a time, and the upscaling as many as make so many values (1 MB) of the
# largest intermediate: they stay in the cache. With fewer than these, the decoder's products get too small.
_CPU_PROMPTS = 8
_CPU_UPSCALE_VALUES = 2**18

# Prompts of any kind in one call: few, so that a photo with one box does not pay for many, or many. On a CPU many are
# what stays in the cache; an accelerator is as fast with eight as with one.
_CPU_PROMPT_BATCHES = (2, _CPU_PROMPTS)
_PROMPT_BATCHES = (8, 64)

# These stay float32 in every precision: norms are computed in float32, and prompt coordinates need all their digits.
_FLOAT32_WEIGHTS = ("gamma", "beta", "epsilon", "frequencies", "foreground", "padding", "types")


def load_sam(preset: str, dtype: str = "float32") -> Sam:
    """Loads and compiles a model.

    Args:
      preset: an embedded model ("sam_tiny"), a KerasHub preset by name ("sam_base_sa1b"), or the directory or URI of
        one.
      dtype: of the matrix products: "float32" is exact, "bfloat16" and "float16" are faster on accelerators and change
        masks.

    Raises:
      ValueError: unknown dtype.
      PresetError: something that is no SAM preset.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    with native_stderr_silenced():
        return Sam(load_backbone(preset), dtype)


def load_backbone(preset: str) -> keras_hub.models.SAMBackbone:
    """KerasHub's own model of a preset, complete with its mask decoder.

    Raises:
      PresetError: something that is no SAM preset.
    """
    check_model_name(preset)
    source = resolve_preset(preset)
    check_preset(source)
    try:
        # The task, not SAMBackbone: the backbone alone leaves the mask decoder unbuilt and cannot load its weights.
        return keras_hub.models.SAMImageSegmenter.from_preset(source, preprocessor=None).backbone
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise PresetError(
            f"cannot load model {preset}: {first_line}. Its files may not belong together; get or save it again."
        ) from error


@dataclass(frozen=True)
class ScoredPrompts:
    """A batch of prompts through the mask decoder, on the device.

    Attributes:
      count: prompts in the batch; the rows after them are padding.
      iou: (P, 3) tensor; (P, 4) of score_prompts, with mask token 0.
      parts: what the upscaling needs of the image and of the prompts.
    """

    count: int
    iou: Any
    parts: tuple[Any, ...]

    def predicted_iou(self) -> np.ndarray:
        """(count, 3) float32, or (count, 4); waits for the device."""
        return np.asarray(ops.convert_to_numpy(self.iou))[: self.count]


class Sam:
    """A SAM on the device. Implements the protocol maskbeam.transforms.masks.amg.Sam.

    Several threads may use it at once.
    """

    def __init__(self, backbone: Any, dtype: str = "float32") -> None:
        encode_image, encoder_shape, encoder_weights = _read_encoder(backbone.image_encoder)
        decoder_shape, decoder_weights = read_decoder(backbone.prompt_encoder, backbone.mask_decoder)
        self.frame_size = encoder_shape.frame_size
        self.low_size = 4 * decoder_shape.grid
        values = self.low_size**2 * backbone.mask_decoder.embedding_dim // 8
        upscale_batch = max(min(_MAX_UPSCALE_VALUES // values, _MAX_UPSCALE_BATCH), 1)
        score_step, upscale_step = None, upscale_batch
        if runs_on_cpu():
            score_step, upscale_step = _CPU_PROMPTS, max(min(_CPU_UPSCALE_VALUES // values, upscale_batch), 1)
        self._score_step = score_step or 1
        self._upscale_batch = upscale_batch // upscale_step * upscale_step
        self._pairs_batch = upscale_step
        self.prompt_batches: tuple[int, ...] = _CPU_PROMPT_BATCHES if runs_on_cpu() else _PROMPT_BATCHES
        encoder = _to_device(encoder_weights, dtype)
        decoder = _to_device(decoder_weights, dtype)

        def embed(weights: Any, frame: Any, resized_hw: Any) -> Weights:
            encoder, decoder = weights
            return embed_context(decoder, decoder_shape, encode_image(encoder, encoder_shape, frame, resized_hw, dtype))

        def score(weights: Weights, context: Weights, points: Any) -> tuple[Any, ...]:
            some = partial(predict_iou, weights, decoder_shape, context)
            return _in_steps(some, points, score_step or points.shape[0])

        def upscale(weights: Weights, *parts: Any) -> Any:
            *scored, prompts = parts
            return _in_steps(partial(upscale_masks, weights, decoder_shape, *scored), prompts, upscale_step)

        def score_any(weights: Weights, context: Weights, *prompts: Any) -> tuple[Any, ...]:
            return predict_prompts(weights, decoder_shape, context, *prompts)

        def refine(weights: Weights, context: Weights, coords: Any, labels: Any, pairs: Any, *parts: Any) -> Any:
            # All of the batch, padding included, so that the logits never leave the device.
            some = partial(upscale_pairs, weights["upscaling"], decoder_shape, *parts)
            step = upscale_step if pairs.shape[0] % upscale_step == 0 else pairs.shape[0]
            return predict_prompts(weights, decoder_shape, context, coords, labels, _in_steps(some, pairs, step))

        def upscale_some(weights: Weights, *parts: Any) -> Any:
            return upscale_pairs(weights, decoder_shape, *parts)

        self._embed = compile_for_backend(embed, (encoder, decoder))
        self._predict_iou = compile_for_backend(score, decoder)
        self._upscale_masks = compile_for_backend(upscale, decoder["upscaling"])
        self._score_prompts = Programs(score_any, decoder)
        self._refine = Programs(refine, decoder)
        self._upscale_pairs = Programs(upscale_some, decoder["upscaling"])

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> Weights:
        """See maskbeam.transforms.masks.amg.Sam."""
        return self._embed(frame, np.array(resized_hw, np.int32))

    def score(self, context: Weights, points_xy: np.ndarray, points_per_batch: int) -> ScoredPrompts:
        """See maskbeam.transforms.masks.amg.Sam."""
        # SAM prompts the middle of a pixel. In double until the last step, as the reference does.
        points = np.zeros((-(-points_per_batch // self._score_step) * self._score_step, 2))
        points[: len(points_xy)] = (points_xy + 0.5) / self.frame_size
        iou, *parts = self._predict_iou(context, points.astype(np.float32))
        return ScoredPrompts(len(points_xy), iou, (context["upscaling"], *parts))

    def low_res_logits(self, scored: ScoredPrompts, prompts: np.ndarray) -> np.ndarray:
        """See maskbeam.transforms.masks.amg.Sam."""
        logits = np.empty((len(prompts), 3, self.low_size, self.low_size), np.float32)
        _fill(logits, partial(self._upscale_masks, *scored.parts), prompts, self._upscale_batch)
        return logits

    def score_prompts(
        self,
        context: Weights,
        coords_xy: np.ndarray,
        labels: np.ndarray,
        masks: np.ndarray | None,
        batch_size: int,
    ) -> ScoredPrompts:
        """See maskbeam.transforms.masks.amg.Sam."""
        prompts = list(self._to_batch(coords_xy, labels, batch_size))
        if masks is not None:
            padded = np.zeros((batch_size, self.low_size, self.low_size), np.float32)
            padded[: len(masks)] = masks
            prompts.append(padded)
        iou, *parts = self._score_prompts.of(batch_size, labels.shape[1], masks is None)(context, *prompts)
        return ScoredPrompts(len(labels), iou, (context["upscaling"], *parts))

    def refine_prompts(
        self, context: Weights, coords_xy: np.ndarray, labels: np.ndarray, scored: ScoredPrompts, tokens: np.ndarray
    ) -> ScoredPrompts:
        """See maskbeam.transforms.masks.amg.Sam."""
        batch_size, rows = scored.iou.shape[0], scored.parts[-1].shape[1]
        coords, padded_labels = self._to_batch(coords_xy, labels, batch_size)
        pairs = np.zeros((batch_size, 2), np.int32)
        pairs[:, 0] = np.arange(batch_size)
        pairs[: len(tokens), 1] = tokens
        program = self._refine.of(batch_size, labels.shape[1], rows)
        iou, *parts = program(context, coords, padded_labels, pairs, *scored.parts)
        return ScoredPrompts(len(labels), iou, (context["upscaling"], *parts))

    def mask_logits(self, scored: ScoredPrompts, prompts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """See maskbeam.transforms.masks.amg.Sam."""
        logits = np.empty((len(prompts), self.low_size, self.low_size), np.float32)
        program = self._upscale_pairs.of(*scored.parts[-1].shape[:2])
        _fill(logits, partial(program, *scored.parts), np.stack([prompts, tokens], axis=1), self._pairs_batch)
        return logits

    def _to_batch(self, coords_xy: np.ndarray, labels: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates in [0, 1] float32 and labels int32 of a full batch; its last prompts have no token."""
        # As in score: the middle of a pixel, in double until the last step.
        coords = np.zeros((batch_size, *coords_xy.shape[1:]))
        coords[: len(coords_xy)] = (coords_xy + 0.5) / self.frame_size
        padded = np.full((batch_size, labels.shape[1]), ABSENT, np.int32)
        padded[: len(labels)] = labels
        return coords.astype(np.float32), padded


def _fill(logits: np.ndarray, upscale: Callable[[np.ndarray], Any], wanted: np.ndarray, batch: int) -> None:
    """Upscales all that is wanted, in padded batches; all are on their way before the first is waited for."""
    firsts = range(0, len(wanted), batch)
    pending = []
    for first in firsts:
        some = wanted[first : first + batch]
        padded = np.zeros((batch, *wanted.shape[1:]), np.int32)
        padded[: len(some)] = some
        pending.append(upscale(padded))
    for first, part in zip(firsts, pending, strict=True):
        logits[first : first + batch] = ops.convert_to_numpy(part)[: len(wanted) - first]


def _read_encoder(encoder: Any) -> tuple[Callable[..., Any], Any, Weights]:
    """The program of an image encoder, its shape, and its weights (numpy).

    Raises:
      ValueError: it is neither SAM's ViT nor a convolutional network that can be run here.
    """
    if isinstance(encoder, keras_hub.models.ViTDetBackbone):
        return sam_encoder.encode_image, *sam_encoder.read_encoder(encoder)
    return sam_conv_encoder.encode_image, *sam_conv_encoder.read_encoder(encoder)


def _in_steps(function: Callable[[Any], Any], prompts: Any, step: int) -> Any:
    """Calls a function of prompts (P, ...) that gives tensors (P, ...) on `step` prompts at a time; step divides P."""
    count = prompts.shape[0]
    if step >= count:
        return function(prompts)
    stepped = ops.map(function, ops.reshape(prompts, (count // step, step, *prompts.shape[1:])))
    return keras.tree.map_structure(lambda tensor: ops.reshape(tensor, (count, *tensor.shape[2:])), stepped)


def _to_device(weights: Any, dtype: str, name: str = "") -> Any:
    """Nested numpy weights as tensors, in dtype except where float32 is needed."""
    if isinstance(weights, dict):
        return {key: _to_device(value, dtype, key) for key, value in weights.items()}
    if isinstance(weights, list):
        return [_to_device(value, dtype, name) for value in weights]
    return ops.convert_to_tensor(weights, "float32" if name in _FLOAT32_WEIGHTS else dtype)
