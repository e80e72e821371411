"""GenerateMasks: order, failures that cost only themselves, a broken model, progress. Masks are tested in test_amg."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing import test_pipeline
from apache_beam.testing.util import assert_that, equal_to
from PIL import Image

from maskbeam.pipeline.launch.identity import default_backend
from maskbeam.transforms import worker_progress
from maskbeam.transforms.generate_masks import GenerateMasks, label_chunk
from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.labeler import Labeler, PromptError
from maskbeam.transforms.load_model import ModelConfig
from maskbeam.transforms.masks import amg, automatic
from maskbeam.transforms.masks.amg import AmgConfig, label_image
from maskbeam.transforms.masks.automatic import AutomaticLabeler, probe_config
from maskbeam.transforms.model_health import ModelBroken, ModelHealth, is_out_of_memory, probe_pixels
from maskbeam.transforms.prompt_files.config import PromptConfig
from maskbeam.transforms.prompt_files.finder import PromptFinder, RunPrompts
from maskbeam.transforms.prompt_files.rows import make_batch
from maskbeam.transforms.records import (
    Chunk,
    Dropped,
    EncodedImage,
    Failure,
    ImageMasks,
    LabeledChunk,
    LabeledImage,
    Prompts,
    Seconds,
    Shard,
    WorkerTime,
)
from maskbeam.transforms.threads import Submit
from tests.conftest import photo_bytes
from tests.fakes import FakeSam, FakeScored

AMG = AmgConfig(points_per_side=4, pred_iou_thresh=0.75, stability_score_thresh=0.85)
SHARD = Shard("s.tar", "/s.tar", "tar", ())


def encoded(number: int, data: bytes | None = None, failure: Failure | None = None) -> EncodedImage:
    data = photo_bytes(number) if data is None else data
    return EncodedImage(f"s.tar#{number}", number, f"key{number}", None, data, failure)


def chunk_of(*images: EncodedImage, index: int = 0) -> Chunk:
    return Chunk(SHARD, index, images, final=True, digest="d")


def photos_chunk(count: int) -> Chunk:
    return chunk_of(*map(encoded, range(count)))


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


Label = Callable[..., LabeledChunk]


@pytest.fixture
def label(threads: ThreadPoolExecutor) -> Label:
    def label(
        chunk: Chunk,
        sam: Any = None,
        health: ModelHealth | None = None,
        amg: AmgConfig = AMG,
        labeler: Labeler | None = None,
        **arguments: Any,
    ) -> LabeledChunk:
        labeler = labeler or AutomaticLabeler(sam or FakeSam(), amg)
        return label_chunk(labeler, chunk, ImageConfig(), threads, health or ModelHealth(), **arguments)

    return label


class FailsOn(FakeSam):
    """Raises on the photos with these numbers."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> np.ndarray:
        if frame[0, 0, 0] in self.numbers:
            raise RuntimeError(f"no luck with {frame[0, 0, 0]}\nand a stack trace")
        return super().embed(frame, resized_hw)


class FailsOnce(FakeSam):
    """Raises when a method is called for the nth time, and never again."""

    def __init__(self, method: str, call: int) -> None:
        self.method, self.calls_left = method, call

    def _called(self, method: str) -> None:
        if method == self.method:
            self.calls_left -= 1
            if self.calls_left == 0:
                raise RuntimeError("once")

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> np.ndarray:
        self._called("embed")
        return super().embed(frame, resized_hw)

    def score(self, context: np.ndarray, points_xy: np.ndarray, points_per_batch: int) -> FakeScored:
        self._called("score")
        return super().score(context, points_xy, points_per_batch)

    def low_res_logits(self, scored: FakeScored, prompts: np.ndarray) -> np.ndarray:
        self._called("low_res_logits")
        return super().low_res_logits(scored, prompts)


def rows(chunk: LabeledChunk) -> list[tuple[Any, ...]]:
    """What must not depend on retries and threads: everything but the seconds."""
    return [(image.source, image.sha256, image.masks, image.dropped, image.failure) for image in chunk.images]


def outcomes(chunk: LabeledChunk) -> list[str]:
    """Of each image the status or, if it failed, the stage."""
    return [image.failure.stage if image.failure else image.status for image in chunk.images]


@pytest.mark.parametrize("count", [0, 1, 10])
def test_images_keep_their_order_and_lose_their_bytes(label: Label, count: int) -> None:
    labeled = label(photos_chunk(count))
    assert [image.source.row for image in labeled.images] == list(range(count))
    assert not any(image.source.data for image in labeled.images)


