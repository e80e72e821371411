"""Prompted masks: one mask for each prompt of an image, in the order of the prompts. Nothing vanishes.

What SamPredictor.predict of facebookresearch/segment-anything (predictor.py, commit dca509f) gives for one prompt, for
many at once: the decoder's work is shared, and a prompt's mask does not depend on the image's other prompts. amg.py is
the same for a grid of points. A prompt that makes no sense is dropped with a reason, and the others go on:

    num_candidates = len(masks) + dropped.total() = number of prompts, of which dropped.prompt are len(dropped_prompts)

With mask="all" each prompt that is not dropped counts four times.

Read top down: label_prompts > prepare_prompts (beside the device) > answer_prompts (on the device, batch by batch).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from maskbeam.transforms.masks import rle
from maskbeam.transforms.masks.amg import ModelOutputError, Sam, Scored
from maskbeam.transforms.masks.candidates import mask_to_runs, measure_mask
from maskbeam.transforms.masks.frame import Upsampling, resized_hw, to_frame
from maskbeam.transforms.masks.prompts import CheckedPrompts, PromptBatch, batch_prompts, check_prompts, mask_to_logits
from maskbeam.transforms.masks.select import check_range
from maskbeam.transforms.records import Dropped, ImageMasks, Mask, Prompts, Seconds
from maskbeam.transforms.threads import Submit, call_now, one_blas_thread

# How SAM 2 asks whether mask 0 is stable (mask_decoder.py, _dynamic_multimask_via_stability): at low resolution.
_STABLE_OFFSET = 0.05
_STABLE_THRESH = 0.98

MaskChoice = Literal["auto", "single", "best", "stable", "all"]


@dataclass(frozen=True)
class PromptedConfig:
    """How prompts are answered. Thresholds are off: whoever annotates wants as many masks as prompts.

    Attributes:
      mask: which of SAM's four masks is the answer. auto: for one foreground point alone, which is ambiguous, the one
        of masks 1 to 3 with the highest predicted IoU; for everything else mask 0, which SAM learned for that. single:
        mask 0. best: of masks 1 to 3 the one with the highest predicted IoU. stable: mask 0 if it is stable, else the
        best, as SAM 2 does. all: all four, four masks a prompt.
      refine_steps: how often the answer goes back in as a mask prompt, beside the points and the box. The answer is
        mask 0 then.
      box_margin: boxes grow on each side by this fraction of their width or height.
      box_of_mask: a coarse mask without a box gets the box around its pixels as a prompt beside it.
      clip_to_box: cut masks off at the box of their prompt.
      pred_iou_thresh: keep masks whose predicted IoU is greater. 0 switches the filter off.
      stability_score_thresh: keep masks at least this stable. 0 switches the filter off.
      stability_score_offset: shift of the threshold, each way, in logits, for the stability score.
      mask_threshold: logit above which a pixel belongs to the mask.
      points_per_batch: prompts decoded at once, at most; a memory knob that masks do not depend on.
    """

    mask: MaskChoice = "auto"
    refine_steps: int = 0
    box_margin: float = 0.0
    box_of_mask: bool = True
    clip_to_box: bool = False
    pred_iou_thresh: float = 0.0
    stability_score_thresh: float = 0.0
    stability_score_offset: float = 1.0
    mask_threshold: float = 0.0
    points_per_batch: int = 64

    def __post_init__(self) -> None:
        if self.mask not in get_args(MaskChoice):
            raise ValueError(f'mask must be one of {", ".join(get_args(MaskChoice))}, got "{self.mask}"')
        if self.mask == "all" and self.refine_steps:
            raise ValueError("mask all has four answers, and refine_steps refines one: leave one of the two out")
        for name in ("pred_iou_thresh", "stability_score_thresh"):
            if not getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a fraction of at most 1, got {getattr(self, name)}")
        if not math.isfinite(self.mask_threshold):
            raise ValueError(f"mask_threshold must be a finite logit, got {self.mask_threshold}")
        check_range(self, "refine_steps", 0, 10)
        check_range(self, "box_margin", 0, 10)
        check_range(self, "stability_score_offset", 0)
        check_range(self, "points_per_batch", 1, 2**20)


@dataclass(frozen=True, eq=False)
class PreparedPrompts:
    """An image and its prompts, ready for the device: decoding threads make these.

    Attributes:
      frame: of the model; None where no prompt is left, so that nothing needs to be embedded.
      size_hw: (H, W) of the image in pixels.
    """

    frame: np.ndarray | None
    size_hw: tuple[int, int]
    checked: CheckedPrompts


@dataclass(frozen=True)
class _Answered:
    """The masks of one batch of prompts, each with its place: index of the prompt and mask token."""

    masks: list[tuple[tuple[int, int], Mask]]
    dropped: Dropped
    seconds: Seconds


def label_prompts(
    sam: Sam, pixels: np.ndarray, prompts: Prompts, config: PromptedConfig = PromptedConfig(), submit: Submit = call_now
) -> ImageMasks:
    """Gives each prompt of one image its mask.

    Args:
      sam: the model, from maskbeam.transforms.models.sam.model.load_sam.
      pixels: (H, W, 3) uint8 RGB.
      prompts: in pixels of this image.
      submit: as in maskbeam.transforms.masks.amg.label_image.
    """
    with one_blas_thread():
        prepared = prepare_prompts(pixels, prompts, config, sam.frame_size)
        return answer_prompts(sam, prepared, config, submit).result()


class PromptedLabeler:
    """Prompted masks as a labeler of chunks. Implements maskbeam.transforms.labeler.Labeler.

    An image without a prompt need not be decoded for this: its answer is known, no mask of no candidate.
    """

    images_per_batch = 1
    keep_candidates = False

    def __init__(self, sam: Sam, config: PromptedConfig) -> None:
        self._sam = sam
        self._config = config

    def prepare(self, pixels: np.ndarray, prompts: Prompts | None) -> PreparedPrompts:
        """See Labeler.prepare. None is taken for no prompts: nothing is embedded."""
        given = Prompts.of_boxes(np.empty((0, 4))) if prompts is None else prompts
        return prepare_prompts(pixels, given, self._config, self._sam.frame_size)

    def label(self, batch: Sequence[PreparedPrompts], submit: Submit) -> list[Future[ImageMasks]]:
        """See Labeler.label."""
        return [answer_prompts(self._sam, prepared, self._config, submit) for prepared in batch]

    def probe(self, pixels: np.ndarray, submit: Submit) -> Future[ImageMasks]:
        """See Labeler.probe: as many boxes as the run decodes at once, whatever the thresholds are."""
        config = replace(self._config, pred_iou_thresh=0.0, stability_score_thresh=0.0)
        count = _batch_sizes(self._sam, config)[-1]
        height, width = pixels.shape[:2]
        boxes = Prompts.of_boxes(np.tile([[width / 4, height / 4, width * 3 / 4, height * 3 / 4]], (count, 1)))
        return answer_prompts(self._sam, prepare_prompts(pixels, boxes, config, self._sam.frame_size), config, submit)

    def halve_batch(self) -> str | None:
        """See Labeler.halve_batch: the next smaller size of batches that the model has, if there is one."""
        sizes = _batch_sizes(self._sam, self._config)
        if len(sizes) == 1:
            return None
        self._config = replace(self._config, points_per_batch=sizes[-2])
        return f"points_per_batch is {sizes[-2]} instead of {sizes[-1]}"


def prepare_prompts(pixels: np.ndarray, prompts: Prompts, config: PromptedConfig, frame_size: int) -> PreparedPrompts:
    """Checks the prompts and resizes the image. Everything after this is done without the image.

    Args:
      pixels: (H, W, 3) uint8 RGB.
    """
    size_hw = pixels.shape[0], pixels.shape[1]
    checked = check_prompts(prompts, size_hw, config.box_margin, config.box_of_mask)
    return PreparedPrompts(to_frame(pixels, frame_size) if len(checked.kept) else None, size_hw, checked)


def answer_prompts(
    sam: Sam, prepared: PreparedPrompts, config: PromptedConfig, submit: Submit = call_now
) -> Future[ImageMasks]:
    """Embeds an image that has prompts, now; the rest of the work is submitted, batch by batch.

    Raises:
      Exception: whatever the model raises as it embeds. What it raises later is the future's.
    """
    start = time.perf_counter()
    batches: list[Future[_Answered]] = []
    if prepared.frame is not None:
        context = sam.embed(prepared.frame, resized_hw(prepared.size_hw, sam.frame_size))
        upsampling = Upsampling.build(prepared.size_hw, sam.low_size, sam.frame_size)
        sizes = _batch_sizes(sam, config)
        batches = [
            submit(_answer_batch, sam, context, batch, prepared, upsampling, config)
            for batch in batch_prompts(prepared.checked, prepared.size_hw, sam.frame_size, sizes)
        ]
    seconds = Seconds(embed=time.perf_counter() - start)
    # It waits for batches that were submitted before it, so a pool of any size gets through.
    return submit(_collect, batches, prepared.checked, seconds)


def _batch_sizes(sam: Sam, config: PromptedConfig) -> tuple[int, ...]:
    """The model's sizes of batches that points_per_batch allows; at least the smallest one."""
    return tuple(size for size in sam.prompt_batches if size <= config.points_per_batch) or sam.prompt_batches[:1]


