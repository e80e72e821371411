"""How far a worker process is: loading, compiling, labeling. For the launcher's progress bar, and for the totals."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from maskbeam.transforms.masks.amg import Sam
from maskbeam.transforms.records import WorkerTime

# What a process appends to its progress file: a state when it begins something, and for each image its encoded bytes.
PROGRESS_RECORD = struct.Struct("<BQ")
LOADING, READING, COMPILING, READY, IMAGE = range(5)


def open_progress(progress_dir: str | None) -> int | None:
    """The process's own progress file, named by its id: a PROGRESS_RECORD for each state and each image."""
    if progress_dir is None:
        return None
    return os.open(os.path.join(progress_dir, str(os.getpid())), os.O_WRONLY | os.O_CREAT | os.O_APPEND)


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


class WatchedSam:
    """A Sam that says when it is given something."""

    def __init__(self, sam: Sam, start_up: StartUp) -> None:
        self._sam = sam
        self._start_up = start_up

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sam, name)

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> Any:
        self._start_up.embeds()
        return self._sam.embed(frame, resized_hw)