def test_every_candidate_is_a_mask_or_was_dropped_for_a_reason(label: Label) -> None:
    images = label(photos_chunk(6)).images
    assert all(image.num_candidates == 4 * 4 * 3 for image in images)
    assert all(image.num_candidates == len(image.masks) + image.dropped.total() for image in images)
    assert all(image.masks and image.dropped.stability and image.dropped.box_nms for image in images)


@pytest.mark.parametrize(
    ("spoiled", "stage", "reason"),
    [
        (encoded(1, b"no image"), "decode", "Expected"),
        (encoded(1, photo_bytes(1)[:-100]), "decode", "cannot decode this PNG"),
        (encoded(1, b"", Failure("read", "gone")), "read", "gone"),
    ],
    ids=["not an image", "truncated", "read failed"],
)
def test_a_bad_image_is_a_failed_one_and_costs_only_itself(
    label: Label, spoiled: EncodedImage, stage: str, reason: str
) -> None:
    good = label(chunk_of(encoded(0), encoded(2), encoded(3)))
    labeled = label(chunk_of(encoded(0), spoiled, encoded(2), encoded(3)))
    assert outcomes(labeled) == ["labeled", stage, "labeled", "labeled"]
    failed = labeled.images[1]
    assert failed.failure and reason in failed.failure.reason
    assert (failed.size_hw, failed.masks, failed.num_candidates) == (None, (), 0)
    assert bool(failed.sha256) == bool(spoiled.data)
    assert [row for row in rows(labeled) if row[0].row != 1] == rows(good)


@pytest.mark.parametrize("method", ["embed", "score", "low_res_logits"])
@pytest.mark.parametrize("call", [1, 3, 6])
def test_a_model_that_fails_once_is_tried_again(label: Label, method: str, call: int) -> None:
    assert rows(label(photos_chunk(6), FailsOnce(method, call))) == rows(label(photos_chunk(6)))


