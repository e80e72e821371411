"""Automatic masks as a Labeler: every image is prompted with the same grid of points, whatever its prompts are."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from maskbeam.transforms.masks.amg import AmgConfig, Crop, Sam, prepare_crops, propose_image, select_masks
from maskbeam.transforms.records import ImageMasks, Prompts
from maskbeam.transforms.threads import Submit


class AutomaticLabeler:
    """A Labeler (transforms/labeler.py). What is prepared is the image's crops, the whole image first."""

    images_per_batch = 1

    def __init__(self, sam: Sam, config: AmgConfig) -> None:
        self.keep_candidates = config.keep_candidates
        self._sam = sam
        self._config = config

    def prepare(self, pixels: np.ndarray, prompts: Prompts | None) -> list[Crop]:
        """Raises ValueError if the image is too wide for crops."""
        return prepare_crops(pixels, self._config, self._sam.frame_size)

    def label(self, batch: Sequence[list[Crop]], submit: Submit) -> list[Future[ImageMasks]]:
        """The device has embedded all crops when this returns; the rest is submitted."""
        return [self._label(crops, self._config, submit) for crops in batch]

    def probe(self, pixels: np.ndarray, submit: Submit) -> Future[ImageMasks]:
        """One batch of prompts through all of the model."""
        config = probe_config(self._config)
        return self._label(prepare_crops(pixels, config, self._sam.frame_size), config, submit)

    def halve_batch(self) -> str | None:
        """Halves points_per_batch, of which masks do not depend by more than rounding."""
        before = self._config.points_per_batch
        if before == 1:
            return None
        self._config = replace(self._config, points_per_batch=before // 2)
        return f"points_per_batch is {before // 2} instead of {before}"

    def _label(self, crops: list[Crop], config: AmgConfig, submit: Submit) -> Future[ImageMasks]:
        selected, seconds = propose_image(self._sam, crops, config, submit)
        size_hw = crops[0].box.size_hw  # the first crop is the whole image
        return submit(select_masks, selected, size_hw, config, seconds)


def probe_config(config: AmgConfig) -> AmgConfig:
    """Parameters for the probe: one batch of prompts, all of which give masks, whatever the model thinks of them."""
    return replace(
        config.without_candidates(), points_per_side=4, point_grids=None, crop_n_layers=0, pred_iou_thresh=0.0
    )
