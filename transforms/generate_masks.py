"""GenerateMasks: the batched DoFn that runs on the accelerator's workers.

A chunk is labeled image by image in three overlapping steps: threads decode a few images ahead, the calling thread
feeds the device, threads measure and encode masks. Results come back in the images' order.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared

from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.images import ImageConfig, ImageError, decode_image
from maskbeam.transforms.load_model import LoadSam, ModelConfig, load_model, use_backend
from maskbeam.transforms.masks.amg import (
    AmgConfig,
    Crop,
    ImageMasks,
    Sam,
    prepare_crops,
    propose_image,
    select_masks,
)
from maskbeam.transforms.records import Chunk, EncodedImage, Failure, LabeledChunk, LabeledImage, Seconds, WorkerTime
from maskbeam.transforms.threads import host_threads

# Images decoded before the device asks for them, and images whose masks may still be in work behind it.
_DECODE_AHEAD = 3
_ENCODE_BEHIND = 3

# After this many failures of the model in a row, the probe image shows whether the images or the device are at fault.
_MAX_MODEL_FAILURES_IN_A_ROW = 3

# How XLA and CUDA say that the device's memory ran out.
_OUT_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED|CUDA_ERROR_OUT_OF_MEMORY")

# What a process appends to its progress file when it begins something: a state; for each image: the encoded bytes.
PROGRESS_RECORD = struct.Struct("<BQ")
LOADING, READING, COMPILING, READY, IMAGE = range(5)

_log = logging.getLogger(__name__)


class ModelBroken(RuntimeError):
    """The model fails on the built-in image, too: the accelerator, its memory or the installation, not the data."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if the device's memory ran out, on either backend. The host's MemoryError is something else.

    TensorFlow raises ResourceExhaustedError, or what XLA says as an InternalError; JAX raises XlaRuntimeError or
    JaxRuntimeError with the status in its text; Keras may wrap any of them.
    """
    cause: BaseException | None = error
    while cause is not None:
        names = {kind.__name__ for kind in type(cause).__mro__}
        if "ResourceExhaustedError" in names or _OUT_OF_MEMORY.search(str(cause)):
            return True
        cause = cause.__cause__
    return False


@dataclass
class ModelHealth:
    """What the device can hold, as far as is known, over the chunks of one process.

    Attributes:
      batch_divisor: 2 once the device's memory ran out: points_per_batch is halved from then on. Never more: a device
        that cannot hold half of what was asked for wants another setting, not slower and slower work.
      out_of_memory: images that were tried again because of that.
    """

    batch_divisor: int = 1
    out_of_memory: int = 0

    def fit_batch(self, config: AmgConfig) -> AmgConfig:
        """The parameters with a points_per_batch that the device can hold, as far as is known."""
        if self.batch_divisor == 1:
            return config
        return replace(config, points_per_batch=max(config.points_per_batch // self.batch_divisor, 1))

    def ran_out_of_memory(self, config: AmgConfig) -> None:
        """The device's memory ran out on an image, which is tried again next."""
        self.out_of_memory += 1
        if self.batch_divisor == 1 and config.points_per_batch > 1:
            self.batch_divisor = 2
            _log.warning(
                "the device's memory ran out: points_per_batch is %d instead of %d from here on. Set "
                "--points_per_batch lower to begin with that",
                self.fit_batch(config).points_per_batch,
                config.points_per_batch,
            )


@dataclass(frozen=True)
class _Decoded:
    """An image ready for the device, or why it never will be."""

    labeled: LabeledImage  # without masks
    crops: list[Crop]


def label_chunk(
    sam: Sam,
    chunk: Chunk,
    image_config: ImageConfig,
    amg_config: AmgConfig,
    threads: ThreadPoolExecutor,
    health: ModelHealth,
    image_done: Callable[[LabeledImage], None] = lambda image: None,
) -> LabeledChunk:
    """Labels the images of a chunk; an image that cannot be labeled becomes a failure and costs only itself.

    Args:
      threads: decode, measure and encode here.
      health: carried from chunk to chunk.
      image_done: called with each image, for progress.

    Raises:
      ModelBroken: images fail, and the built-in one does, too.
    """
    decode = partial(_decode, image_config=image_config, amg_config=amg_config, frame_size=sam.frame_size)
    labeler = _ChunkLabeler(sam, amg_config, threads, health, image_done)
    ahead: deque[Future[_Decoded]] = deque()
    for image in chunk.images:
        ahead.append(threads.submit(decode, image))
        if len(ahead) == _DECODE_AHEAD:
            labeler.feed(ahead.popleft().result())
    while ahead:
        labeler.feed(ahead.popleft().result())
    images = labeler.close()
    return LabeledChunk(chunk.shard, chunk.index, images, chunk.final, chunk.digest, amg_config.keep_candidates)


