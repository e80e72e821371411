"""Progress bars, and that of a local run: images, images/s and the time left, as its worker processes say.

Each process appends to its own file a record for each image, and for each state of its start-up
(transforms/worker_progress.py), so it works the same with threads and with processes. Where only the bytes of the input
are known, not the images in it, the total is an estimate, marked ~.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from maskbeam.transforms.worker_progress import COMPILING, IMAGE, LOADING, PROGRESS_RECORD, READING, READY

# Without a terminal a line is printed this often, in seconds, and a first one soon: a model takes its time to load.
_LINE_INTERVAL = 10.0
_FIRST_LINE = 2.0

# What a run does before its first worker is ready, as its foremost worker says; processes start before they say so.
_STARTING = "starting"
_STATES = {LOADING: "loading model", READING: "reading", COMPILING: "compiling"}


def progress_bar(items: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """tqdm's bar with rate and time left, if somebody is there to see it.

    Args:
      items: what to go through, unless update() is called instead.
      options: of tqdm: unit, total, initial.
    """
    return tqdm(items, dynamic_ncols=True, file=sys.stderr, disable=not sys.stderr.isatty(), **options)


@dataclass(frozen=True)
class ProgressConfig:
    """What is shown while the command runs.

    Attributes:
      quiet: show no progress, only warnings and the result.
    """

    quiet: bool = False


class Progress:
    """Shows how far the run is. Call update() now and then from one thread, close() at the end."""

    def __init__(
        self,
        directory: Path,
        total_images: int | None,
        total_bytes: int,
        done_images: int,
        done_bytes: int,
        config: ProgressConfig = ProgressConfig(),
    ) -> None:
        """
        Args:
          directory: where the processes write.
          total_images: exact, or None if only total_bytes is known.
          done_images, done_bytes: of earlier starts.
        """
        self._directory = directory
        self._exact_total = total_images
        self._total_bytes = total_bytes
        self._before = (done_images, done_bytes)
        self._read: dict[str, tuple[int, int, int]] = {}  # process -> (records, images, bytes)
        start = time.monotonic()
        self._printed = start + _FIRST_LINE - _LINE_INTERVAL
        self._begun = {_STARTING: start}  # state -> since when, in their order
        self._ready: float | None = None
        self._num_ready = 0
        self._bar: tqdm | None = None
        self._quiet = config.quiet
        if sys.stderr.isatty() and not config.quiet:
            self._bar = progress_bar(initial=done_images, unit="image")

    @property
    def images(self) -> int:
        """Images done by this start."""
        return sum(images for _, images, _ in self._read.values())

    @property
    def start_up(self) -> dict[str, float]:
        """Seconds of the start-up, by what they were spent on; up to now while it lasts."""
        begun = list(self._begun.values())
        ends = [*begun[1:], time.monotonic() if self._ready is None else self._ready]
        return {state: end - since for state, since, end in zip(self._begun, begun, ends, strict=True)}

    @property
    def pace(self) -> tuple[int, float]:
        """Images and the seconds they took, of all workers, from when the first was ready."""
        if self._ready is None:
            return 0, 0.0
        # A worker is ready when an image is through its model; that one was made before.
        return max(self.images - self._num_ready, 0), time.monotonic() - self._ready

    def update(self) -> None:
        """Reads what the processes wrote and shows it."""
        for name in os.listdir(self._directory):
            records, images, size = self._read.get(name, (0, 0, 0))
            with open(self._directory / name, "rb") as file:
                file.seek(records * PROGRESS_RECORD.size)
                added = file.read()
            whole = len(added) // PROGRESS_RECORD.size
            for state, num_bytes in PROGRESS_RECORD.iter_unpack(added[: whole * PROGRESS_RECORD.size]):
                images, size = images + (state == IMAGE), size + num_bytes
                self._enter(state)
            self._read[name] = (records + whole, images, size)
        self._show()

    def _enter(self, state: int) -> None:
        now = time.monotonic()
        self._num_ready += state == READY
        if self._ready is None and state in (READY, IMAGE):
            self._ready = now
        elif self._ready is None:
            self._begun.setdefault(_STATES[state], now)

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.total = self.estimate_total()
            self._bar.unit = "image" if self._exact_total is not None else "image (~total)"
            if self._ready is None:
                self._bar.unpause()  # the start-up has no part in the rate
            self._bar.set_description("" if self._ready is not None else self._describe_state(), refresh=False)
            self._bar.update(self._before[0] + self.images - self._bar.n)
            self._bar.refresh()
        elif not self._quiet and time.monotonic() - self._printed >= _LINE_INTERVAL:
            self._printed = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def _describe_state(self) -> str:
        state, seconds = list(self.start_up.items())[-1]
        return f"{state}, {seconds:.0f} s"

    def estimate_total(self) -> int | None:
        """Images in the whole input: exact, or as the bytes an image so far suggest; None before the first."""
        if self._exact_total is not None:
            return self._exact_total
        images = self._before[0] + self.images
        size = self._before[1] + sum(size for _, _, size in self._read.values())
        return max(round(self._total_bytes * images / size), images) if size else None

    def line(self) -> str:
        """One line for logs.

        Like "120/~380 images, 2.10 images/s, 02:04 left" or "0/380 images, loading model, 12 s".
        """
        done, total = self._before[0] + self.images, self.estimate_total()
        mark = "" if self._exact_total is not None else "~"
        count = f"{done}/{mark}{total if total is not None else '?'} images"
        if self._ready is None:
            return f"{count}, {self._describe_state()}"
        images, seconds = self.pace
        if not images or not seconds:
            return count
        left = f", {tqdm.format_interval((total - done) * seconds / images)} left" if total is not None else ""
        return f"{count}, {images / seconds:.2f} images/s{left}"

    def close(self) -> None:
        """Ends the bar."""
        self.update()
        if self._bar is not None:
            self._bar.close()
