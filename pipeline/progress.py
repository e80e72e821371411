"""Progress bars, and that of a local run: images, images/s and the time left, as its worker processes say.

Each process appends a record an image to its own file (transforms/segment.py), so it works the same with threads and
with processes. Where only the bytes of the input are known, not the images in it, the total is an estimate, marked ~.
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

from transforms.segment import PROGRESS_RECORD

# Without a terminal a line is printed this often, in seconds.
_LINE_INTERVAL = 10.0


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
        self._read: dict[str, tuple[int, int]] = {}  # process -> (images, bytes)
        self._start = time.monotonic()
        self._printed = self._start
        self._bar: tqdm | None = None
        self._quiet = config.quiet
        if sys.stderr.isatty() and not config.quiet:
            self._bar = progress_bar(initial=done_images, unit="image")

    @property
    def images(self) -> int:
        """Images done by this start."""
        return sum(images for images, _ in self._read.values())

    @property
    def processes(self) -> list[int]:
        """Ids of the processes that work, or did."""
        return [int(name) for name in self._read]

    def update(self) -> None:
        """Reads what the processes wrote and shows it."""
        for name in os.listdir(self._directory):
            images, size = self._read.get(name, (0, 0))
            with open(self._directory / name, "rb") as file:
                file.seek(images * PROGRESS_RECORD.size)
                records = file.read()
            whole = len(records) // PROGRESS_RECORD.size
            added = PROGRESS_RECORD.iter_unpack(records[: whole * PROGRESS_RECORD.size])
            self._read[name] = (images + whole, size + sum(record[0] for record in added))
        done, total = self._before[0] + self.images, self.estimate_total()
        if self._bar is not None:
            self._bar.total = total
            self._bar.unit = "image" if self._exact_total is not None else "image (~total)"
            self._bar.update(done - self._bar.n)
            self._bar.refresh()
        elif not self._quiet and time.monotonic() - self._printed >= _LINE_INTERVAL:
            self._printed = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def estimate_total(self) -> int | None:
        """Images in the whole input: exact, or as the bytes an image so far suggest; None before the first."""
        if self._exact_total is not None:
            return self._exact_total
        images = self._before[0] + self.images
        size = self._before[1] + sum(size for _, size in self._read.values())
        return max(round(self._total_bytes * images / size), images) if size else None

    def line(self) -> str:
        """One line for logs.

        Like "120/~380 images, 2.1 images/s, 02:04 left".
        """
        done, total, seconds = self._before[0] + self.images, self.estimate_total(), time.monotonic() - self._start
        rate = self.images / seconds if seconds else 0.0
        mark = "" if self._exact_total is not None else "~"
        left = f", {tqdm.format_interval((total - done) / rate)} left" if total is not None and rate else ""
        return f"{done}/{mark}{total if total is not None else '?'} images, {rate:.2f} images/s{left}"

    def close(self) -> None:
        """Ends the bar."""
        self.update()
        if self._bar is not None:
            self._bar.close()
