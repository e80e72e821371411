"""The sides of a comparison: SamAutomaticMaskGenerator and maskbeam, on the same weights, timed by stage.

A third, Hugging Face's pipeline, is in transformers_side.py.
"""

from __future__ import annotations

import functools
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from benchmarks.models import RANDOM_MODELS, AnsweringSam, Answers, random_backbone
from benchmarks.photos import chunk_of
from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.masks.amg import MASKS_PER_POINT, AmgConfig, Sam, label_image, layer_point_grids
from maskbeam.transforms.masks.frame import resized_hw
from maskbeam.transforms.records import Mask
from maskbeam.transforms.threads import host_threads

if TYPE_CHECKING:  # torch, for the reference alone
    from benchmarks.parity import Comparison, Decoded
    from benchmarks.transformers_side import HuggingFace

SIDES = ("reference", "ours", "transformers")


def load_sides(
    model: str, dtype: str, config: AmgConfig, names: Sequence[str]
) -> tuple[Reference | None, Ours | None, HuggingFace | None]:
    """The sides that are named, on the same weights."""
    from maskbeam.transforms.models.sam.model import Sam as KerasSam
    from maskbeam.transforms.models.sam.model import load_backbone, load_sam

    synthetic = model in RANDOM_MODELS
    backbone = random_backbone(model) if synthetic else None
    reference = ours = hugging_face = None
    if "reference" in names or "transformers" in names:
        from benchmarks import reference as torch_side

        start = time.perf_counter()
        if backbone is None:
            sam = torch_side.build_torch_sam(load_backbone(model))
        else:
            sam = torch_side.build_torch_sam(backbone)
            if "ours" in names:  # KerasHub's initial weights leave out too much for the networks to be compared
                torch_side.randomize(sam, seed=0)
                torch_side.load_torch_weights(backbone, sam.state_dict())
        if "reference" in names:
            reference = Reference(sam, config, synthetic, time.perf_counter() - start)
        if "transformers" in names:
            from benchmarks.transformers_side import HuggingFace, build_sam_model

            start = time.perf_counter()
            hugging_face = HuggingFace(build_sam_model(sam), config, synthetic, time.perf_counter() - start)
    if "ours" in names:
        start = time.perf_counter()
        keras_sam = load_sam(model, dtype) if backbone is None else KerasSam(backbone, dtype)
        ours = Ours(keras_sam, config, synthetic, time.perf_counter() - start)
    return reference, ours, hugging_face


@dataclass(frozen=True)
class Run:
    """One image labeled once.

    Attributes:
      seconds: wall time, without what benchmarks.compare says it leaves out.
      stages: seconds by stage.
      excluded: the part of the wall time that is not in `seconds`, by cause.
      masks: in the side's order.
      network_iou: (P, 3) predicted IoU of the network itself, where synthetic answers replaced it.
    """

    seconds: float
    stages: dict[str, float]
    excluded: dict[str, float]
    masks: tuple[Mask, ...]
    network_iou: np.ndarray | None = None


class _Waiting:
    """A Sam that returns from embed only when the embedding is there."""

    def __init__(self, sam: Sam) -> None:
        self._sam = sam
        self.frame_size = sam.frame_size
        self.low_size = sam.low_size
        self.score = sam.score
        self.low_res_logits = sam.low_res_logits

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> Any:
        import keras

        context = self._sam.embed(frame, resized_hw)
        for tensor in keras.tree.flatten(context)[:1]:  # all come from one program
            keras.ops.convert_to_numpy(tensor)
        return context


