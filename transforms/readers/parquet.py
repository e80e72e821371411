"""Parquet files with a column of encoded images."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa

from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.files.parquet_file import checked_row_groups, open_parquet
from maskbeam.transforms.files.streams import allowed_inflation, describe_bomb
from maskbeam.transforms.prompt_files.in_record import OBJECTS_COLUMN, RecordPrompts
from maskbeam.transforms.readers.samples import MAX_IMAGE_BYTES, ReadConfig, Sample, as_text


def read_parquet(
    source: io.BufferedReader, config: ReadConfig, prompts: RecordPrompts | None = None
) -> Iterator[Sample]:
    """The rows of a Parquet file with a column of encoded images."""
    num_bytes = source.seek(0, io.SEEK_END)
    table = open_parquet(source)
    schema = table.schema_arrow
    image = next((name for name in config.parquet_image if name in schema.names and _holds_bytes(schema, name)), None)
    if image is None:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(f"no image column. Columns: {found}. Name the binary one with --parquet_image")
    flat = {field.name for field in schema if not pa.types.is_nested(field.type)}
    key = next((name for name in config.parquet_key if name in flat), None)
    file_name = next((name for name in config.parquet_file_name if name in flat), None)
    columns = _columns_to_read(schema, image, key, file_name)
    if prompts is not None:
        leaves = [table.schema.column(index).path for index in range(len(table.schema))]
        columns += [leaf for leaf in leaves if leaf.partition(".")[0] == OBJECTS_COLUMN]
    num_rows = table.metadata.num_rows
    # Not of its columns: asking a damaged file for those ends the process (pyarrow 25).
    inflated = sum(table.metadata.row_group(index).total_byte_size for index in range(table.num_row_groups))
    if inflated > allowed_inflation(num_bytes):
        raise ValueError(describe_bomb(inflated, num_bytes))
    row = given_bytes = 0
    try:
        # A row at a time: a few images can be as large as the memory.
        batches = (
            batch
            for group in checked_row_groups(source, columns)
            for batch in table.iter_batches(batch_size=1, row_groups=[group], columns=columns, use_threads=False)
        )
        for batch in batches:
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError as error:  # Parquet's writers need not check strings
                yield Sample(reason=f"a text of row {row} is no UTF-8: {error}")
                row += 1
                continue
            for values in rows:
                sample = _parse_row(values, image, key, file_name)
                if prompts is not None and OBJECTS_COLUMN in values:
                    sample = replace(sample, prompts=prompts.of_objects(values[OBJECTS_COLUMN]))
                given_bytes += len(sample.data)
                if given_bytes > allowed_inflation(num_bytes):  # one value of a dictionary can be that of many rows
                    raise ValueError(describe_bomb(given_bytes, num_bytes))
                yield sample
                row += 1
    except Exception as error:
        raise ValueError(f"at row {row} of {num_rows}: {describe_error(error)}") from error
    if row != num_rows:  # nothing in a Parquet file covers its counts
        raise ValueError(f"there are {row} rows, but the file's footer says {num_rows}")


def _holds_bytes(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _columns_to_read(schema: pa.Schema, image: str, key: str | None, file_name: str | None) -> list[str]:
    """Paths of the columns that a Sample is made of: of the image's struct only bytes and path, if that is flat."""
    kind, columns = schema.field(image).type, [image]
    if pa.types.is_struct(kind):
        columns = [f"{image}.bytes"]
        if kind.get_field_index("path") >= 0 and not pa.types.is_nested(kind.field("path").type):
            columns.append(f"{image}.path")
    return list(dict.fromkeys([*columns, *(name for name in (key, file_name) if name is not None)]))


# How a dataset of paths gets their bytes.
EMBED = 'dataset = dataset.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)'


def _parse_row(values: dict[str, Any], image: str, key: str | None, file_name: str | None) -> Sample:
    data, path = values[image], None
    if isinstance(data, dict):  # as Hugging Face datasets store images
        data, path = data["bytes"], data.get("path")
    name = as_text(values[file_name] if file_name else path)
    reason = None
    if data is not None and len(data) > MAX_IMAGE_BYTES:
        data, reason = b"", f"{image} has {len(data)} bytes; at most {MAX_IMAGE_BYTES} are read"
    if data is None:
        reason = f"{image} is null"
        if path is not None:
            reason = (
                f"{image} has no bytes, only the path {path!r}: give the image files themselves as --input, or embed "
                f"them with Hugging Face's datasets before to_parquet: {EMBED}"
            )
    return Sample(data or b"", as_text(values[key]) if key else None, name, reason)
