"""The backend under Keras: started without what its native code prints."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def native_stderr_silenced() -> Iterator[None]:
    """Hides what TensorFlow's native code says of CPU features and missing GPUs as it starts.

    No environment variable turns that off. Errors are Python exceptions and not affected, nor is what Python prints.
    """
    if not sys.stderr or sys.stderr is not sys.__stderr__:  # captured or replaced: leave it alone
        yield
        return
    python_stderr, saved = sys.stderr, os.dup(2)
    with open(os.devnull, "w") as devnull, os.fdopen(saved, "w", buffering=1) as real:
        os.dup2(devnull.fileno(), 2)
        sys.stderr = real
        try:
            yield
        finally:
            os.dup2(saved, 2)
            sys.stderr = python_stderr