@pytest.mark.parametrize("numbers", [(0,), (5,), (0, 2, 4), (0, 1, 4, 5), (1, 2, 3), (0, 1, 2, 3), (2, 3, 4, 5)])
def test_an_image_the_model_always_fails_on_costs_only_itself(label: Label, numbers: tuple[int, ...]) -> None:
    labeled = label(photos_chunk(6), FailsOn(*numbers))
    assert outcomes(labeled) == ["model" if number in numbers else "labeled" for number in range(6)]
    failed = labeled.images[numbers[0]]
    assert failed.failure == Failure("model", f"RuntimeError: no luck with {numbers[0]}")
    assert failed.size_hw == (48, 64)
    assert [row for row in rows(labeled) if not row[-1]] == [
        row for row in rows(label(photos_chunk(6))) if row[0].row not in numbers
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_images_the_model_fails_on_are_at_fault_if_it_labels_the_built_in_image(label: Label, count: int) -> None:
    """Whether they are the first of the process, three in a row or all of the chunk."""
    labeled = label(photos_chunk(count), FailsOn(*range(count)))
    assert outcomes(labeled) == ["model"] * count
    assert outcomes(label(photos_chunk(2), FailsOn(7))) == ["labeled"] * 2


def test_the_built_in_image_goes_through_all_of_the_model(label: Label) -> None:
    """One batch of prompts, from the encoder to the masks, whatever the thresholds of the run are."""
    calls: list[str] = []

    class Watched(FailsOn):
        def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> np.ndarray:
            context = super().embed(frame, resized_hw)
            calls.append("embed")
            return context

        def score(self, context: np.ndarray, points_xy: np.ndarray, points_per_batch: int) -> FakeScored:
            calls.append(f"score {len(points_xy)} of {points_per_batch}")
            return super().score(context, points_xy, points_per_batch)

        def low_res_logits(self, scored: FakeScored, prompts: np.ndarray) -> np.ndarray:
            calls.append(f"logits {len(prompts)}")
            return super().low_res_logits(scored, prompts)

    strict = replace(AMG, pred_iou_thresh=1.0, points_per_side=None, point_grids=(((0.5, 0.5),),) * 3, crop_n_layers=2)
    label(chunk_of(encoded(1)), Watched(1), amg=strict)
    assert calls == ["embed", "score 16 of 64", "logits 16"]


def test_the_built_in_image_has_masks() -> None:
    pixels = probe_pixels()
    assert (pixels.shape, pixels.dtype) == ((96, 128, 3), np.uint8)
    assert label_image(FakeSam(), pixels, probe_config(AMG)).masks


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 14.3 GiB"), ValueError("a box of no size")])
@pytest.mark.parametrize("step", ["select_masks", "propose_image"])
def test_an_error_behind_the_model_costs_only_its_image(
    label: Label, step: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    unspoiled = getattr(automatic, step)

    def spoiled(*arguments: Any) -> Any:
        size_hw = arguments[1] if step == "select_masks" else arguments[1][0].box.size_hw
        if size_hw == (64, 32):
            raise error
        return unspoiled(*arguments)

    monkeypatch.setattr(automatic, step, spoiled)
    narrow = [encoded(number, photo_bytes(number, (32, 64))) for number in range(4)]
    labeled = label(chunk_of(*narrow, encoded(4), narrow[0]))
    assert outcomes(labeled) == ["model"] * 4 + ["labeled", "model"]
    assert labeled.images[0].failure and str(error) in labeled.images[0].failure.reason


def test_an_image_that_cannot_be_prepared_costs_only_itself(label: Label, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amg, "MAX_WIDTH_OF_CROPS", 63)
    narrow = encoded(1, photo_bytes(1, (32, 64)))
    labeled = label(chunk_of(encoded(0), narrow), amg=replace(AMG, crop_n_layers=1))
    assert outcomes(labeled) == ["decode", "labeled"]
    assert labeled.images[0].failure
    assert "64 pixels wide; with crop layers at most 63 are" in labeled.images[0].failure.reason
    assert outcomes(label(chunk_of(encoded(0), narrow))) == ["labeled", "labeled"]


def test_an_error_of_the_host_threads_is_the_images_failure(label: Label) -> None:
    class WrongShape(FakeSam):
        def low_res_logits(self, scored: FakeScored, prompts: np.ndarray) -> np.ndarray:
            logits = super().low_res_logits(scored, prompts)
            return logits if scored.points_xy[0, 0] == 8 else logits[:0]  # 8 = 64 / 4 / 2: not for the narrow image

    narrow = encoded(1, photo_bytes(1, (32, 64)))
    assert outcomes(label(chunk_of(encoded(0), narrow, encoded(2)), WrongShape())) == ["labeled", "model", "labeled"]


class BreaksAfter(FakeSam):
    """Works for so many images, then never again."""

    def __init__(self, images: int) -> None:
        self.left = images

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> np.ndarray:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError(f"device lost with {frame[0, 0, 0]} on it")
        return super().embed(frame, resized_hw)


def test_a_model_that_fails_on_the_built_in_image_too_ends_the_run(label: Label) -> None:
    expected = (
        r"3 images in a row and on a built-in test image \(RuntimeError: device lost with 254 on it\), so nothing of "
        r"this chunk was written\. s\.tar#1: RuntimeError: device lost with 1 on it;.*s\.tar#3"
    )
    with pytest.raises(ModelBroken, match=expected):
        label(photos_chunk(8), BreaksAfter(1))


def test_images_that_cannot_be_decoded_do_not_count_as_a_success_of_the_model(label: Label) -> None:
    bad = encoded(9, b"no image")
    with pytest.raises(ModelBroken, match="3 images in a row"):
        label(chunk_of(encoded(0), encoded(1), bad, encoded(2), bad, encoded(3)), BreaksAfter(1))


@pytest.mark.parametrize("count", [1, 2])
def test_a_model_that_never_worked_ends_the_run_however_few_the_images(label: Label, count: int) -> None:
    with pytest.raises(ModelBroken, match=rf"on {count} images? in a row.*device lost with 0"):
        label(photos_chunk(count), BreaksAfter(0))


def test_a_chunk_without_a_good_image_is_no_fault_of_the_model(label: Label) -> None:
    assert outcomes(label(chunk_of(encoded(0, b"bad"), encoded(1, b"bad")))) == ["decode", "decode"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_model_that_breaks_near_the_end_of_a_chunk_ends_the_run(label: Label, failing: int) -> None:
    with pytest.raises(ModelBroken, match=rf"on {failing} images? in a row.*device lost"):
        label(photos_chunk(4), BreaksAfter(4 - failing))


# A device whose memory runs out.

SMALL_BATCHES = replace(AMG, points_per_batch=8)


class ResourceExhaustedError(Exception):
    """As TensorFlow calls it."""


class SmallDevice(FakeSam):
    """Holds so many prompts of a batch, and remembers what it was asked for."""

    def __init__(self, holds: int, error: Exception) -> None:
        self.holds, self.error = holds, error
        self.batches: list[int] = []

    def score(self, context: np.ndarray, points_xy: np.ndarray, points_per_batch: int) -> FakeScored:
        self.batches.append(points_per_batch)
        if points_per_batch > self.holds:
            raise self.error
        return super().score(context, points_xy, points_per_batch)


EXHAUSTED = ResourceExhaustedError("OOM when allocating tensor with shape[64,256,64,64]")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (EXHAUSTED, True),
        (type("Subclass", (ResourceExhaustedError,), {})("x"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes."), True),
        (RuntimeError("Failed to load in-memory CUBIN: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), True),
        (caused(ValueError("Exception encountered when calling SAM.call()"), EXHAUSTED), True),
        (MemoryError("Unable to allocate 3 GiB"), False),
        (RuntimeError("INTERNAL: no luck"), False),
    ],
    ids=str,
)
def test_out_of_memory_is_known_by_its_name_or_its_status(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_backends_own_errors_are_known() -> None:
    tensorflow = pytest.importorskip("tensorflow")
    assert is_out_of_memory(tensorflow.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"))
    assert not is_out_of_memory(tensorflow.errors.InvalidArgumentError(None, None, "shape"))
    jax = pytest.importorskip("jax")
    assert is_out_of_memory(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."))
    assert not is_out_of_memory(jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shape"))


def test_memory_that_runs_out_halves_the_batch_for_the_rest_of_the_process(
    label: Label, caplog: pytest.LogCaptureFixture
) -> None:
    expected = rows(label(photos_chunk(6), amg=SMALL_BATCHES))
    health, device = ModelHealth(), SmallDevice(4, EXHAUSTED)
    labeler = AutomaticLabeler(device, SMALL_BATCHES)
    assert rows(label(photos_chunk(6), health=health, labeler=labeler)) == expected
    assert caplog.text.count("points_per_batch is 4 instead of 8 from here on") == 1
    assert 1 <= health.out_of_memory < 6  # those that were in flight when the first one failed, no others
    assert device.batches.count(8) == 2 * health.out_of_memory  # two batches an image

    device.batches.clear()
    assert rows(label(photos_chunk(6), health=health, labeler=labeler)) == expected
    assert set(device.batches) == {4}


def test_a_batch_of_one_is_not_halved(label: Label) -> None:
    device = SmallDevice(0, EXHAUSTED)
    with pytest.raises(ModelBroken, match="OOM when allocating"):
        label(photos_chunk(3), device, amg=replace(AMG, points_per_batch=1))
    assert set(device.batches) == {1}


def test_the_batch_is_halved_once_and_then_the_rule_for_errors_of_the_model_holds(label: Label) -> None:
    device = SmallDevice(3, EXHAUSTED)
    with pytest.raises(ModelBroken, match=r"3 images in a row.*OOM when allocating.*lower --points_per_batch"):
        label(photos_chunk(6), device, amg=SMALL_BATCHES)
    assert set(device.batches) == {8, 4}


def test_other_errors_leave_the_batch_as_it_is(label: Label) -> None:
    device, health = SmallDevice(4, MemoryError("the host's")), ModelHealth()
    with pytest.raises(ModelBroken):
        label(photos_chunk(3), device, health, amg=SMALL_BATCHES)
    assert set(device.batches) == {8} and health.out_of_memory == 0


@pytest.mark.parametrize("orientation", [1, 6])
def test_exif_orientation_is_applied_and_recorded(label: Label, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image,) = label(chunk_of(encoded(0, photo_bytes(0, format_name="JPEG", exif=exif)))).images
    # 6: the stored rows are the columns of the upright picture.
    assert (image.exif_orientation, image.size_hw) == (orientation, (48, 64) if orientation == 1 else (64, 48))


def test_image_done_is_called_with_each_image_in_order(label: Label) -> None:
    done: list[LabeledImage] = []
    chunk = chunk_of(encoded(0), encoded(1, b"bad"), encoded(2))
    assert tuple(done) == () and label(chunk, image_done=done.append).images == tuple(done)


# Batches of images. What a labeler is given, and what it makes of it, is all that is looked at.


class BatchLabeler:
    """A labeler of batches whose masks are none; it remembers its batches, an image by its brightness."""

    keep_candidates = False

    def __init__(self, images_per_batch: int, fails_on: frozenset[int] = frozenset()) -> None:
        self.images_per_batch = images_per_batch
        self.fails_on = fails_on
        self.batches: list[list[int]] = []
        self.prompts: dict[int, Prompts | None] = {}

    def prepare(self, pixels: np.ndarray, prompts: Prompts | None) -> int:
        number = int(pixels[0, 0, 0])
        self.prompts[number] = prompts
        if prompts is not None and not len(prompts):
            raise PromptError("the boxes are for 640 x 480, the image has 64 x 48")
        return number

    def label(self, batch: Sequence[int], submit: Submit) -> list[Future[ImageMasks]]:
        self.batches.append(list(batch))
        if self.fails_on & set(batch):
            raise RuntimeError(f"one of {batch} is bad")
        return [submit(ImageMasks, (), 10 * number, Dropped(stability=10 * number), Seconds()) for number in batch]

    def probe(self, pixels: np.ndarray, submit: Submit) -> Future[ImageMasks]:
        return submit(ImageMasks, (), 0, Dropped(), Seconds())

    def halve_batch(self) -> str | None:
        return None


@pytest.mark.parametrize("images_per_batch", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("bad", [(), (0,), (6,), (2, 3), (0, 1, 2, 3, 4, 5, 6)])
def test_batches_are_full_but_for_the_last_and_images_keep_their_order(
    label: Label, images_per_batch: int, bad: tuple[int, ...]
) -> None:
    labeler = BatchLabeler(images_per_batch)
    done: list[LabeledImage] = []
    chunk = chunk_of(*(encoded(number, b"bad" if number in bad else None) for number in range(7)))
    labeled = label(chunk, labeler=labeler, image_done=done.append)
    good = [number for number in range(7) if number not in bad]
    assert labeler.batches == [
        good[first : first + images_per_batch] for first in range(0, len(good), images_per_batch)
    ]
    assert [image.source.row for image in labeled.images] == list(range(7))
    assert labeled.images == tuple(done)
    assert outcomes(labeled) == ["decode" if number in bad else "empty" for number in range(7)]
    assert [image.num_candidates for image in labeled.images] == [0 if n in bad else 10 * n for n in range(7)]


def test_a_batch_never_has_images_of_two_chunks(label: Label) -> None:
    labeler = BatchLabeler(4)
    for numbers in (range(3), range(3, 9)):
        label(chunk_of(*map(encoded, numbers)), labeler=labeler)
    assert labeler.batches == [[0, 1, 2], [3, 4, 5, 6], [7, 8]]


def test_a_batch_that_fails_is_labeled_image_by_image(label: Label) -> None:
    labeler = BatchLabeler(3, fails_on=frozenset([1]))
    labeled = label(photos_chunk(6), labeler=labeler)
    assert outcomes(labeled) == ["empty", "model", "empty", "empty", "empty", "empty"]
    assert labeled.images[1].failure == Failure("model", "RuntimeError: one of [1] is bad")
    assert labeler.batches[0] == [0, 1, 2]
    assert sorted(batch for batch in labeler.batches if len(batch) == 1) == [[0], [1], [2]]
    assert [3, 4, 5] in labeler.batches and len(labeler.batches) == 5


def test_the_labeler_gets_the_prompts_of_an_image_unless_they_are_for_another(label: Label) -> None:
    box = {"image": "", "bbox": [1.0, 2.0, 3.0, 4.0]}
    labeler = BatchLabeler(2)
    images = [
        encoded(0),
        replace(encoded(1), prompts=make_batch([box, box])),
        replace(encoded(2), prompts=make_batch([{**box, "width": 640, "height": 480}])),
    ]
    finder = PromptFinder(RunPrompts(PromptConfig(("in_record",)), ImageConfig(), None, {}))
    labeled = label(chunk_of(*images), labeler=labeler, finder=finder)
    assert {number: len(prompts or ()) for number, prompts in labeler.prompts.items()} == {1: 2}
    assert outcomes(labeled) == ["empty", "empty", "prompt"]
    assert [image.num_prompts for image in labeled.images] == [0, 2, 1]
    refused = labeled.images[2]
    assert refused.failure and "for 640 x 480, the image has 64 x 48" in refused.failure.reason
    assert [image.size_hw for image in labeled.images] == [(48, 64)] * 3
    assert labeled.images[1].source.prompts is None


# The transform.

LOADED: list[ModelConfig] = []

STATES = [worker_progress.LOADING, worker_progress.READING, worker_progress.COMPILING, worker_progress.READY]


def counting_load(config: ModelConfig) -> FakeSam:
    LOADED.append(config)
    return FakeSam()


def generate(*chunks: Chunk, load: Callable[[ModelConfig], Any] = counting_load, **arguments: Any) -> beam.PTransform:
    arguments = {"backend": default_backend(), **arguments}
    make_labeler = partial(AutomaticLabeler, config=AMG)
    return beam.Create(chunks) | GenerateMasks(ModelConfig(), ImageConfig(), make_labeler, load=load, **arguments)


def labeled_rows(chunk: LabeledChunk) -> tuple[int, list[tuple[Any, ...]]]:
    return chunk.index, rows(chunk)


CHUNKS = [chunk_of(encoded(number), encoded(number + 1), index=number) for number in range(4)]


@pytest.mark.parametrize(
    "flags",
    [
        ["--direct_running_mode=in_memory"],
        ["--direct_running_mode=multi_threading", "--direct_num_workers=2"],
    ],
    ids=["one worker", "two threads"],
)
def test_the_transform_labels_every_chunk_with_one_model_a_process(label: Label, flags: list[str]) -> None:
    LOADED.clear()
    with test_pipeline.TestPipeline(runner="FnApiRunner", options=PipelineOptions(flags)) as pipeline:
        labeled = pipeline | generate(*CHUNKS) | beam.Map(labeled_rows)
        assert_that(labeled, equal_to([labeled_rows(label(chunk)) for chunk in CHUNKS]))
    (_,) = LOADED


def test_a_worker_with_another_backend_fails_before_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    LOADED.clear()
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    with (
        pytest.raises(RuntimeError, match="made for KERAS_BACKEND=jax, but a worker runs torch"),
        test_pipeline.TestPipeline(runner="FnApiRunner") as pipeline,
    ):
        pipeline | generate(CHUNKS[0], backend="jax")
    assert not LOADED


def test_each_image_is_recorded_for_the_progress_bar(tmp_path: Path) -> None:
    with test_pipeline.TestPipeline(runner="FnApiRunner") as pipeline:
        pipeline | generate(*CHUNKS, progress_dir=str(tmp_path))
    (file,) = tmp_path.iterdir()
    sizes = sorted(len(image.data) for chunk in CHUNKS for image in chunk.images)
    records = list(worker_progress.PROGRESS_RECORD.iter_unpack(file.read_bytes()))
    assert sorted(size for state, size in records if state == worker_progress.IMAGE) == sizes
    states = [state for state, _ in records if state != worker_progress.IMAGE]
    assert states == [
        worker_progress.LOADING,
        worker_progress.READING,
        worker_progress.COMPILING,
        worker_progress.READY,
    ]


def load_small_device(config: ModelConfig) -> SmallDevice:
    return SmallDevice(32, EXHAUSTED)  # half of the default


def test_images_that_were_tried_again_for_want_of_memory_are_counted(label: Label) -> None:
    pipeline = test_pipeline.TestPipeline(runner="FnApiRunner")
    labeled = pipeline | generate(CHUNKS[0], load=load_small_device) | beam.Map(labeled_rows)
    assert_that(labeled, equal_to([labeled_rows(label(CHUNKS[0]))]))
    result = pipeline.run()
    (counter,) = result.metrics().query(beam.metrics.MetricsFilter().with_name("out_of_memory"))["counters"]
    assert counter.committed == 2


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got int8"):
        ModelConfig(dtype="int8")


def test_start_up_has_no_part_in_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(worker_progress, "time", clock)
    told: list[int] = []
    start_up = worker_progress.StartUp(told.append)
    clock.now = 9.0
    start_up.loaded()
    clock.now = 11.0  # reading
    start_up.embeds()
    clock.now = 18.0  # with the first image, the model is compiled
    for _ in range(3):
        start_up.embeds()
    clock.now = 24.0
    assert start_up.finish_chunk(4) == WorkerTime(load_model=9.0, compile=7.0, label=6.0, images=3, started=1)
    assert told == STATES
    clock.now = 30.0
    assert start_up.finish_chunk(4) == WorkerTime(label=6.0, images=4)
    clock.now = 100.0  # no work for the worker
    start_up.begin_bundle()
    clock.now = 102.0
    assert start_up.finish_chunk(1) == WorkerTime(label=2.0, images=1)


def test_a_single_image_says_nothing_of_the_pace() -> None:
    start_up = worker_progress.StartUp()
    start_up.loaded()
    start_up.embeds()
    assert start_up.finish_chunk(1).images_per_second is None