class _ChunkLabeler:
    """Feeds decoded images to the device and takes back their masks, in the images' order.

    An image that fails is tried once more. Failures mean a bad image or a broken device: after the third in a row, and
    at the end of a chunk whose last images failed, the probe image shows which.
    """

    def __init__(
        self,
        sam: Sam,
        config: AmgConfig,
        threads: ThreadPoolExecutor,
        health: ModelHealth,
        image_done: Callable[[LabeledImage], None],
    ) -> None:
        self._sam = sam
        self._config = config
        self._threads = threads
        self._health = health
        self._image_done = image_done
        self._behind: deque[tuple[_Decoded, Future[ImageMasks]]] = deque()  # on the device, or in the host's threads
        self._labeled: list[LabeledImage] = []
        self._failures_in_a_row: list[str] = []

    def feed(self, decoded: _Decoded) -> None:
        """Starts the next image, and waits for the oldest one if too many are in work.

        Raises:
          ModelBroken: see label_chunk.
        """
        if decoded.labeled.failure:
            self._finish_all()  # keep the images' order
            self._done(decoded.labeled)
            return
        self._behind.append((decoded, self._generate(decoded, self._config)))
        if len(self._behind) > _ENCODE_BEHIND:
            self._finish_oldest()

    def close(self) -> tuple[LabeledImage, ...]:
        """Waits for the rest.

        Raises:
          ModelBroken: see label_chunk.
        """
        self._finish_all()
        if self._failures_in_a_row:
            self._probe()
        return tuple(self._labeled)

    def _finish_all(self) -> None:
        while self._behind:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        decoded, future = self._behind.popleft()
        try:
            result = self._result_or_redo(decoded, future)
        except Exception as error:
            self._done(replace(decoded.labeled, failure=Failure("model", describe_error(error))))
            self._failures_in_a_row.append(f"{decoded.labeled.source.image_id}: {describe_error(error)}")
            if len(self._failures_in_a_row) >= _MAX_MODEL_FAILURES_IN_A_ROW:
                self._probe()
            return
        self._failures_in_a_row.clear()
        self._done(
            replace(
                decoded.labeled,
                masks=result.masks,
                num_candidates=result.num_candidates,
                dropped=result.dropped,
                seconds=decoded.labeled.seconds + result.seconds,
                candidates=result.candidates,
            )
        )

    def _result_or_redo(self, decoded: _Decoded, future: Future[ImageMasks]) -> ImageMasks:
        try:
            return future.result()
        except Exception as error:
            _log.warning("%s failed (%s), trying again", decoded.labeled.source.image_id, describe_error(error))
            if is_out_of_memory(error):
                self._health.ran_out_of_memory(self._config)
        return self._generate(decoded, self._config).result()

    def _probe(self) -> None:
        """Labels the built-in image. If that works, the images that failed are at fault, and counting starts over.

        Raises:
          ModelBroken: it does not work.
        """
        config, count = probe_config(self._config), len(self._failures_in_a_row)
        try:
            self._generate(_prepare_probe(config, self._sam.frame_size), config).result()
        except Exception as error:
            raise ModelBroken(
                f"the model failed on {count} image{'s' * (count != 1)} in a row and on a built-in test image "
                f"({describe_error(error)}), so nothing of this chunk was written. "
                f"{'; '.join(self._failures_in_a_row)}. Look at the first error: if memory ran out, lower "
                "--points_per_batch."
            ) from error
        self._failures_in_a_row.clear()

    def _generate(self, decoded: _Decoded, config: AmgConfig) -> Future[ImageMasks]:
        """Runs the model now; the future is of the masks. An error of the model becomes the future's."""
        assert decoded.labeled.size_hw is not None  # decoding succeeded
        config = self._health.fit_batch(config)
        try:
            selected, seconds = propose_image(self._sam, decoded.crops, config, self._threads.submit)
        except Exception as error:
            failed: Future[ImageMasks] = Future()
            failed.set_exception(error)
            return failed
        return self._threads.submit(select_masks, selected, decoded.labeled.size_hw, config, seconds)

    def _done(self, image: LabeledImage) -> None:
        self._labeled.append(image)
        self._image_done(image)


