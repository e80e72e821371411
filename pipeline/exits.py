"""Exit codes, and the error that means a wrong command line."""

from __future__ import annotations

EXIT_DONE = 0

EXIT_FAILED = 1

EXIT_USAGE = 2


class UsageError(ValueError):
    """The command line is wrong; the message says how to mend it."""