class Ours:
    """maskbeam's model stage."""

    name = "ours"

    def __init__(self, sam: Sam, config: AmgConfig, synthetic: bool, load: float) -> None:
        self.sam = sam
        self.config = config
        self.synthetic = synthetic
        self.load = load
        self._threads = host_threads()

    def answers(self, size_hw: tuple[int, int]) -> Answers | None:
        """For a photo of that size; None if the network's own output counts."""
        return Answers(size_hw, self.sam.frame_size, self.sam.low_size, self.config) if self.synthetic else None

    def run(self, pixels: np.ndarray, answers: Answers | None, config: AmgConfig | None = None) -> Run:
        """Labels one image."""
        waiting: Any = _Waiting(self.sam)  # a Sam for grids only, as AnsweringSam is
        sam: Any = waiting if answers is None else AnsweringSam(waiting, answers)
        gc.collect()
        start = time.perf_counter()
        result = label_image(sam, pixels, config or self.config, self._threads.submit)
        seconds = time.perf_counter() - start
        stages = {
            "embed": result.seconds.embed,
            "prompts, resize": seconds - result.seconds.embed,
            "(predict_masks, seconds of threads)": result.seconds.predict_masks,
            "(postprocess, seconds of threads)": result.seconds.postprocess,
        }
        network_iou = sam.network_iou if isinstance(sam, AnsweringSam) else None
        return Run(seconds, stages, {}, result.masks, network_iou)

    def run_in_flight(self, data: bytes, copies: int, answers: Answers | None) -> float:
        """Seconds an image when `copies` of one encoded photo go through the pipeline's model stage."""
        from maskbeam.transforms.generate_masks import label_chunk
        from maskbeam.transforms.masks.automatic import AutomaticLabeler
        from maskbeam.transforms.model_health import ModelHealth

        sam: Any = self.sam if answers is None else AnsweringSam(self.sam, answers)
        start = time.perf_counter()
        labeled = label_chunk(
            AutomaticLabeler(sam, self.config), chunk_of([data] * copies), ImageConfig(), self._threads, ModelHealth()
        ).images
        seconds = time.perf_counter() - start
        failures = [image.failure.reason for image in labeled if image.failure]
        if failures:
            raise RuntimeError(f"{len(failures)} images failed: {failures[0]}")
        return seconds / copies


class Reference:
    """SamAutomaticMaskGenerator."""

    name = "reference"

    def __init__(self, sam: Any, config: AmgConfig, synthetic: bool, load: float) -> None:
        import torch

        from benchmarks.reference import STAND_INS

        self._torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.sam = sam.to(self.device)
        self.config = config
        self.synthetic = synthetic
        self.load = load
        self.torchvision_is_real = "torchvision" not in STAND_INS

    def answers(self, size_hw: tuple[int, int]) -> Answers | None:
        """As Ours.answers."""
        low_size = 4 * self.sam.prompt_encoder.image_embedding_size[0]
        return Answers(size_hw, self.sam.image_encoder.img_size, low_size, self.config) if self.synthetic else None

    def run(self, pixels: np.ndarray, answers: Answers | None, config: AmgConfig | None = None) -> Run:
        """Labels one image."""
        from benchmarks.parity import read_masks
        from benchmarks.reference import SamAutomaticMaskGenerator

        config = config or self.config
        generator = SamAutomaticMaskGenerator(
            self.sam,
            output_mode="coco_rle",
            points_per_side=config.points_per_side,
            points_per_batch=config.points_per_batch,
            pred_iou_thresh=config.pred_iou_thresh,
            stability_score_thresh=config.stability_score_thresh,
        )
        stages: defaultdict[str, float] = defaultdict(float)
        network_iou: list[np.ndarray] = []
        gc.collect()
        with (
            timed_stages(self._functions(generator), stages, self._wait),
            answering(self.sam.mask_decoder, answers, stages, self._wait, network_iou),
        ):
            start = time.perf_counter()
            records = generator.generate(pixels)
            self._wait()
            seconds = time.perf_counter() - start
        stages["other"] = seconds - sum(stages.values())
        excluded = {} if answers is None else {"synthetic answers": stages.pop("synthetic answers")}
        if not self.torchvision_is_real:
            excluded["stand-in NMS"] = stages.pop("NMS", 0.0)
        return Run(
            seconds - sum(excluded.values()),
            dict(stages),
            excluded,
            read_masks({"masks": records}),
            np.concatenate(network_iou) if network_iou else None,
        )

    def _wait(self) -> None:
        if self.device == "cuda":
            self._torch.cuda.synchronize()

    def _functions(self, generator: Any) -> list[Function]:
        from segment_anything import automatic_mask_generator as amg

        return [
            ("resize", generator.predictor.transform, "apply_image"),
            ("image encoder", self.sam.image_encoder, "forward"),
            ("prompt encoder", self.sam.prompt_encoder, "forward"),
            ("mask decoder", self.sam.mask_decoder, "forward"),
            ("upsampling", self.sam, "postprocess_masks"),
            ("filters, copies", amg.MaskData, "filter"),
            ("filters, copies", amg.MaskData, "cat"),
            ("stability", amg, "calculate_stability_score"),
            ("boxes", amg, "batched_mask_to_box"),
            ("RLE", amg, "mask_to_rle_pytorch"),
            ("RLE", amg, "coco_encode_rle"),
            ("NMS", amg, "batched_nms"),
        ]

    def judge(self, reference: Run, ours: Run, pixels: np.ndarray, answers: Answers | None) -> Comparison:
        """Holds our masks against the reference's by the contract of benchmarks.parity."""
        from benchmarks import parity

        self.sam.cpu()
        judge: Any = parity.Reference(self.sam, pixels)
        if answers is not None:
            judge = _AnsweredReference(self.sam, pixels.shape[:2], answers, self.config)
        compared = parity.compare(reference.masks, ours.masks, judge, self.config)
        self.sam.to(self.device)
        return compared


