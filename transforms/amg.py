"""Automatic mask generation: SAM prompted with a grid of points, masks filtered, duplicates removed.

The algorithm of SamAutomaticMaskGenerator (facebookresearch/segment-anything, automatic_mask_generator.py, commit
dca509f), with the same masks in the same order. What differs is only when things are computed: the predicted IoU is
filtered before any mask is upsampled, and masks become RLE after NMS instead of before.

Read top down: label_image > propose_masks (on the device) > select_masks (on the host).
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

from transforms import boxes, rle
from transforms.crops import CropBox, generate_crop_boxes
from transforms.frame import Upsampling, resized_hw, to_frame, to_frame_points
from transforms.masks import Measured, mask_to_runs, measure_mask
from transforms.prompts import build_layer_point_grids
from transforms.records import Dropped, Mask, Seconds
from transforms.regions import remove_small_regions

MASKS_PER_POINT = 3  # SAM's multimask output: whole, part, subpart

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


@dataclass(frozen=True)
class AmgConfig:
    """Parameters of automatic mask generation: the reference's, by its names and defaults, then ours.

    Attributes:
      points_per_side: grid points along one side of the image. None if point_grids is given.
      points_per_batch: prompts decoded at once; a memory knob that results do not depend on.
      pred_iou_thresh: keep masks whose predicted IoU is greater. 0 switches the filter off.
      stability_score_thresh: keep masks at least this stable. 0 switches the filter off.
      stability_score_offset: shift of the threshold, each way, in logits, for the stability score.
      box_nms_thresh: of two masks of a crop with a higher IoU than this, the one with the lower predicted IoU goes.
      crop_n_layers: layers of crops beside the full image: 1 costs 5 passes through the image encoder, 2 cost 21.
      crop_nms_thresh: likewise between crops, where the mask of the smaller crop stays.
      crop_overlap_ratio: overlap of neighbouring crops as a fraction of the image's short side.
      crop_n_points_downscale_factor: layer i has points_per_side / factor**i points a side.
      point_grids: grids of (x, y) in [0, 1] instead of points_per_side, one a layer.
      min_mask_region_area: holes and islands inside masks below this many pixels are removed. 0 switches it off.
      mask_threshold: logit above which a pixel belongs to the mask.
      nms_by: "box" as the reference does, or "mask": IoU of the masks themselves. Slower, but a thin diagonal object
        survives beside what fills its box.
      min_mask_area: drop masks of fewer pixels.
      max_mask_area: drop masks of more pixels; None = no limit.
      min_mask_area_fraction: drop masks that cover less than this fraction of the image.
      max_mask_area_fraction: drop masks that cover this fraction or more; 1 switches it off.
      max_masks: keep at most this many masks an image, those with the highest predicted IoU; None = all.
    """

    points_per_side: int | None = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    point_grids: tuple[tuple[tuple[float, float], ...], ...] | None = None
    min_mask_region_area: int = 0
    mask_threshold: float = 0.0
    nms_by: str = "box"
    min_mask_area: int = 0
    max_mask_area: int | None = None
    min_mask_area_fraction: float = 0.0
    max_mask_area_fraction: float = 1.0
    max_masks: int | None = None

    def __post_init__(self) -> None:
        if (self.points_per_side is None) == (self.point_grids is None):
            raise ValueError("exactly one of points_per_side and point_grids must be given")
        if self.point_grids is not None and len(self.point_grids) != self.crop_n_layers + 1:
            raise ValueError(
                f"point_grids must have one grid a layer: {self.crop_n_layers + 1} for "
                f"crop_n_layers={self.crop_n_layers}, got {len(self.point_grids)}"
            )
        for name in ("pred_iou_thresh", "stability_score_thresh"):
            if not getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a fraction of at most 1, got {getattr(self, name)}")
        if not math.isfinite(self.mask_threshold):
            raise ValueError(f"mask_threshold must be a finite logit, got {self.mask_threshold}")
        for name, low, high in (
            ("points_per_side", 1, 1024),
            ("points_per_batch", 1, 2**20),
            ("crop_n_layers", 0, 6),
            ("crop_n_points_downscale_factor", 1, 1024),
            ("stability_score_offset", 0, None),
            ("box_nms_thresh", 0, 1),
            ("crop_nms_thresh", 0, 1),
            ("crop_overlap_ratio", 0, 1),
            ("min_mask_region_area", 0, None),
            ("min_mask_area", 0, None),
            ("max_mask_area", 0, None),
            ("min_mask_area_fraction", 0, 1),
            ("max_mask_area_fraction", 0, 1),
            ("max_masks", 1, None),
        ):
            value = getattr(self, name)
            if value is not None and not (value >= low and (high is None or value <= high)):
                expected = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ValueError(f"{name} must be {expected}, got {value}")
        for low_name, high_name in (
            ("min_mask_area", "max_mask_area"),
            ("min_mask_area_fraction", "max_mask_area_fraction"),
        ):
            smallest, largest = getattr(self, low_name), getattr(self, high_name)
            if largest is not None and smallest > largest:
                raise ValueError(f"{low_name} {smallest} is above {high_name} {largest}: no mask would be left")
        if self.nms_by not in ("box", "mask"):
            raise ValueError(f'nms_by must be "box" or "mask", got "{self.nms_by}"')
        layer_point_grids(self)

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
        """(P, 3) float32."""


class Sam(Protocol):
    """The model as this module sees it. transforms/sam.py has the real one, tests/fakes.py one of twenty lines.

    Attributes:
      frame_size: side of the square frame the image encoder takes, in pixels.
      low_size: side of the low-res logits.
    """

    frame_size: int
    low_size: int

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> Any:
        """(frame_size, frame_size, 3) uint8 -> a context: all that is common to the image's prompts, on the device."""

    def score(self, context: Any, points_xy: np.ndarray, points_per_batch: int) -> Scored:
        """(P, 2) float64 pixels of the frame, P <= points_per_batch, one foreground point a prompt."""

    def low_res_logits(self, scored: Any, prompts: np.ndarray) -> np.ndarray:
        """Mask logits (len(prompts), 3, low_size, low_size) float32 of some of a batch's prompts."""


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
class _Encoded:
    """A mask that survived its crop."""

    mask: Mask
    runs: rle.Runs
    box_xyxy: np.ndarray  # inclusive pixel indices of the image, as the reference has it
    crop: CropBox


