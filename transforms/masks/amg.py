"""Automatic mask generation: SAM prompted with a grid of points, masks filtered, duplicates removed.

The algorithm of SamAutomaticMaskGenerator (facebookresearch/segment-anything, automatic_mask_generator.py, commit
dca509f), with the same masks in the same order. What differs is only when things are computed: the predicted IoU is
filtered before any mask is upsampled, and masks become RLE after NMS instead of before, unless candidates are kept.

Read top down: label_image > propose_image > propose_masks (on the device) > select_masks (on the host; the steps are in
select.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from maskbeam.transforms.masks import rle
from maskbeam.transforms.masks.candidates import Measured, mask_to_runs, measure_mask
from maskbeam.transforms.masks.crops import generate_crop_boxes
from maskbeam.transforms.masks.frame import Upsampling, resized_hw, to_frame, to_frame_points
from maskbeam.transforms.masks.prompts import build_layer_point_grids
from maskbeam.transforms.masks.select import (
    Candidates,
    Encoded,
    SelectionConfig,
    check_range,
    keep_best,
    merge_crops,
    select_in_crop,
)
from maskbeam.transforms.records import CropBox, Dropped, ImageMasks, Prompt, Seconds, StoredCandidate
from maskbeam.transforms.threads import Submit, call_now, one_blas_thread

MASKS_PER_POINT = 3  # SAM's multimask output: whole, part, subpart

# Widest image that is cut into crops. A mask of the whole image that is wider covers whole columns, in a run for all of
# them; a mask of a crop covers a part of each column, and its RLE would have a run for each.
MAX_WIDTH_OF_CROPS = 2**20

# Precisions of a model's matrix products. Only the first gives the reference's masks.
DTYPES = ("float32", "bfloat16", "float16")

# What SA-1B was made with (Segment Anything, arXiv:2304.02643, appendix B): crops, small regions cleaned, masks that
# are nearly the whole image or tiny dropped.
PROFILES: dict[str, dict[str, Any]] = {
    "default": {},
    "sa1b": {
        "crop_n_layers": 2,
        "crop_n_points_downscale_factor": 2,
        "min_mask_region_area": 100,
        "min_mask_area": 100,
        "max_mask_area_fraction": 0.95,
    },
}


# Fields of AmgConfig that say what is stored, not what the masks are.
CANDIDATE_SETTINGS = ("keep_candidates", "candidate_pred_iou_thresh", "candidate_stability_score_thresh")

# Candidates are kept down to this part of the run's own thresholds, unless told otherwise.
_BAR = 0.8


@dataclass(frozen=True)
class AmgConfig(SelectionConfig):
    """Parameters of automatic mask generation: the reference's, by its names and defaults, then ours.

    Attributes:
      points_per_side: grid points along one side of the image. Not with point_grids.
      points_per_batch: prompts decoded at once; a memory knob that results do not depend on.
      stability_score_offset: shift of the threshold, each way, in logits, for the stability score.
      crop_n_layers: layers of crops beside the full image: 1 costs 5 passes through the image encoder, 2 cost 21.
      crop_overlap_ratio: overlap of neighbouring crops as a fraction of the image's short side.
      crop_n_points_downscale_factor: layer i has points_per_side / factor**i points a side.
      point_grids: grids of (x, y) in [0, 1] instead of points_per_side, one a layer.
      mask_threshold: logit above which a pixel belongs to the mask.
      keep_candidates: store the masks as they are before duplicates are removed, too, so that `maskbeam refine` can
        decide again without the model.
      candidate_pred_iou_thresh: bar of the stored candidates: their predicted IoU is greater. At most pred_iou_thresh.
        Default: 0.8 times that.
      candidate_stability_score_thresh: likewise: they are at least this stable. At most stability_score_thresh.
        Default: 0.8 times that.
    """

    points_per_side: int | None = 32
    points_per_batch: int = 64
    stability_score_offset: float = 1.0
    crop_n_layers: int = 0
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    point_grids: tuple[tuple[tuple[float, float], ...], ...] | None = None
    mask_threshold: float = 0.0
    keep_candidates: bool = False
    candidate_pred_iou_thresh: float | None = None
    candidate_stability_score_thresh: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.points_per_side is None) == (self.point_grids is None):
            raise ValueError("exactly one of points_per_side and point_grids must be given")
        if self.point_grids is not None and len(self.point_grids) != self.crop_n_layers + 1:
            raise ValueError(
                f"point_grids must have one grid a layer: {self.crop_n_layers + 1} for "
                f"crop_n_layers={self.crop_n_layers}, got {len(self.point_grids)}"
            )
        if not math.isfinite(self.mask_threshold):
            raise ValueError(f"mask_threshold must be a finite logit, got {self.mask_threshold}")
        check_range(self, "points_per_side", 1, 1024)
        check_range(self, "points_per_batch", 1, 2**20)
        check_range(self, "crop_n_layers", 0, 6)
        check_range(self, "crop_n_points_downscale_factor", 1, 1024)
        check_range(self, "stability_score_offset", 0)
        check_range(self, "crop_overlap_ratio", 0, 1)
        for name in ("pred_iou_thresh", "stability_score_thresh"):
            threshold, bar = getattr(self, name), getattr(self, f"candidate_{name}")
            if bar is not None and not self.keep_candidates:
                raise ValueError(f"candidate_{name} says which candidates keep_candidates stores: give that, too")
            if bar is not None and not bar <= max(threshold, 0):
                raise ValueError(
                    f"candidate_{name} is {bar}, above {name} {threshold}: the masks themselves would not be among the "
                    "candidates. Lower it, or leave it out."
                )
        layer_point_grids(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AmgConfig:
        """Inverse of asdict, after a way through JSON, which knows no tuples."""
        grids = values["point_grids"]
        if grids is not None:
            grids = tuple(tuple((x, y) for x, y in grid) for grid in grids)
        return cls(**{**values, "point_grids": grids})

    @property
    def bar(self) -> AmgConfig:
        """The parameters to propose candidates with: where they are kept, their bar is in place of the thresholds."""
        if not self.keep_candidates:
            return self
        predicted_iou, stability = self.candidate_pred_iou_thresh, self.candidate_stability_score_thresh
        return replace(
            self.without_candidates(),
            pred_iou_thresh=round(_BAR * self.pred_iou_thresh, 6) if predicted_iou is None else predicted_iou,
            stability_score_thresh=round(_BAR * self.stability_score_thresh, 6) if stability is None else stability,
        )

    def without_candidates(self) -> AmgConfig:
        """The same parameters, and nothing but masks is stored."""
        return replace(
            self, keep_candidates=False, candidate_pred_iou_thresh=None, candidate_stability_score_thresh=None
        )

    @classmethod
    def for_profile(cls, profile: str, **overrides: Any) -> AmgConfig:
        """The parameters of a named profile, with some of them replaced."""
        if profile not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile}")
        return cls(**{**PROFILES[profile], **overrides})


@lru_cache(maxsize=8)
def layer_point_grids(config: AmgConfig) -> tuple[np.ndarray, ...]:
    """The point grid of each crop layer, (P, 2) float64 (x, y) in [0, 1]."""
    if config.point_grids is not None:
        grids = tuple(np.asarray(grid, np.float64) for grid in config.point_grids)
        for layer, grid in enumerate(grids):
            if not len(grid) or grid.shape[1:] != (2,) or not (grid.min() >= 0 and grid.max() <= 1):
                raise ValueError(f"point_grids[{layer}] must hold at least one point (x, y), all within [0, 1]")
        return grids
    assert config.points_per_side is not None  # checked by AmgConfig
    return tuple(
        build_layer_point_grids(config.points_per_side, config.crop_n_layers, config.crop_n_points_downscale_factor)
    )


class Scored(Protocol):
    """A batch of prompts through the mask decoder; all but the predicted IoU stays on the device."""

    def predicted_iou(self) -> np.ndarray:
        """(P, 3) float32 of masks 1 to 3; of score_prompts (P, 4), with mask 0 before them."""


class Sam(Protocol):
    """The model as this module sees it. transforms/models/sam/model.py has the real one, tests/fakes.py one of twenty
    lines.

    Attributes:
      frame_size: side of the square frame the image encoder takes, in pixels.
      low_size: side of the low-res logits.
      prompt_batches: sizes of batches that score_prompts is compiled for, ascending.
    """

    frame_size: int
    low_size: int
    prompt_batches: tuple[int, ...]

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> Any:
        """(frame_size, frame_size, 3) uint8 -> a context: all that is common to the image's prompts, on the device."""

    def score(self, context: Any, points_xy: np.ndarray, points_per_batch: int) -> Scored:
        """(P, 2) float64 pixels of the frame, P <= points_per_batch, one foreground point a prompt."""

    def low_res_logits(self, scored: Any, prompts: np.ndarray) -> np.ndarray:
        """Mask logits (len(prompts), 3, low_size, low_size) float32 of some of a batch's prompts."""

    def score_prompts(
        self,
        context: Any,
        coords_xy: np.ndarray,
        labels: np.ndarray,
        masks: np.ndarray | None,
        batch_size: int,
    ) -> Scored:
        """Prompts of any kind, with tokens as maskbeam.transforms.masks.prompts makes them.

        Args:
          coords_xy: (P, K, 2) float64 pixels of the frame, P <= batch_size.
          labels: (P, K) int: 0 background, 1 foreground, 2 and 3 corners of a box, -1 padding point, -2 no token.
          masks: (P, low_size, low_size) float32 logits in the frame; None = no prompt has a mask.
          batch_size: one of prompt_batches.
        """

    def refine_prompts(
        self, context: Any, coords_xy: np.ndarray, labels: np.ndarray, scored: Any, tokens: np.ndarray
    ) -> Scored:
        """The prompts of a batch of score_prompts once more, each with logits of one of its masks as its mask.

        Args:
          tokens: (P,) int, which mask of each prompt: 0 to 3.
        """

    def mask_logits(self, scored: Any, prompts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """(M, low_size, low_size) float32 logits of one mask, `tokens` (M,), of each of M of a batch's prompts."""


class ModelOutputError(RuntimeError):
    """The model answers with NaN or infinity: a sick device, or numbers too large for a low precision."""


@dataclass(frozen=True)
class Crop:
    """A crop, ready for the device: decoding threads make these."""

    box: CropBox
    frame: np.ndarray
    resized_hw: tuple[int, int]


@dataclass(frozen=True)
class Candidate:
    """A mask that passed the predicted IoU filter."""

    predicted_iou: np.float32
    point_xy: tuple[float, float]  # pixels of the crop
    logits: np.ndarray  # (low_size, low_size) float32
    measured: Measured


@dataclass(frozen=True)
class ProposedBatch:
    """The candidates of one batch of prompts, and the seconds that its thread took."""

    candidates: list[Candidate]
    dropped_predicted_iou: int
    seconds: Seconds


@dataclass(frozen=True)
class Proposals:
    """What the model makes of one crop: a future for each batch of prompts."""

    crop: CropBox
    upsampling: Upsampling
    batches: list[Future[ProposedBatch]]
    num_candidates: int


@dataclass(frozen=True)
class SelectedInCrop:
    """What is left of one crop, best predicted IoU first."""

    masks: list[Encoded]
    num_candidates: int
    dropped: Dropped
    seconds: Seconds
    candidates: tuple[StoredCandidate, ...]  # none without keep_candidates


def label_image(sam: Sam, pixels: np.ndarray, config: AmgConfig, submit: Submit = call_now) -> ImageMasks:
    """Generates the masks of one image.

    Args:
      sam: the model, from maskbeam.transforms.models.sam.model.load_sam.
      pixels: (H, W, 3) uint8 RGB.
      submit: how to run batches of prompts and work on the host: `maskbeam.transforms.threads.host_threads().submit`
        does so side by side.
    """
    with one_blas_thread():
        selected, seconds = propose_image(sam, prepare_crops(pixels, config, sam.frame_size), config, submit)
        return select_masks(selected, pixels.shape[:2], config, seconds)


def prepare_crops(pixels: np.ndarray, config: AmgConfig, frame_size: int) -> list[Crop]:
    """Cuts and resizes an image's crops. Everything after this is done without the image.

    Raises:
      ValueError: the image is too wide for crops.
    """
    width = pixels.shape[1]
    if config.crop_n_layers and width > MAX_WIDTH_OF_CROPS:
        raise ValueError(
            f"the image is {width} pixels wide; with crop layers at most {MAX_WIDTH_OF_CROPS} are, since a mask of a "
            "crop may have a run in every column. Label it without --crop_n_layers, or turn it upright."
        )
    crops = []
    for box in generate_crop_boxes(pixels.shape[:2], config.crop_n_layers, config.crop_overlap_ratio):
        x0, y0, x1, y1 = box.xyxy
        crops.append(Crop(box, to_frame(pixels[y0:y1, x0:x1], frame_size), resized_hw(box.size_hw, frame_size)))
    return crops


def propose_image(
    sam: Sam, crops: list[Crop], config: AmgConfig, submit: Submit = call_now
) -> tuple[list[Future[SelectedInCrop]], Seconds]:
    """Embeds all crops of an image; the rest of the work on a crop is submitted as soon as it is embedded.

    So while this thread embeds the next crop or image, others prompt the one before.
    """
    selected = []
    size_hw = crops[0].box.size_hw  # the first crop is the whole image
    seconds = Seconds()
    for crop in crops:
        start = time.perf_counter()
        context = sam.embed(crop.frame, crop.resized_hw)
        seconds += Seconds(embed=time.perf_counter() - start)
        proposals = propose_masks(sam, context, crop.box, config.bar, submit)
        # It waits for batches that were submitted before it, so a pool of any size gets through.
        selected.append(submit(_select_in_crop, proposals, size_hw, config))
    return selected, seconds


def propose_masks(sam: Sam, context: Any, crop: CropBox, config: AmgConfig, submit: Submit = call_now) -> Proposals:
    """Prompts one crop with its grid, in batches.

    Each batch is one call of submit, from its points to the measured candidates. Several threads keep the device busy:
    one measures on the host while another's batch is on the device, and on a CPU their programs fill each other's gaps.
    """
    points = layer_point_grids(config)[crop.layer] * np.array(crop.size_hw[::-1])
    frame_points = to_frame_points(points, crop.size_hw, sam.frame_size)
    upsampling = Upsampling.build(crop.size_hw, sam.low_size, sam.frame_size)

    def propose(first: int) -> ProposedBatch:
        batch = slice(first, first + config.points_per_batch)
        return _propose_batch(sam, context, points[batch], frame_points[batch], upsampling, config)

    batches = [submit(propose, first) for first in range(0, len(points), config.points_per_batch)]
    return Proposals(crop, upsampling, batches, len(points) * MASKS_PER_POINT)


def _propose_batch(
    sam: Sam,
    context: Any,
    points_xy: np.ndarray,
    frame_points: np.ndarray,
    upsampling: Upsampling,
    config: AmgConfig,
) -> ProposedBatch:
    """Only candidates that pass the predicted IoU leave the device as logits."""
    start = time.perf_counter()
    scored = sam.score(context, frame_points, config.points_per_batch)
    predicted_iou = scored.predicted_iou()
    if not np.isfinite(predicted_iou).all():  # it would pass for a mask of low quality
        raise ModelOutputError(f"predicted IoU is not finite at the prompts from {points_xy[0].tolist()}")
    # Filter by predicted IoU
    keep = predicted_iou > config.pred_iou_thresh if config.pred_iou_thresh > 0 else np.full(predicted_iou.shape, True)
    prompts = np.flatnonzero(keep.any(axis=1))
    logits = sam.low_res_logits(scored, prompts) if prompts.size else np.empty((0,))
    predicted = time.perf_counter()
    rows, tokens = np.nonzero(keep[prompts])
    candidates = _measure(logits, rows, tokens, predicted_iou[prompts], points_xy[prompts], upsampling, config)
    seconds = Seconds(predict_masks=predicted - start, postprocess=time.perf_counter() - predicted)
    return ProposedBatch(candidates, int((~keep).sum()), seconds)


def _measure(
    logits: np.ndarray,
    rows: np.ndarray,
    tokens: np.ndarray,
    predicted_iou: np.ndarray,
    points_xy: np.ndarray,
    upsampling: Upsampling,
    config: AmgConfig,
) -> list[Candidate]:
    """Stability and box of the candidates (rows, tokens) of a batch; unstable ones keep no logits."""
    candidates = []
    for row, token in zip(rows, tokens, strict=True):
        if not np.isfinite(logits[row, token]).all():
            raise ModelOutputError(f"mask logits are not finite at the prompt {points_xy[row].tolist()}")
        measured = measure_mask(logits[row, token], upsampling, config.mask_threshold, config.stability_score_offset)
        stable = config.stability_score_thresh <= 0 or measured.stability_score >= config.stability_score_thresh
        # A copy, so that the batch's other logits can be freed.
        kept_logits = logits[row, token].copy() if stable else np.empty((0, 0), np.float32)
        point = float(points_xy[row, 0]), float(points_xy[row, 1])
        candidates.append(Candidate(predicted_iou[row, token], point, kept_logits, measured))
    return candidates


def select_masks(
    selected: list[Future[SelectedInCrop]], size_hw: tuple[int, int], config: AmgConfig, seconds: Seconds = Seconds()
) -> ImageMasks:
    """Deduplicates and filters what all crops of an image have left.

    Args:
      selected: of propose_image.
      size_hw: (H, W) of the image.
      seconds: of the image so far; those of the crops' threads and of this one are added.
    """
    crops = [future.result() for future in selected]
    start = time.perf_counter()
    masks, dropped_between = merge_crops([crop.masks for crop in crops], size_hw, config)
    masks, dropped_beyond = keep_best(masks, config.max_masks)
    seconds = sum((crop.seconds for crop in crops), seconds)
    return ImageMasks(
        tuple(masks),
        num_candidates=sum(crop.num_candidates for crop in crops),
        dropped=sum((crop.dropped for crop in crops), dropped_between + dropped_beyond),
        seconds=seconds + Seconds(postprocess=time.perf_counter() - start),
        candidates=tuple(crop.candidates for crop in crops),
    )


def _select_in_crop(proposals: Proposals, size_hw: tuple[int, int], config: AmgConfig) -> SelectedInCrop:
    """Selects in one crop, as soon as its candidates are measured."""
    batches = [batch.result() for batch in proposals.batches]
    start = time.perf_counter()
    proposed = [candidate for batch in batches for candidate in batch.candidates]
    crop = proposals.crop

    def encode_now(index: int) -> Encoded:
        return _encode(proposed[index], proposals, size_hw, config)

    encode: Callable[[int], Encoded] = encode_now
    stored: tuple[StoredCandidate, ...] = ()
    if config.keep_candidates:
        # Each is encoded now, and once; the measurement has let go of the logits of unstable ones.
        encoded = {i: encode_now(i) for i, candidate in enumerate(proposed) if candidate.logits.size}
        stored = tuple(_store(candidate, crop, encoded.get(i)) for i, candidate in enumerate(proposed))
        encode = encoded.__getitem__
    candidates = Candidates(
        crop,
        predicted_iou=np.array([candidate.predicted_iou for candidate in proposed], np.float32),
        stability_score=np.array([candidate.measured.stability_score for candidate in proposed], np.float32),
        boxes_xyxy=np.array([candidate.measured.box_xyxy for candidate in proposed], np.int64).reshape(-1, 4),
        encode=encode,
    )
    masks, dropped = select_in_crop(candidates, size_hw, config)
    dropped += Dropped(predicted_iou=sum(batch.dropped_predicted_iou for batch in batches))
    seconds = sum((batch.seconds for batch in batches), Seconds(postprocess=time.perf_counter() - start))
    return SelectedInCrop(masks, proposals.num_candidates, dropped, seconds, stored)


def _encode(candidate: Candidate, proposals: Proposals, size_hw: tuple[int, int], config: AmgConfig) -> Encoded:
    """Upsamples a candidate to RLE and moves it from the crop to the image."""
    crop = proposals.crop
    x0, y0 = crop.xyxy[:2]
    runs = mask_to_runs(candidate.logits, proposals.upsampling, config.mask_threshold, (x0, y0), size_hw)
    counts = rle.runs_to_counts(runs)
    measured = candidate.measured
    scores = float(candidate.predicted_iou), float(measured.stability_score)
    point_xy = candidate.point_xy[0] + x0, candidate.point_xy[1] + y0
    return Encoded.of(counts, size_hw, scores, Prompt((point_xy,)), np.array(measured.box_xyxy), crop)


def _store(candidate: Candidate, crop: CropBox, encoded: Encoded | None) -> StoredCandidate:
    """What is kept of a candidate when its logits are let go."""
    x0, y0 = crop.xyxy[:2]
    return StoredCandidate(
        crop=crop,
        point_xy=(candidate.point_xy[0] + x0, candidate.point_xy[1] + y0),
        predicted_iou=float(candidate.predicted_iou),
        stability_score=float(candidate.measured.stability_score),
        box_xyxy=candidate.measured.box_xyxy,
        counts=encoded.mask.counts if encoded else None,
        area=encoded.mask.area if encoded else None,
    )
