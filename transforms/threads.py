"""The host's threads: they decode, measure and encode beside the device."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from threadpoolctl import threadpool_limits

_MAX_THREADS = 16

# How work is given to threads: submit(function, *arguments).
Submit = Callable[..., "Future[Any]"]


def call_now(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """A Submit without threads: runs the call at once."""
    future: Future[Any] = Future()
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(error)
    return future


class _BlasLimit:
    """Holds numpy's BLAS at one thread as long as anybody wants it, then puts back what was before.

    The number is one of the whole process: who comes first sets it, who goes last restores it. Both do so in a thread
    that ends at once, since threadpoolctl obeys only the thread that set the number first, as long as that one lives.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._limits: Any = None

    def acquire(self) -> None:
        with self._lock:
            if self._holders == 0:
                _run_in_thread(self._limit)
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                _run_in_thread(self._limits.restore_original_limits)

    def _limit(self) -> None:
        self._limits = threadpool_limits(limits=1, user_api="blas")


def _run_in_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function, name="blas limit")
    thread.start()
    thread.join()


_blas_limit = _BlasLimit()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Runs numpy's products in the threads that ask for them, in the whole process, until the block ends.

    The matrices are small, so that threads of BLAS's own only get in the way: they wait busily for each other, and with
    several threads here postprocessing took up to 30 times as long (measured on 2 cores).
    """
    _blas_limit.acquire()
    try:
        yield
    finally:
        _blas_limit.release()


class _HostThreads(ThreadPoolExecutor):
    """Until it is shut down, BLAS has one thread."""

    def __init__(self, max_workers: int) -> None:
        super().__init__(max_workers, thread_name_prefix="host")
        self._limit = ExitStack()
        self._limit.enter_context(one_blas_thread())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        self._limit.close()  # once, however often this is called


def host_threads() -> ThreadPoolExecutor:
    """A pool for label_image's and label_chunk's `submit`; see one_blas_thread. Shut it down, or use it in a `with`."""
    return _HostThreads(max(2, min(os.cpu_count() or 1, _MAX_THREADS)))
