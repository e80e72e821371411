"""GenerateMasks: the batched DoFn that runs on the accelerator's workers.

A chunk is labeled in three overlapping steps: threads decode and prepare a few images ahead, the calling thread feeds
the device, threads measure and encode masks. Results come back in the images' order. What is asked of the model, and
what becomes of its answers, is the labeler's (transforms/labeler.py).
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared

from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.images import ImageConfig, ImageError, decode_image, read_size
from maskbeam.transforms.labeler import Labeler, MakeLabeler, PromptError
from maskbeam.transforms.load_model import LoadSam, ModelConfig, load_model, use_backend
from maskbeam.transforms.model_health import ModelBroken, ModelHealth, is_out_of_memory, probe_pixels
from maskbeam.transforms.prompt_files.finder import PromptFinder, RunPrompts
from maskbeam.transforms.records import (
    Chunk,
    DroppedPrompt,
    EncodedImage,
    Failure,
    ImageMasks,
    LabeledChunk,
    LabeledImage,
    Seconds,
)
from maskbeam.transforms.threads import host_threads
from maskbeam.transforms.worker_progress import IMAGE, PROGRESS_RECORD, StartUp, WatchedSam, open_progress

# Images decoded before the device asks for them, and images whose masks may still be in work behind it; of larger
# batches as many as one batch has.
_DECODE_AHEAD = 3
_ENCODE_BEHIND = 3

# After this many failures of the model in a row, the probe image shows whether the images or the device are at fault.
_MAX_MODEL_FAILURES_IN_A_ROW = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Decoded:
    """An image that its labeler has prepared, or one that is done without: it failed, or has no prompts."""

    labeled: LabeledImage  # without masks
    prepared: Any = None
    problems: Mapping[int, str] = field(default_factory=dict)  # of prompts, by their index

    @property
    def is_done(self) -> bool:
        return self.prepared is None


def label_chunk(
    labeler: Labeler,
    chunk: Chunk,
    image_config: ImageConfig,
    threads: ThreadPoolExecutor,
    health: ModelHealth,
    image_done: Callable[[LabeledImage], None] = lambda image: None,
    finder: PromptFinder | None = None,
) -> LabeledChunk:
    """Labels the images of a chunk; an image that cannot be labeled becomes a failure and costs only itself.

    Args:
      threads: decode, measure and encode here.
      health: carried from chunk to chunk.
      image_done: called with each image, for progress.
      finder: of the images' prompts; None = there are none, and none are needed.

    Raises:
      ModelBroken: images fail, and the built-in one does, too.
    """
    feeder = _Feeder(labeler, threads, health, image_done)
    num_ahead = max(_DECODE_AHEAD, labeler.images_per_batch)
    ahead: deque[Future[_Decoded]] = deque()
    for image in chunk.images:
        ahead.append(threads.submit(_decode, image, image_config, labeler, finder))
        if len(ahead) == num_ahead:
            feeder.feed(ahead.popleft().result())
    while ahead:
        feeder.feed(ahead.popleft().result())
    images = feeder.close()
    return LabeledChunk.of(chunk.shard, chunk.index, images, chunk.final, chunk.digest, labeler.keep_candidates)


class _Feeder:
    """Feeds prepared images to the device, batch by batch, and takes back their masks in the images' order.

    An image that fails is tried once more, alone. Failures mean a bad image or a broken device: after the third in a
    row, and at the end of a chunk whose last images failed, the probe image shows which.
    """

    def __init__(
        self,
        labeler: Labeler,
        threads: ThreadPoolExecutor,
        health: ModelHealth,
        image_done: Callable[[LabeledImage], None],
    ) -> None:
        self._labeler = labeler
        self._threads = threads
        self._health = health
        self._image_done = image_done
        self._num_behind = max(_ENCODE_BEHIND, labeler.images_per_batch)
        self._batch: list[_Decoded] = []  # waits until it is full; images without a future are among it
        # On the device, or in the host's threads; None = failed before.
        self._behind: deque[tuple[_Decoded, Future[ImageMasks] | None]] = deque()
        self._labeled: list[LabeledImage] = []
        self._failures_in_a_row: list[str] = []

    def feed(self, decoded: _Decoded) -> None:
        """Starts the batch that the next image fills, and waits for the oldest images if too many are in work.

        Raises:
          ModelBroken: see label_chunk.
        """
        self._batch.append(decoded)
        if len(_to_label(self._batch)) in (0, self._labeler.images_per_batch):
            self._start_batch()
            while len(self._behind) > self._num_behind:
                self._finish_oldest()

    def close(self) -> tuple[LabeledImage, ...]:
        """Starts what is left, and waits for the rest.

        Raises:
          ModelBroken: see label_chunk.
        """
        self._start_batch()
        while self._behind:
            self._finish_oldest()
        if self._failures_in_a_row:
            self._probe()
        return tuple(self._labeled)

    def _start_batch(self) -> None:
        good = _to_label(self._batch)
        futures = iter(self._label(good) if good else [])
        self._behind.extend((decoded, None if decoded.is_done else next(futures)) for decoded in self._batch)
        self._batch.clear()

    def _label(self, batch: list[_Decoded]) -> list[Future[ImageMasks]]:
        """Runs the model now; the futures are of the masks. An error of the model becomes that of each."""
        try:
            return self._labeler.label([decoded.prepared for decoded in batch], self._threads.submit)
        except Exception as error:
            return [_failed(error) for _ in batch]

    def _finish_oldest(self) -> None:
        decoded, future = self._behind.popleft()
        if future is None:
            self._done(decoded.labeled)
            return
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
                dropped_prompts=_with_reasons(result.dropped_prompts, decoded.problems),
                clipped_prompts=result.clipped_prompts,
            )
        )

    def _result_or_redo(self, decoded: _Decoded, future: Future[ImageMasks]) -> ImageMasks:
        try:
            return future.result()
        except Exception as error:
            _log.warning("%s failed (%s), trying again", decoded.labeled.source.image_id, describe_error(error))
            if is_out_of_memory(error):
                self._health.ran_out_of_memory(self._labeler)
        (again,) = self._label([decoded])
        return again.result()

    def _probe(self) -> None:
        """Labels the built-in image. If that works, the images that failed are at fault, and counting starts over.

        Raises:
          ModelBroken: it does not work.
        """
        count = len(self._failures_in_a_row)
        try:
            self._labeler.probe(probe_pixels(), self._threads.submit).result()
        except Exception as error:
            raise ModelBroken(
                f"the model failed on {count} image{'s' * (count != 1)} in a row and on a built-in test image "
                f"({describe_error(error)}), so nothing of this chunk was written. "
                f"{'; '.join(self._failures_in_a_row)}. Look at the first error: if memory ran out, lower "
                "--points_per_batch."
            ) from error
        self._failures_in_a_row.clear()

    def _done(self, image: LabeledImage) -> None:
        self._labeled.append(image)
        self._image_done(image)


def _to_label(batch: list[_Decoded]) -> list[_Decoded]:
    return [decoded for decoded in batch if not decoded.is_done]


def _with_reasons(dropped: tuple[DroppedPrompt, ...], problems: Mapping[int, str]) -> tuple[DroppedPrompt, ...]:
    """Dropped prompts with what was wrong with them before they were prompts."""
    return tuple(replace(prompt, reason=problems.get(prompt.index, prompt.reason)) for prompt in dropped)


def _failed(error: Exception) -> Future[ImageMasks]:
    future: Future[ImageMasks] = Future()
    future.set_exception(error)
    return future


def _decode(image: EncodedImage, config: ImageConfig, labeler: Labeler, finder: PromptFinder | None) -> _Decoded:
    """Bytes -> what the labeler makes of the pixels. The decoded image itself is not kept.

    Where there are prompts, but none for this image, only its header is read.
    """
    start = time.perf_counter()
    sha256 = hashlib.sha256(image.data).hexdigest() if image.data else ""
    labeled = LabeledImage(
        replace(image, data=b"", prompts=None), len(image.data), sha256, None, 1, failure=image.failure
    )
    if image.failure:
        return _Decoded(labeled)
    sized, resolved = labeled, None
    try:
        found = None
        if finder is not None:
            found = finder.find(image)
            labeled = replace(
                labeled,
                num_prompts=len(found.rows) if found else 0,
                prompts_key=found.key if found else None,
            )
            if found is None:
                size_hw, exif_orientation = read_size(image.data, config)
                return _Decoded(replace(labeled, size_hw=size_hw, exif_orientation=exif_orientation))
        decoded = decode_image(image.data, config)
        height, width = decoded.pixels.shape[:2]
        sized = replace(labeled, size_hw=(height, width), exif_orientation=decoded.exif_orientation)
        if finder is not None and found is not None:
            resolved = finder.resolve(found, (height, width), decoded.exif_orientation)
        prepared = labeler.prepare(decoded.pixels, resolved.prompts if resolved else None)
    except PromptError as error:
        return _Decoded(replace(sized, failure=Failure("prompt", str(error))))
    except Exception as error:  # whatever it is, it is this image's
        reason = str(error) if isinstance(error, ImageError) else describe_error(error)
        return _Decoded(replace(labeled, failure=Failure("decode", reason)))
    sized = replace(sized, seconds=Seconds(decode=time.perf_counter() - start))
    return _Decoded(sized, prepared, resolved.problems if resolved else {})


class _SharedLabeler:
    """One labeler, with its model, a process; the lock is a guard for runners with several bundle threads."""

    def __init__(
        self,
        load: Callable[[], Any],
        make: MakeLabeler,
        tell: Callable[[int], None],
        prompts: RunPrompts | None,
    ) -> None:
        self.finder = None if prompts is None else PromptFinder(prompts)  # before the model, which takes longer
        self.start_up = StartUp(tell)
        self.labeler = make(WatchedSam(load(), self.start_up))
        self.start_up.loaded()
        self.lock = threading.Lock()
        self.health = ModelHealth()


@dataclass(eq=False, repr=False)
class GenerateMasks(beam.PTransform):
    """PCollection[Chunk] -> PCollection[LabeledChunk].

    Attributes:
      make_labeler: around the model, once a process.
      backend: the Keras backend the job was made for; workers set it, or fail if they already run another.
      load: makes the model; tests give a fake.
      progress_dir: a local directory where each process notes how far it is, for the launcher's progress bar.
      prompts: of the images; None = the labeler needs none.
    """

    model: ModelConfig
    images: ImageConfig
    make_labeler: MakeLabeler
    backend: str
    load: LoadSam = load_model
    progress_dir: str | None = None
    prompts: RunPrompts | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, chunks: beam.PCollection) -> beam.PCollection:
        return chunks | beam.ParDo(_GenerateMasksFn(self)).with_output_types(LabeledChunk)


class _GenerateMasksFn(beam.DoFn):
    """Owns the labeler of the process and the threads around it."""

    def __init__(self, settings: GenerateMasks) -> None:
        self._settings = settings
        self._shared = Shared()

    def setup(self) -> None:
        settings = self._settings
        use_backend(settings.backend)
        # First of all, so that the launcher knows the process and can stop it.
        self._progress = open_progress(settings.progress_dir)
        if self._progress is not None:  # a local worker process tells its life's story at INFO
            logging.getLogger("apache_beam.runners.worker").setLevel(logging.WARNING)
        self._model = self._shared.acquire(
            lambda: _SharedLabeler(
                lambda: settings.load(settings.model), settings.make_labeler, self._tell, settings.prompts
            )
        )
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
                self._model.labeler,
                chunk,
                self._settings.images,
                self._threads,
                self._model.health,
                image_done=self._image_done,
                finder=self._model.finder,
            )
            if self._model.finder is not None:
                any_found = any(image.num_prompts for image in labeled.images)
                self._model.finder.check((image.source.image_id for image in labeled.images), any_found)
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
