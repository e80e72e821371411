"""How long an object store may answer nothing but errors, or nothing at all, before the run ends with a sentence.

The retries of client libraries, of Beam and of this program would multiply to many minutes. So a store's client says
here what each request came to: from the first error on, with no answer in between, the store is out; after
LIMIT_SECONDS whoever asks it for something gets StoreUnavailable, mostly without a request.
"""

from __future__ import annotations

import sys
import threading
import time

# Until the run ends; together with requests that hang and with the launcher's own, well under five minutes.
LIMIT_SECONDS = 100.0
# For a connection, and between two pieces of an answer.
CONNECT_SECONDS = 10.0
READ_SECONDS = 20.0
# After the limit a request is let through this long after the last one: a process may live longer than a run.
_PROBE_SECONDS = 10.0
# What failed before a pause as long as this says nothing of now.
_FORGET_SECONDS = 300.0
# An outage shorter than this is not worth a line; later there is one now and then.
_QUIET_SECONDS = 5.0
_LINE_SECONDS = 30.0

# What a store says when it cannot answer now: too many requests, or a fault of its own.
_BUSY, _FAULT = 429, 500


class StoreUnavailable(OSError):
    """An object store has not answered for too long; the run ends, since no image is at fault."""


def is_fault(status: int) -> bool:
    """Whether a HTTP status says that the store cannot answer now, whatever it was asked."""
    return status == _BUSY or status >= _FAULT


class Outage:
    """What is known of one store, by all threads of a process."""

    def __init__(self, store: str) -> None:
        """
        Args:
          store: for people, as "s3://".
        """
        self._store = store
        self._lock = threading.Lock()
        self._since: float | None = None
        self._failed = self._said = 0.0
        self._reason = ""

    @property
    def lasts(self) -> bool:
        """Whether the last request got no answer."""
        return self._since is not None

    def answered(self) -> None:
        """A request got an answer, be it that there is no such object."""
        with self._lock:
            self._since = None

    def failed(self, reason: str) -> None:
        """A request got none, or a fault of the store.

        Raises:
          StoreUnavailable: see check.
        """
        now = time.monotonic()
        with self._lock:
            if self._since is None or now - self._failed > _FORGET_SECONDS:
                self._since, self._said = now, now - _LINE_SECONDS
            self._failed, self._reason = now, reason
            seconds = now - self._since
            says = seconds >= _QUIET_SECONDS and now - self._said >= _LINE_SECONDS
            if says:
                self._said = now
        if says:
            print(
                f"waiting for {self._store}, {seconds:.0f} s so far, {LIMIT_SECONDS:.0f} s at most ({reason})",
                file=sys.stderr,
                flush=True,
            )
        self.check()

    def check(self) -> None:
        """Before a request.

        Raises:
          StoreUnavailable: the store is out for LIMIT_SECONDS or more.
        """
        since, now = self._since, time.monotonic()
        if since is not None and self._failed - since >= LIMIT_SECONDS and now - self._failed < _PROBE_SECONDS:
            raise StoreUnavailable(
                f"{self._store} has given no answer for {self._failed - since:.0f} s ({self._reason}). Run the same "
                "command again when it is back."
            )


S3_OUTAGE = Outage("s3://")
GS_OUTAGE = Outage("gs://")
_OUTAGES = {"s3": S3_OUTAGE, "gs": GS_OUTAGE}


def is_out(path: str) -> bool:
    """Whether the store of a path is out, so that waiting is what helps.

    Raises:
      StoreUnavailable: it is for too long.
    """
    outage = _OUTAGES.get(path.partition("://")[0])
    if outage is None:
        return False
    outage.check()
    return outage.lasts
