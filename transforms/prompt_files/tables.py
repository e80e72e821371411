"""Prompts in tables of the user's: Parquet, CSV, JSONL."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import pyarrow as pa
import pyarrow.csv as pacsv

from maskbeam.transforms.files.parquet_file import checked_row_groups, open_parquet
from maskbeam.transforms.files.strict_json import parse_json
from maskbeam.transforms.prompt_files.config import PromptFilesError
from maskbeam.transforms.prompt_files.rows import COLUMNS, make_batch, parse_columns, parse_records

# Rows that are in memory at a time.
_BATCH_ROWS = 2**16

_LINES = 2**13
_MAX_LINE_BYTES = 2**24
_MAX_HEADER_BYTES = 2**16

_CSV_BLOCK_BYTES = 2**22

_BOX_COLUMNS = (("bbox",), ("xmin", "ymin", "xmax", "ymax"), ("x", "y", "w", "h"))


def read_parquet_prompts(file: io.BufferedReader, bbox_format: str | None) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file with a row a prompt.

    Raises:
      ValueError: it cannot be used as a whole.
    """
    table = open_parquet(file)
    names = [name for name in table.schema_arrow.names if name in COLUMNS]
    _check_columns(table.schema_arrow.names)
    leaves = [table.schema.column(index).path for index in range(len(table.schema))]
    wanted = [leaf for leaf in leaves if leaf.partition(".")[0] in names]
    first = 1
    for group in checked_row_groups(file, wanted):
        batches = table.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=names, use_threads=False)
        for batch in batches:
            yield parse_columns(batch, bbox_format, "row", first)
            first += len(batch)


def read_csv_prompts(file: io.BufferedReader, bbox_format: str | None) -> Iterator[pa.RecordBatch]:
    """The rows of a CSV file in UTF-8, whose first line names the columns; lists are JSON in quotes.

    A line with more or fewer values than columns is a row without an image.

    Raises:
      ValueError: it cannot be used as a whole.
    """
    header = file.readline(_MAX_HEADER_BYTES).decode("utf-8-sig")
    names = next(csv.reader([header]), [])
    _check_columns(names)
    odd: list[str] = []

    def skip(row: pacsv.InvalidRow) -> str:
        odd.append(f"line {row.number + 1}: it has {row.actual_columns} values; expected {row.expected_columns}")
        return "skip"

    batches = pacsv.open_csv(
        file,
        read_options=pacsv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES, column_names=names),
        parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
        convert_options=pacsv.ConvertOptions(
            column_types={name: pa.string() for name in names},
            include_columns=[name for name in names if name in COLUMNS],
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
        ),
    )
    first = 1
    for batch in batches:
        yield parse_columns(batch, bbox_format, "row", first)
        first += len(batch)
    if odd:
        yield make_batch([{"problem": problem} for problem in odd])


def read_jsonl_prompts(file: io.BufferedReader, bbox_format: str | None) -> Iterator[pa.RecordBatch]:
    """The rows of a file with a JSON object a line.

    Raises:
      ValueError: it cannot be used as a whole.
    """
    for first in count(1, _LINES):
        lines = [line for _, line in zip(range(_LINES), iter(_line_reader(file), b""), strict=False)]
        if not lines:
            return
        records = [_parse_line(line) for line in lines]
        whole = [(number, record) for number, record in enumerate(records, first) if record is not None]
        for run_first, run in _runs(whole):
            yield parse_records(run, bbox_format, "line", run_first)


def _line_reader(file: io.BufferedReader) -> Callable[[], bytes]:
    def read() -> bytes:
        line = file.readline(_MAX_LINE_BYTES)
        if len(line) == _MAX_LINE_BYTES:
            raise ValueError(f"a line has more than {_MAX_LINE_BYTES} bytes; expected a JSON object a line")
        return line

    return read


def _parse_line(line: bytes) -> object:
    """What a line says, or what is wrong with it; None for an empty one."""
    if not line.strip():
        return None
    try:
        return parse_json(line)
    except ValueError as error:
        return error


def _runs(numbered: Sequence[tuple[int, object]]) -> Iterator[tuple[int, list[object]]]:
    """Records whose numbers follow each other, with the first number."""
    run: list[object] = []
    for position, (number, record) in enumerate(numbered):
        run.append(record)
        if position + 1 == len(numbered) or numbered[position + 1][0] != number + 1:
            yield number + 1 - len(run), run
            run = []


def _check_columns(names: Sequence[str]) -> None:
    """Says what is missing before millions of rows say it."""
    found = f"Columns: {', '.join(names)[:300]}."
    if "image" not in names:
        raise PromptFilesError(f"it has no column image, which says what image a prompt is for. {found} Rename it.")
    whole = [columns for columns in _BOX_COLUMNS if set(columns) <= set(names)]
    if len(whole) > 1:
        raise PromptFilesError(f"it has boxes twice: {', '.join(whole[0])} and {', '.join(whole[1])}. Keep one.")
    if not whole and not {"points", "segmentation"} & set(names):
        raise PromptFilesError(
            "it has no box (bbox, or xmin ymin xmax ymax, or x y w h), no points and no segmentation. "
            f"{found} Rename them."
        )
