"""JSON as it is written down, read so that nothing surprising comes out of it."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

# Deeper than any file of ours or of COCO's, and far from the end of Python's stack: what is read is written again.
_MAX_DEPTH = 64


def parse_json(data: bytes) -> Any:
    """The content of a JSON file, with finite numbers only and at most 64 levels deep.

    Raises:
      ValueError: it is none; says what is wrong in a few words, to stand after the file's name.

    >>> parse_json(b'{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    """
    try:
        content = json.loads(data, parse_constant=_refuse_constant, parse_float=_parse_float)
    except json.JSONDecodeError as error:
        begins = f"; it begins with {data[:20]!r}" if error.pos < 20 else ""
        raise ValueError(f"it is not JSON: {error.msg} at line {error.lineno}, column {error.colno}{begins}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not JSON: byte {error.start} is no UTF-8; it begins with {data[:20]!r}") from error
    except ValueError as error:
        if "int_max_str_digits" in str(error):  # Python's own limit, against quadratic time
            raise ValueError("it has a whole number of thousands of digits") from error
        raise
    except RecursionError as error:
        raise ValueError(_too_deep()) from error
    _check_depth(content)
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it has the number {name}, which JSON does not have")


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"it has the number {text[:40]}, which is too large")
    return value


def _check_depth(content: Any) -> None:
    """Level by level: a recursion would be what it guards against."""
    level = [content] if isinstance(content, (dict, list)) else []
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError(_too_deep())


def _too_deep() -> str:
    return f"it nests more than {_MAX_DEPTH} levels deep"
