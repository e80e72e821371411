"""One line about an exception."""

from __future__ import annotations

from maskbeam.transforms.files.outage import StoreUnavailable


def describe_error(error: Exception) -> str:
    """The first line of an error as a sentence for people; our own messages need no type before them.

    >>> describe_error(ValueError("the file is empty")), describe_error(KeyError("id")), describe_error(MemoryError())
    ('the file is empty', "KeyError: 'id'", 'MemoryError')
    """
    if details := getattr(error, "exception_details", None):  # Beam's: the path, or a pair of paths, and the cause
        ((where, cause), *_) = details.items()
        where = where if isinstance(where, str) else where[-1]
        return f"{where}: {describe_error(cause)}"
    kind = type(error).__name__
    # Beam's error of S3 is a pair for str().
    message = str(getattr(error, "message", None) or error).strip().partition("\n")[0]
    if not message:
        return kind
    return message if type(error) in (ValueError, StoreUnavailable) else f"{kind}: {message}"
