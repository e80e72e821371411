"""Ctrl-C (SIGINT) and SIGTERM, at any moment: one line, exit code 130 or 143, nothing left behind.

A thread of its own takes the signals: an exception in the main thread is lost where it hits an import or a library's
callback, and comes late where native code runs. While a command works, the main thread is interrupted, too, so that it
cleans up what it was writing as after any error. It has a few seconds for that; then the process ends, whatever other
threads (a runner's, an upload's) still do.

Nothing is imported here that takes time: the program handles signals before it loads anything else.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

# How the line begins. The exit code is the one that shells give: 128 and the signal.
_WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

# For the line to be printed (nobody may be reading), for the main thread to unwind, and until the process ends in any
# case. Slurm gives 30 s, docker stop 10.
_SAY_SECONDS = 1.0
_UNWIND_SECONDS = 4.0
_END_SECONDS = 7.0


class _State:
    """Of the process; there is one, as of its signals."""

    def __init__(self) -> None:
        self.received = False
        self.working = False  # the main thread, in a command: it is waited for
        self.raises = False
        self.said = threading.Event()
        self.unwound = threading.Event()
        self.requests: list[tuple[Callable[[], None], str]] = []


_state = _State()


def handle_signals() -> None:
    """Handles the signals from now on, for the rest of the process's life. To be called by the main thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as shells start jobs in the background
            signal.signal(number, _interrupt_main_thread)
    atexit.register(_stop_handling)  # the first to be registered: the last to be called


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While a command works, after its imports: a signal raises KeyboardInterrupt in the main thread.

    After a signal the block is never left: the process ends when it is through with cleaning up.
    """
    _state.raises = _state.working = not _state.received
    try:
        yield
    finally:
        _state.raises = False
        if _state.received:
            _await_end()
        _state.working = False


@contextlib.contextmanager
def when_interrupted(clean_up: Callable[[], None] = lambda: None, sentence: str = "") -> Iterator[None]:
    """What else a signal does while the block runs.

    Args:
      clean_up: removes what must not be left behind. It is called from another thread after the main one unwound, and
        whatever that one removed by itself.
      sentence: what the user should know, after "interrupted."
    """
    request = (clean_up, sentence)
    _state.requests.append(request)
    try:
        yield
    finally:
        if not _state.received:
            _state.requests.remove(request)


def describe_interruption(number: int) -> str:
    """The one line."""
    sentence = next((sentence for _, sentence in reversed(_state.requests) if sentence), "")
    return f"maskbeam: {_WORDS[number]}{f'. {sentence}' if sentence else ''}"


def _interrupt_main_thread(number: int, frame: FrameType | None) -> None:
    """Python's own part of the signal, in the main thread. A second one must not interrupt the cleaning up."""
    _state.received = True
    if _state.raises:
        _state.raises = False
        _state.said.wait(_SAY_SECONDS)  # before anything breaks, and threads say so
        raise KeyboardInterrupt


def _stop_handling() -> None:
    """The work is done, and said: from here on a signal changes nothing.

    Python would restore what the system does by default, and the signal would end a command that had succeeded.
    """
    for number in _WORDS:
        signal.signal(number, signal.SIG_IGN)
    if _state.received:
        _await_end()


def _await_end() -> NoReturn:
    """The main thread's end: also what libraries registered for the exit, as the job servers of runners."""
    atexit.unregister(_stop_handling)
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    _state.unwound.set()
    while True:
        time.sleep(1)


def _watch(reader: int) -> None:
    """Waits for a signal, then sees to it that the process ends."""
    while (number := os.read(reader, 1)[0]) not in _WORDS:
        pass
    _state.received = True
    threading.Thread(target=_end, args=(number,), daemon=True).start()
    deadline = time.monotonic() + _END_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            os.read(reader, 1)
            _state.unwound.set()  # a second signal: the main thread is not waited for any longer
    os._exit(128 + number)


def _end(number: int) -> None:
    """Says the line, waits for the main thread, cleans up and ends the process."""
    _say(describe_interruption(number))
    _state.said.set()
    if _state.working:
        _state.unwound.wait(_UNWIND_SECONDS)
    for clean_up, _ in reversed(_state.requests):
        with contextlib.suppress(Exception):
            clean_up()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(128 + number)


def _say(line: str) -> None:
    """Prints the last line: what threads and libraries say while everything ends is no news to anybody."""
    # Not to file descriptor 2: while a model loads, sys.stderr is elsewhere
    # (maskbeam.transforms.load_model.load_model).
    with contextlib.suppress(Exception):
        below_the_bar = "\n" if sys.stderr.isatty() else ""
        print(f"{below_the_bar}{line}", file=sys.stderr, flush=True)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (sys.stderr.fileno(), 2):
            os.dup2(nowhere, descriptor)