def _collect(batches: list[Future[_Answered]], checked: CheckedPrompts, seconds: Seconds) -> ImageMasks:
    """The masks of all batches in the order of the prompts."""
    answered = [batch.result() for batch in batches]
    masks = sorted((placed for batch in answered for placed in batch.masks), key=lambda placed: placed[0])
    dropped = sum((batch.dropped for batch in answered), Dropped(prompt=len(checked.dropped)))
    return ImageMasks(
        tuple(mask for _, mask in masks),
        num_candidates=len(masks) + dropped.total(),
        dropped=dropped,
        seconds=sum((batch.seconds for batch in answered), seconds),
        num_prompts=len(checked.prompts),
        dropped_prompts=checked.dropped,
        clipped_prompts=checked.clipped,
    )


def _answer_batch(
    sam: Sam,
    context: Any,
    batch: PromptBatch,
    prepared: PreparedPrompts,
    upsampling: Upsampling,
    config: PromptedConfig,
) -> _Answered:
    start = time.perf_counter()
    scored, tokens = _score(sam, context, batch, prepared, config)
    predicted_iou = _predicted_iou(scored, batch)
    rows = np.repeat(np.arange(len(tokens)), tokens.shape[1])
    tokens = tokens.ravel()
    keep = np.full(len(rows), True)
    if config.pred_iou_thresh > 0:
        keep = predicted_iou[rows, tokens] > config.pred_iou_thresh
    good = np.flatnonzero(keep)
    logits = sam.mask_logits(scored, rows[good], tokens[good])
    predicted = time.perf_counter()

    masks, unstable = [], 0
    for i, of_mask in zip(good.tolist(), logits, strict=True):
        index, token = int(batch.indices[rows[i]]), int(tokens[i])
        if not np.isfinite(of_mask).all():
            raise ModelOutputError(f"mask logits are not finite at prompt {prepared.checked.prompts.ids[index]}")
        mask = _encode(of_mask, float(predicted_iou[rows[i], token]), index, token, prepared, upsampling, config)
        if config.stability_score_thresh > 0 and not mask.stability_score >= config.stability_score_thresh:
            unstable += 1
        else:
            masks.append(((index, token), mask))
    seconds = Seconds(predict_masks=predicted - start, postprocess=time.perf_counter() - predicted)
    return _Answered(masks, Dropped(predicted_iou=len(rows) - len(good), stability=unstable), seconds)