def probe_pixels() -> np.ndarray:
    """The built-in test image, (96, 128, 3) uint8: a bright disc on a gradient."""
    y, x = np.mgrid[:96, :128]
    pixels = 255 - np.stack([x, y, x + y], axis=-1).astype(np.uint8)
    pixels[np.hypot(x - 64, y - 48) < 24] = (240, 200, 80)
    return pixels


def probe_config(config: AmgConfig) -> AmgConfig:
    """Parameters for the probe: one batch of prompts through all of the model, whatever it thinks of them."""
    return replace(
        config.without_candidates(), points_per_side=4, point_grids=None, crop_n_layers=0, pred_iou_thresh=0.0
    )


def _prepare_probe(config: AmgConfig, frame_size: int) -> _Decoded:
    pixels = probe_pixels()
    source = EncodedImage("the built-in test image", 0, None, None, b"")
    labeled = LabeledImage(source, 0, "", (pixels.shape[0], pixels.shape[1]), 1)
    return _Decoded(labeled, prepare_crops(pixels, config, frame_size))


def _decode(image: EncodedImage, image_config: ImageConfig, amg_config: AmgConfig, frame_size: int) -> _Decoded:
    """Bytes -> crops. The decoded image itself is not kept."""
    start = time.perf_counter()
    sha256 = hashlib.sha256(image.data).hexdigest() if image.data else ""
    labeled = LabeledImage(replace(image, data=b""), len(image.data), sha256, None, 1, failure=image.failure)
    if image.failure:
        return _Decoded(labeled, [])
    try:
        decoded = decode_image(image.data, image_config)
        crops = prepare_crops(decoded.pixels, amg_config, frame_size)
    except Exception as error:  # whatever it is, it is this image's
        reason = str(error) if isinstance(error, ImageError) else describe_error(error)
        return _Decoded(replace(labeled, failure=Failure("decode", reason)), [])
    size_hw = decoded.pixels.shape[0], decoded.pixels.shape[1]
    seconds = Seconds(decode=time.perf_counter() - start)
    return _Decoded(
        replace(labeled, size_hw=size_hw, exif_orientation=decoded.exif_orientation, seconds=seconds), crops
    )


class StartUp:
    """A model's way from loading to its pace, and the wall time of all that. A process has one.

    Nothing says when a model is compiled. But when it is given the second image (or crop), the first is through.
    """

    def __init__(self, tell: Callable[[int], None] = lambda state: None) -> None:
        """
        Args:
          tell: called with LOADING, READING, COMPILING and READY as they begin.
        """
        self._tell = tell
        self._embeds = 0
        self._since = time.perf_counter()
        self._time = WorkerTime()
        tell(LOADING)

    def loaded(self) -> None:
        """The model is there."""
        self._time = WorkerTime(load_model=self._lap(), started=1)
        self._tell(READING)

    def embeds(self) -> None:
        """The model is given an image or a crop."""
        self._embeds += 1
        if self._embeds == 1:
            self._lap()
            self._tell(COMPILING)
        elif self._embeds == 2:
            self._through()

    def begin_bundle(self) -> None:
        """What came before was waiting for work."""
        self._lap()

    def finish_chunk(self, images: int) -> WorkerTime:
        """The time since the last chunk, or since the process began."""
        if self._embeds == 1:
            self._embeds += 1
            self._through()
        time_taken = self._time + WorkerTime(label=self._lap(), images=images)
        self._time = WorkerTime()
        return time_taken

    def _through(self) -> None:
        # The first image has no part in the pace: how much of its time was compiling is not known.
        self._time += WorkerTime(compile=self._lap(), images=-1)
        self._tell(READY)

    def _lap(self) -> float:
        before, self._since = self._since, time.perf_counter()
        return self._since - before


