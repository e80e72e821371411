"""How commands show their results: tables and names for people, files of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maskbeam.pipeline.exits import UsageError
from maskbeam.transforms.files.paths import absolute
from maskbeam.transforms.files.storage import replace_file, write_json
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.presets.embedded import DEMO_MODEL, hub_presets


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: the first column to the left, the others to the right.

    >>> format_table([("masks", "20", "100%"), ("  lost", "7", "")])
    ['masks   20  100%', '  lost   7']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [f"{name:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))]
        ).rstrip()
        for name, *cells in rows
    ]


def format_share(part: int, whole: int) -> str:
    """A part in percent; nothing of nothing.

    >>> format_share(1, 3), format_share(0, 0)
    ('33.3%', '')
    """
    return f"{part / whole:.1%}" if whole else ""


def format_mean(value: float | None) -> str:
    """A mean of fractions; a dash if there was nothing to average.

    >>> format_mean(2 / 3), format_mean(None)
    ('0.6667', '-')
    """
    return "-" if value is None else f"{value:.4f}"


def format_some(names: Sequence[str], most: int = 3) -> str:
    """The first of some names.

    >>> format_some(["a", "b", "c", "d"]), format_some([])
    ('a, b, c, ...', 'none')
    """
    return ", ".join(map(escape_controls, names[:most])) + (", ..." if len(names) > most else "") or "none"


def escape_controls(text: str) -> str:
    r"""Names come from the input: what a terminal would obey, or could not print, is shown as Python writes it.

    >>> print(escape_controls("a\x1b[2J"))
    a\x1b[2J
    """
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def describe_model(run: Run) -> str:
    """The model that made labels, by the name that --model was given.

    >>> describe_model(Run(model="sam_tiny")), describe_model(Run())
    ('sam_tiny', 'none (imported)')
    """
    return escape_controls(str(run.model or "none (imported)"))


def describe_default_model(argv: Sequence[str]) -> str:
    """Which model works if the flags name none, in a line: people take it for SAM and label a dataset with it.

    Returns:
      nothing if they name one.
    """
    own = argv[: argv.index("--")] if "--" in argv else argv
    if any(flag.partition("=")[0] == "--model" for flag in own):
        return ""
    return (
        f"maskbeam: without --model this uses the embedded demo model {DEMO_MODEL}: good for trying things, not for "
        f"labeling a dataset. For that give --model {'|'.join(hub_presets())}"
    )


def write_result(path: str | None, content: dict[str, Any]) -> None:
    """Writes what --json asks for, on any Beam file system; nothing if it was not given.

    Raises:
      UsageError: it cannot be written.
    """
    if path is None:
        return
    try:
        write_json(absolute(path), content)
    except (OSError, ValueError) as error:  # ValueError: a file system that Beam does not know
        raise UsageError(f"cannot write --json {path}: {error}. Choose a file that can be written.") from error


def write_picture(path: str, png: bytes) -> None:
    """Writes what --plot asks for, on any Beam file system.

    Raises:
      UsageError: it cannot be written.
    """
    try:
        with replace_file(absolute(path)) as file:
            file.write(png)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write --plot {path}: {error}. Choose a file that can be written.") from error