def _score(
    sam: Sam, context: Any, batch: PromptBatch, prepared: PreparedPrompts, config: PromptedConfig
) -> tuple[Scored, np.ndarray]:
    """Runs the decoder, as often as the answer is refined.

    Returns:
      what mask_logits needs, and the masks that are the answers: (P, 1) tokens, or (P, 4) for all.
    """
    masks = None
    if batch.counts:
        masks = np.stack([mask_to_logits(counts, prepared.size_hw, sam.low_size) for counts in batch.counts])
    scored = sam.score_prompts(context, batch.coords_xy, batch.labels, masks, batch.size)
    if config.mask == "all":
        return scored, np.tile(np.arange(4), (len(batch.indices), 1))
    tokens = _choose(sam, scored, batch, prepared.checked, config)
    for _ in range(config.refine_steps):
        scored = sam.refine_prompts(context, batch.coords_xy, batch.labels, scored, tokens)
        tokens = np.zeros_like(tokens)
    return scored, tokens[:, None]


def _choose(
    sam: Sam, scored: Scored, batch: PromptBatch, checked: CheckedPrompts, config: PromptedConfig
) -> np.ndarray:
    """(P,) int64, the mask that answers each prompt: see PromptedConfig.mask."""
    single = np.zeros(len(batch.indices), np.int64)
    if config.mask == "single":
        return single
    best = 1 + _predicted_iou(scored, batch)[:, 1:].argmax(axis=1)
    if config.mask == "best":
        return best
    if config.mask == "auto":
        return np.where([checked.is_click(index) for index in batch.indices.tolist()], best, single)
    return np.where(_is_stable(sam.mask_logits(scored, np.arange(len(single)), single)), single, best)