class _WatchedSam:
    """A model that says when it is given something."""

    def __init__(self, sam: Sam, start_up: StartUp) -> None:
        self.frame_size = sam.frame_size
        self.low_size = sam.low_size
        self.score = sam.score
        self.low_res_logits = sam.low_res_logits
        self.prompt_batches = sam.prompt_batches
        self.score_prompts = sam.score_prompts
        self.refine_prompts = sam.refine_prompts
        self.mask_logits = sam.mask_logits
        self._embed = sam.embed
        self._start_up = start_up

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> Any:
        self._start_up.embeds()
        return self._embed(frame, resized_hw)


class _SharedModel:
    """One model a process; the lock is a guard for runners with several bundle threads."""

    def __init__(self, load: Callable[[], Sam], tell: Callable[[int], None]) -> None:
        self.start_up = StartUp(tell)
        self.sam = _WatchedSam(load(), self.start_up)
        self.start_up.loaded()
        self.lock = threading.Lock()
        self.health = ModelHealth()


class GenerateMasks(beam.PTransform):
    """PCollection[Chunk] -> PCollection[LabeledChunk]."""

    def __init__(
        self,
        model: ModelConfig,
        images: ImageConfig,
        amg: AmgConfig,
        backend: str,
        load: LoadSam = load_model,
        progress_dir: str | None = None,
    ) -> None:
        """
        Args:
          backend: the Keras backend the job was made for; workers set it, or fail if they already run another.
          load: makes the model; tests give a fake.
          progress_dir: a local directory where each process tells how far it is, for the launcher's progress bar.
        """
        super().__init__()
        self._arguments = (model, images, amg, backend, load, progress_dir)

    def expand(self, chunks: beam.PCollection) -> beam.PCollection:
        return chunks | beam.ParDo(_GenerateMasksFn(*self._arguments)).with_output_types(LabeledChunk)


class _GenerateMasksFn(beam.DoFn):
    """Owns the model of the process and the threads around it."""

    def __init__(
        self,
        model: ModelConfig,
        images: ImageConfig,
        amg: AmgConfig,
        backend: str,
        load: LoadSam,
        progress_dir: str | None,
    ) -> None:
        self._model_config = model
        self._image_config = images
        self._amg_config = amg
        self._backend = backend
        self._load = load
        self._progress_dir = progress_dir
        self._shared = Shared()

    def setup(self) -> None:
        use_backend(self._backend)
        # First of all, so that the launcher knows the process and can stop it.
        self._progress = open_progress(self._progress_dir)
        if self._progress is not None:  # a local worker process tells its life's story at INFO
            logging.getLogger("apache_beam.runners.worker").setLevel(logging.WARNING)
        self._model = self._shared.acquire(lambda: _SharedModel(lambda: self._load(self._model_config), self._tell))
        self._threads = host_threads()

    def start_bundle(self) -> None:
        self._model.start_up.begin_bundle()

    def teardown(self) -> None:
        self._threads.shutdown()
        if self._progress is not None:
            os.close(self._progress)

    def process(self, chunk: Chunk) -> Iterator[LabeledChunk]:
        with self._model.lock:
            out_of_memory = self._model.health.out_of_memory
            labeled = label_chunk(
                self._model.sam,
                chunk,
                self._image_config,
                self._amg_config,
                self._threads,
                self._model.health,
                image_done=self._image_done,
            )
            labeled = replace(labeled, workers=self._model.start_up.finish_chunk(len(labeled.images)))
            out_of_memory = self._model.health.out_of_memory - out_of_memory
        if out_of_memory:
            Metrics.counter("maskbeam", "out_of_memory").inc(out_of_memory)
        yield labeled

    def _image_done(self, image: LabeledImage) -> None:
        self._tell(IMAGE, image.num_bytes)

    def _tell(self, state: int, num_bytes: int = 0) -> None:
        if self._progress is not None:
            os.write(self._progress, PROGRESS_RECORD.pack(state, num_bytes))


def open_progress(progress_dir: str | None) -> int | None:
    """The process's own progress file, named by its id: a PROGRESS_RECORD for each state and each image."""
    if progress_dir is None:
        return None
    return os.open(os.path.join(progress_dir, str(os.getpid())), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