# A function to be timed: its stage, the module or object that has it, and its name there.
Function = tuple[str, Any, str]


@contextmanager
def timed_stages(
    functions: Sequence[Function], stages: defaultdict[str, float], wait: Callable[[], None]
) -> Iterator[None]:
    """Adds the seconds spent in the functions to `stages`. None of them may call another."""
    with ExitStack() as stack:
        for stage, owner, name in functions:
            timed = _timed(getattr(owner, name), stage, stages, wait)
            stack.enter_context(mock.patch.object(owner, name, timed))
        yield


@contextmanager
def answering(
    mask_decoder: Any,
    answers: Answers | None,
    stages: defaultdict[str, float],
    wait: Callable[[], None],
    network_iou: list[np.ndarray],
) -> Iterator[None]:
    """Replaces what a torch mask decoder returns, masks and predicted IoU, by the synthetic answers, if there are any.

    The predicted IoU that it replaces, (P, 3), are added to `network_iou`.
    """
    if answers is None:
        yield
        return
    import torch

    asked = 0

    def replace_output(module: Any, inputs: Any, output: Any) -> Any:
        nonlocal asked
        network_iou.append(output[1].cpu().numpy().reshape(-1, MASKS_PER_POINT))
        batch = np.arange(asked, asked + len(network_iou[-1]))
        asked += len(batch)
        both = answers.logits(batch), answers.predicted_iou[batch]
        return tuple(
            torch.from_numpy(array).reshape(replaced.shape).to(replaced.device)
            for array, replaced in zip(both, output, strict=True)
        )

    hook = mask_decoder.register_forward_hook(_timed(replace_output, "synthetic answers", stages, wait))
    try:
        yield
    finally:
        hook.remove()


def _timed(
    function: Callable[..., Any], stage: str, stages: defaultdict[str, float], wait: Callable[[], None]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        wait()
        stages[stage] += time.perf_counter() - start
        return result

    return call


class _AnsweredReference:
    """In place of benchmarks.parity.Reference: what a prompt was answered, upsampled as the reference does."""

    def __init__(self, sam: Any, size_hw: tuple[int, int], answers: Answers, config: AmgConfig) -> None:
        self._sam = sam
        self._size_hw = size_hw
        self._answers = answers
        self._points_xy = layer_point_grids(config)[0] * np.array(size_hw[::-1])

    def decode(self, mask: Mask) -> Decoded:
        import torch

        from benchmarks.parity import Decoded

        prompt = np.abs(self._points_xy - mask.prompt.points_xy[0]).sum(axis=1).argmin()
        predicted_iou = self._answers.predicted_iou[prompt]
        token = int(np.abs(predicted_iou - mask.predicted_iou).argmin())
        low = torch.from_numpy(self._answers.logits(np.array([prompt])))
        input_size = resized_hw(self._size_hw, self._sam.image_encoder.img_size)
        logits = self._sam.postprocess_masks(low, input_size, self._size_hw)[0, token].numpy()
        return Decoded(logits, float(predicted_iou[token]), (0, 0))