def _is_stable(logits: np.ndarray) -> np.ndarray:
    """Whether masks hardly change with the threshold, as SAM 2 asks at low resolution.

    Args:
      logits: (P, low_size, low_size) float32.
    """
    inner = np.count_nonzero(logits > _STABLE_OFFSET, axis=(1, 2))
    outer = np.count_nonzero(logits > -_STABLE_OFFSET, axis=(1, 2))
    return np.where(outer > 0, inner / np.maximum(outer, 1), 1.0) >= _STABLE_THRESH


def _predicted_iou(scored: Scored, batch: PromptBatch) -> np.ndarray:
    """(P, 4) float32.

    Raises:
      ModelOutputError: one is not finite.
    """
    predicted_iou = scored.predicted_iou()
    if not np.isfinite(predicted_iou).all():
        raise ModelOutputError(f"predicted IoU is not finite at the prompts from number {batch.indices[0]} on")
    return predicted_iou


def _encode(
    logits: np.ndarray,
    predicted_iou: float,
    index: int,
    token: int,
    prepared: PreparedPrompts,
    upsampling: Upsampling,
    config: PromptedConfig,
) -> Mask:
    """From low-res logits to a row. Nearly all pass the filters, so they are encoded before they are filtered."""
    size_hw, prompts = prepared.size_hw, prepared.checked.prompts
    measured = measure_mask(logits, upsampling, config.mask_threshold, config.stability_score_offset)
    counts = rle.runs_to_counts(mask_to_runs(logits, upsampling, config.mask_threshold, (0, 0), size_hw))
    box = prompts.boxes_xyxy[index]
    if config.clip_to_box and not np.isnan(box[0]):
        counts = _clip_to_box(counts, size_hw, box)
    area, bbox_xywh = rle.area_and_bbox_xywh(counts, size_hw)
    return Mask(
        size_hw=size_hw,
        counts=counts,
        bbox_xywh=bbox_xywh,
        area=area,
        predicted_iou=predicted_iou,
        stability_score=float(measured.stability_score),
        prompt=prepared.checked.record(index),
        crop_box_xywh=(0.0, 0.0, float(size_hw[1]), float(size_hw[0])),
        category_id=int(prompts.category_ids[index]),
        mask_token=token,
    )


def _clip_to_box(counts: str, size_hw: tuple[int, int], box_xyxy: np.ndarray) -> str:
    """The pixels of a mask that a box touches."""
    x0, y0 = np.floor(box_xyxy[:2]).astype(int)
    x1, y1 = np.ceil(box_xyxy[2:]).astype(int)
    bits = rle.counts_to_mask(counts, size_hw)[y0:y1, x0:x1].T
    return rle.runs_to_counts(rle.bits_to_runs(bits, (int(x0), int(y0)), size_hw))
