"""A SAM of a few lines, without weights: masks are discs around the prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from maskbeam.transforms.load_model import ModelConfig


@dataclass(frozen=True)
class FakeScored:
    """Predicted IoU depends on the brightness under the point; the three masks are discs of three sizes."""

    points_xy: np.ndarray
    iou: np.ndarray
    refined: int = 0

    def predicted_iou(self) -> np.ndarray:
        return self.iou


class FakeSam:
    """Implements Sam of maskbeam.transforms.masks.amg on a 64-pixel frame. Other images, other masks.

    A prompt of score_prompts gets a disc, too: around the middle of its foreground points, its box or its mask. Mask 0
    is as sure of itself as mask 1, and a little larger; each refinement makes both surer and the masks a pixel wider.
    """

    frame_size = 64
    low_size = 16
    prompt_batches: tuple[int, ...] = (2, 8)

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> np.ndarray:
        return frame.mean(axis=2)

    def score(self, context: np.ndarray, points_xy: np.ndarray, points_per_batch: int) -> FakeScored:
        x, y = np.clip(points_xy, 0, self.frame_size - 1).astype(int).T
        brightness = context[y, x] / 255
        return FakeScored(points_xy, (0.7 + 0.3 * brightness[:, None] * [1.0, 0.8, 0.6]).astype(np.float32))

    def low_res_logits(self, scored: FakeScored, prompts: np.ndarray) -> np.ndarray:
        grid = (np.arange(self.low_size) + 0.5) * self.frame_size / self.low_size
        points = scored.points_xy[prompts]
        distance = np.hypot(
            grid[None, :, None] - points[:, 1, None, None], grid[None, None, :] - points[:, 0, None, None]
        )
        radii = np.array([8.0, 14.0, 24.0])[None, :, None, None]
        return ((radii - distance[:, None]) * 2).astype(np.float32)

    def score_prompts(
        self,
        context: np.ndarray,
        coords_xy: np.ndarray,
        labels: np.ndarray,
        masks: np.ndarray | None,
        batch_size: int,
    ) -> FakeScored:
        assert batch_size in self.prompt_batches and len(labels) <= batch_size
        given = [None] * len(labels) if masks is None else masks
        centres = np.array([self._centre(*prompt) for prompt in zip(coords_xy, labels, given, strict=True)])
        return FakeScored(centres, self._all_iou(context, centres))

    def refine_prompts(
        self,
        context: np.ndarray,
        coords_xy: np.ndarray,
        labels: np.ndarray,
        scored: FakeScored,
        tokens: np.ndarray,
    ) -> FakeScored:
        return FakeScored(scored.points_xy, scored.iou + np.float32(0.01), scored.refined + 1)

    def mask_logits(self, scored: FakeScored, prompts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        three = self.low_res_logits(scored, prompts)
        four = np.concatenate([three[:, :1] + 4, three], axis=1) + 2 * scored.refined
        return four[np.arange(len(prompts)), tokens]

    def _all_iou(self, context: np.ndarray, points_xy: np.ndarray) -> np.ndarray:
        three = self.score(context, points_xy, len(points_xy)).iou
        return np.concatenate([three[:, :1], three], axis=1)

    def _centre(self, coords_xy: np.ndarray, labels: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        real = labels > 0
        if real.any():
            return coords_xy[real].mean(axis=0)
        if mask is not None:
            return (np.argwhere(mask > 0).mean(axis=0)[::-1] + 0.5) * self.frame_size / self.low_size
        return np.full(2, self.frame_size / 2)


def load_fake(config: ModelConfig) -> Any:
    """In place of maskbeam.transforms.load_model.load_model."""
    return FakeSam()


class StoredSam:
    """Answers with stored logits and predicted IoU, crop by crop: everything but the network is under test."""

    def __init__(self, stored: dict[str, np.ndarray], frame_size: int) -> None:
        """
        Args:
          stored: low_res_logits_<crop> (P, 3, low, low) and iou_predictions_<crop> (P, 3), as in tests/golden.
        """
        self._stored = stored
        self._crops = 0
        self._prompts = 0
        self.frame_size = frame_size
        self.low_size = stored["low_res_logits_0"].shape[-1]

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> int:
        self._crops += 1
        self._prompts = 0
        return self._crops - 1

    def score(self, context: int, points_xy: np.ndarray, points_per_batch: int) -> StoredScored:
        batch = slice(self._prompts, self._prompts + len(points_xy))
        self._prompts = batch.stop
        return StoredScored(
            self._stored[f"low_res_logits_{context}"][batch], self._stored[f"iou_predictions_{context}"][batch]
        )

    def low_res_logits(self, scored: StoredScored, prompts: np.ndarray) -> np.ndarray:
        return scored.logits[prompts]


@dataclass(frozen=True)
class StoredScored:
    """What StoredSam gives for a batch."""

    logits: np.ndarray
    iou: np.ndarray

    def predicted_iou(self) -> np.ndarray:
        return self.iou


class StoredPrompts:
    """Answers one prompt with stored logits, whatever is asked."""

    prompt_batches = (1,)

    def __init__(self, logits: np.ndarray, frame_size: int) -> None:
        """
        Args:
          logits: (low, low) float32.
        """
        self._logits = logits
        self.frame_size = frame_size
        self.low_size = len(logits)

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> None:
        pass

    def score_prompts(self, *args: Any) -> StoredScored:
        return StoredScored(self._logits[None], np.zeros((1, 4), np.float32))

    def mask_logits(self, scored: StoredScored, prompts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return scored.logits


class Clock:
    """In place of the module time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now