@dataclass(frozen=True)
class SelectedInCrop:
    """What is left of one crop, best predicted IoU first."""

    masks: list[_Encoded]
    num_candidates: int
    dropped: Dropped
    seconds: Seconds


@dataclass(frozen=True)
class ImageMasks:
    """The masks of one image, in the reference's order."""

    masks: tuple[Mask, ...]
    num_candidates: int
    dropped: Dropped
    seconds: Seconds


Submit = Callable[..., "Future[Any]"]


def call_now(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """A Submit without threads: runs the call at once."""
    future: Future[Any] = Future()
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(error)
    return future


def label_image(sam: Sam, pixels: np.ndarray, config: AmgConfig, submit: Submit = call_now) -> ImageMasks:
    """Generates the masks of one image.

    Args:
      sam: the model, from transforms.sam.load_sam.
      pixels: (H, W, 3) uint8 RGB.
      submit: how to run batches of prompts and work on the host: `transforms.threads.host_threads().submit` does so
        side by side.
    """
    selected, seconds = propose_image(sam, prepare_crops(pixels, config, sam.frame_size), config, submit)
    return select_masks(selected, pixels.shape[:2], config, seconds)


def prepare_crops(pixels: np.ndarray, config: AmgConfig, frame_size: int) -> list[Crop]:
    """Cuts and resizes an image's crops. Everything after this is done without the image."""
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
    start = time.perf_counter()
    for crop in crops:
        context = sam.embed(crop.frame, crop.resized_hw)
        proposals = propose_masks(sam, context, crop.box, config, submit)
        # It waits for batches that were submitted before it, so a pool of any size gets through.
        selected.append(submit(_select_in_crop, proposals, size_hw, config))
    return selected, Seconds(embed=time.perf_counter() - start)


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
      seconds: spent on the image so far; what the crops and this took is added.
    """
    crops = [future.result() for future in selected]
    start = time.perf_counter()
    masks = [mask for crop in crops for mask in crop.masks]
    dropped = sum((crop.dropped for crop in crops), Dropped())

    # Remove duplicates between crops; masks from smaller crops are preferred
    if len(crops) > 1:
        areas = np.array([mask.crop.size_hw[0] * mask.crop.size_hw[1] for mask in masks], np.float32)
        keep = _nms(masks, np.float32(1) / areas, config.crop_nms_thresh, config.nms_by)
        dropped += Dropped(crop_nms=len(masks) - len(keep))
        masks = [masks[i] for i in keep]

    # Clean masks of small regions; the new duplicates go, edited ones first
    if config.min_mask_region_area > 0:
        cleaned = [_clean(mask, config) for mask in masks]
        untouched = np.array([not changed for _, changed in cleaned], np.float32)
        masks = [mask for mask, _ in cleaned]
        keep = _nms(masks, untouched, max(config.box_nms_thresh, config.crop_nms_thresh), config.nms_by)
        dropped += Dropped(small_region=len(masks) - len(keep))
        masks = [masks[i] for i in keep]

    # Beyond the reference: limits on the area and on the number of masks
    sized = [mask for mask in masks if _keep_area(mask.mask.area, size_hw, config)]
    dropped += Dropped(area=len(masks) - len(sized))
    masks = sized
    if config.max_masks is not None and len(masks) > config.max_masks:
        best = np.argsort([-mask.mask.predicted_iou for mask in masks], kind="stable")[: config.max_masks]
        dropped += Dropped(max_masks=len(masks) - config.max_masks)
        masks = [masks[i] for i in np.sort(best)]

    seconds = sum((crop.seconds for crop in crops), seconds)
    return ImageMasks(
        tuple(mask.mask for mask in masks),
        num_candidates=sum(crop.num_candidates for crop in crops),
        dropped=dropped,
        seconds=seconds + Seconds(postprocess=time.perf_counter() - start),
    )


def _select_in_crop(proposals: Proposals, size_hw: tuple[int, int], config: AmgConfig) -> SelectedInCrop:
    """The candidates of one crop that are stable, whole and no duplicates, best predicted IoU first."""
    batches = [batch.result() for batch in proposals.batches]
    start = time.perf_counter()
    proposed = [candidate for batch in batches for candidate in batch.candidates]

    # Filter by stability (the measurement has let go of the logits of the others)
    stable = [candidate for candidate in proposed if candidate.logits.size]

    # Filter boxes that touch inner crop edges
    boxes_xyxy = np.array([candidate.measured.box_xyxy for candidate in stable], np.int64).reshape(-1, 4)
    whole = np.flatnonzero(boxes.keep_off_crop_edge(boxes_xyxy, proposals.crop.xyxy, size_hw))

    # Remove duplicates within the crop
    scores = np.array([stable[i].predicted_iou for i in whole], np.float32)
    if config.nms_by == "box":
        keep = boxes.nms(boxes_xyxy[whole], scores, config.box_nms_thresh)
        masks = [_encode(stable[i], proposals, size_hw, config) for i in whole[keep]]
    else:
        encoded = [_encode(stable[i], proposals, size_hw, config) for i in whole]
        keep = _nms(encoded, scores, config.box_nms_thresh, config.nms_by)
        masks = [encoded[i] for i in keep]
    dropped = Dropped(
        predicted_iou=sum(batch.dropped_predicted_iou for batch in batches),
        stability=len(proposed) - len(stable),
        crop_edge=len(stable) - len(whole),
        box_nms=len(whole) - len(keep),
    )
    seconds = sum((batch.seconds for batch in batches), Seconds(postprocess=time.perf_counter() - start))
    return SelectedInCrop(masks, proposals.num_candidates, dropped, seconds)


def _encode(candidate: Candidate, proposals: Proposals, size_hw: tuple[int, int], config: AmgConfig) -> _Encoded:
    """Upsamples a candidate to RLE and moves it from the crop to the image."""
    crop = proposals.crop
    x0, y0 = crop.xyxy[:2]
    runs = mask_to_runs(candidate.logits, proposals.upsampling, config.mask_threshold, (x0, y0), size_hw)
    counts = rle.runs_to_counts(runs)
    area, bbox_xywh = rle.area_and_bbox_xywh(counts, size_hw)
    mask = Mask(
        size_hw=size_hw,
        counts=counts,
        bbox_xywh=bbox_xywh,
        area=area,
        predicted_iou=float(candidate.predicted_iou),
        stability_score=float(candidate.measured.stability_score),
        point_xy=(candidate.point_xy[0] + x0, candidate.point_xy[1] + y0),
        crop_box_xywh=crop.xywh,
    )
    return _Encoded(mask, runs, np.array(candidate.measured.box_xyxy) + [x0, y0, x0, y0], crop)


def _nms(masks: list[_Encoded], scores: np.ndarray, iou_threshold: float, nms_by: str) -> np.ndarray:
    """NMS of encoded masks by the IoU of their boxes or of the masks themselves."""
    if not masks:
        return np.zeros(0, np.int64)
    if nms_by == "box":
        return boxes.nms(np.stack([mask.box_xyxy for mask in masks]), scores, iou_threshold)
    counts, size_hw = [mask.mask.counts for mask in masks], masks[0].mask.size_hw
    return boxes.greedy_nms(
        scores, lambda one, rest: rle.iou(counts[one], [counts[i] for i in rest], size_hw), iou_threshold
    )


def _clean(encoded: _Encoded, config: AmgConfig) -> tuple[_Encoded, bool]:
    """Removes small holes and islands; predicted IoU and stability stay those of the uncleaned mask."""
    runs, changed = remove_small_regions(encoded.runs, config.min_mask_region_area)
    if not changed:
        # The reference takes every mask's box anew here, so that a mask's box is that of its pixels.
        return encoded, False
    counts = rle.runs_to_counts(runs)
    area, bbox_xywh = rle.area_and_bbox_xywh(counts, runs.size_hw)
    x, y, w, h = bbox_xywh
    box_xyxy = np.array([x, y, x + w - 1, y + h - 1]) if area else np.zeros(4)
    return _Encoded(
        replace(encoded.mask, counts=counts, area=area, bbox_xywh=bbox_xywh), runs, box_xyxy, encoded.crop
    ), True


def _keep_area(area: int, size_hw: tuple[int, int], config: AmgConfig) -> bool:
    """Whether a mask's area is within the limits."""
    pixels = size_hw[0] * size_hw[1]
    return (
        area >= config.min_mask_area
        and (config.max_mask_area is None or area <= config.max_mask_area)
        and area >= config.min_mask_area_fraction * pixels
        and (config.max_mask_area_fraction >= 1 or area < config.max_mask_area_fraction * pixels)
    )
