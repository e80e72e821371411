"""SAM's architectures with random weights, and SAM-like answers to take the place of what they put out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from maskbeam.transforms.masks.amg import MASKS_PER_POINT, AmgConfig, Sam, Scored, layer_point_grids
from maskbeam.transforms.masks.frame import resized_hw

# SAM's image encoders (segment_anything/build_sam.py, commit dca509f); what they share is in random_backbone.
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "vit_b": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "global_attention_layer_indices": [2, 5, 8, 11]},
    "vit_h": {
        "hidden_size": 1280,
        "num_layers": 32,
        "num_heads": 16,
        "global_attention_layer_indices": [7, 15, 23, 31],
    },
}

SURVIVING_PROMPTS = 0.6  # of the synthetic answers: prompts with a candidate above pred_iou_thresh


def random_backbone(name: str) -> Any:
    """SAM's true architecture as KerasHub builds it, with KerasHub's initial weights."""
    import keras_hub

    backbone = keras_hub.models.SAMBackbone(
        image_encoder=keras_hub.models.ViTDetBackbone(
            image_shape=(1024, 1024, 3),
            patch_size=16,
            intermediate_dim=4 * RANDOM_MODELS[name]["hidden_size"],
            window_size=14,
            num_output_channels=256,
            **RANDOM_MODELS[name],
        ),
        prompt_encoder=keras_hub.layers.SAMPromptEncoder(
            hidden_size=256, image_embedding_size=(64, 64), input_image_size=(1024, 1024), mask_in_channels=16
        ),
        mask_decoder=keras_hub.layers.SAMMaskDecoder(
            hidden_size=256,
            num_layers=2,
            intermediate_dim=2048,
            num_heads=8,
            embedding_dim=256,
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
    )
    backbone.mask_decoder.build()  # it is no part of the backbone's graph
    return backbone


class Answers:
    """What the mask decoder is made to answer for one photo: SAM-like logits and predicted IoUs, the same each time.

    A mask is an ellipse of log-uniform size somewhere in the image, with smooth and fine noise; its logits fall off
    over a border of random width, and end near +15 and -18 as SAM's do. The predicted IoU is uniform.
    """

    def __init__(self, size_hw: tuple[int, int], frame_size: int, low_size: int, config: AmgConfig) -> None:
        height, width = resized_hw(size_hw, frame_size)
        self._low_size = low_size
        self._image_hw = height * low_size / frame_size, width * low_size / frame_size
        self._stored: np.ndarray | None = None
        self._points = layer_point_grids(config)[0] * (width, height)
        self.predicted_iou = draw_predicted_iou(len(self._points), config.pred_iou_thresh)
        self.surviving_prompts = _surviving(self.predicted_iou, config.pred_iou_thresh)

    def prompts(self, points_xy: np.ndarray) -> np.ndarray:
        """Which prompts of the grid (N, 2) points of the frame are: (N,) int."""
        return np.array([np.abs(self._points - point).sum(axis=1).argmin() for point in points_xy])

    def logits(self, prompts: np.ndarray) -> np.ndarray:
        """(len(prompts), 3, low_size, low_size) float32."""
        if self._stored is not None:
            return self._stored[prompts]
        return np.stack([self._draw(int(prompt)) for prompt in prompts])

    def store(self) -> None:
        """Draws all of them now, so that handing them out takes no time. 0.8 GB for 1024 prompts."""
        self._stored = self.logits(np.arange(len(self.predicted_iou)))

    def _draw(self, prompt: int) -> np.ndarray:
        rng = np.random.default_rng([prompt, 1])
        return np.stack([draw_logits(rng, self._low_size, self._image_hw) for _ in range(MASKS_PER_POINT)])


def draw_predicted_iou(prompts: int, threshold: float) -> np.ndarray:
    """(prompts, 3) float32, uniform up to 1, so that SURVIVING_PROMPTS have one above the threshold.

    Of twenty draws the one with the share that is nearest: few prompts scatter.
    """
    above = 1 - (1 - SURVIVING_PROMPTS) ** (1 / MASKS_PER_POINT)  # of the candidates
    low = 1 - (1 - threshold) / above
    draws = [
        np.random.default_rng(seed).uniform(low, 1, (prompts, MASKS_PER_POINT)).astype(np.float32) for seed in range(20)
    ]
    return min(draws, key=lambda iou: abs(_surviving(iou, threshold) - SURVIVING_PROMPTS))


def _surviving(predicted_iou: np.ndarray, threshold: float) -> float:
    return float((predicted_iou > threshold).any(axis=1).mean())


def draw_logits(rng: np.random.Generator, low_size: int, image_hw: tuple[float, float]) -> np.ndarray:
    """One mask's logits, (low_size, low_size) float32; image_hw is the part that shows the image."""
    unit = low_size / 256
    radius = unit * np.exp(rng.uniform(np.log(6), np.log(110)))
    stretch = np.exp(rng.uniform(-0.6, 0.6))
    angle = rng.uniform(0, np.pi)
    steepness = np.exp(rng.uniform(np.log(0.5), np.log(12))) / unit
    y = (np.arange(low_size, dtype=np.float32) - rng.uniform(0, image_hw[0]))[:, None]
    x = (np.arange(low_size, dtype=np.float32) - rng.uniform(0, image_hw[1]))[None, :]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = np.sqrt((along / (radius * stretch)) ** 2 + (across * stretch / radius) ** 2)
    coarse = Image.fromarray(rng.standard_normal((9, 9), np.float32))
    smooth = np.asarray(coarse.resize((low_size, low_size), Image.Resampling.BICUBIC))
    fine = rng.standard_normal((low_size, low_size), np.float32)
    logits = np.clip((1 - distance) * radius * steepness, -18, 15) + smooth * rng.uniform(0, 2) + 0.2 * fine
    return logits.astype(np.float32)


@dataclass(frozen=True)
class _AnsweredPrompts:
    """A batch through the real decoder, whose answers are replaced."""

    real: Scored
    prompts: np.ndarray
    sam: AnsweringSam

    def predicted_iou(self) -> np.ndarray:
        self.sam.network_iou[self.prompts] = self.real.predicted_iou()
        return self.sam.answers.predicted_iou[self.prompts]


class AnsweringSam:
    """A Sam that does all the work of another one and then gives the synthetic answers, to batches in any order."""

    def __init__(self, sam: Sam, answers: Answers) -> None:
        self._sam = sam
        self.answers = answers
        self.frame_size = sam.frame_size
        self.low_size = sam.low_size
        self.network_iou = np.full_like(answers.predicted_iou, np.nan)

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> Any:
        return self._sam.embed(frame, resized_hw)

    def score(self, context: Any, points_xy: np.ndarray, points_per_batch: int) -> _AnsweredPrompts:
        scored = self._sam.score(context, points_xy, points_per_batch)
        return _AnsweredPrompts(scored, self.answers.prompts(points_xy), self)

    def low_res_logits(self, scored: _AnsweredPrompts, prompts: np.ndarray) -> np.ndarray:
        self._sam.low_res_logits(scored.real, prompts)
        return self.answers.logits(scored.prompts[prompts])
