"""The host's threads: they decode, measure and encode beside the device."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from threadpoolctl import threadpool_limits

_MAX_THREADS = 16


def host_threads() -> ThreadPoolExecutor:
    """A pool for label_image's and label_chunk's `submit`.

    In the whole process numpy's BLAS gets one thread: the matrices are small and the threads many, so that threads of
    its own only get in the way (measured on 2 cores: postprocessing took up to 30 times as long).
    """
    threadpool_limits(limits=1, user_api="blas")
    return ThreadPoolExecutor(max(2, min(os.cpu_count() or 1, _MAX_THREADS)), thread_name_prefix="host")
