"""TFRecord files of tf.train.Examples."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Sequence
from typing import IO, Any

import google_crc32c

from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.files.streams import decompress, read_up_to
from maskbeam.transforms.native_stderr import native_stderr_silenced
from maskbeam.transforms.prompt_files.in_record import RecordPrompts
from maskbeam.transforms.readers.samples import MAX_IMAGE_BYTES, ReadConfig, Sample, as_text


def read_tfrecord(
    source: io.BufferedReader, config: ReadConfig, prompts: RecordPrompts | None = None
) -> Iterator[Sample]:
    """The tf.train.Examples of a TFRecord file."""
    for offset, record, intact in tfrecord_records(source):
        if intact:
            yield parse_example(record, config, prompts)
        else:
            yield Sample(reason=f"the record at byte {offset} is damaged: its checksum is wrong")


def tfrecord_records(source: io.BufferedReader) -> Iterator[tuple[int, bytes, bool]]:
    """The records of a TFRecord file, compressed or not: byte offset, bytes, and whether their checksum is right.

    A record is: length, uint64 little endian | masked CRC32C of the length | bytes | masked CRC32C of the bytes
    (tensorflow/core/lib/io/record_writer.h).

    Raises:
      ValueError: a length is damaged, or the stream is cut.
    """
    header = source.peek(12)[:12]
    # Some lengths look like the magic of a compression, but no compressed file has their checksum.
    plain = _masked_crc32c(header[:8]) == header[8:]
    stream = source if plain else decompress(source)
    offset = 0
    while header := _read_at(stream, 12, offset):
        length = int.from_bytes(header[:8], "little")
        if len(header) < 12:
            raise ValueError(f"the file is cut within the header at byte {offset}")
        if header[8:] != _masked_crc32c(header[:8]):
            raise ValueError(f"at byte {offset} there is no TFRecord header: the checksum of the length is wrong")
        if length > MAX_IMAGE_BYTES:
            raise ValueError(f"the record at byte {offset} has {length} bytes; at most {MAX_IMAGE_BYTES} are read")
        record, checksum = _read_at(stream, length, offset), _read_at(stream, 4, offset)
        if len(checksum) < 4:
            raise ValueError(f"the file is cut within the record at byte {offset}")
        yield offset, record, checksum == _masked_crc32c(record)
        offset += 16 + length


def _read_at(stream: IO[bytes], num_bytes: int, offset: int) -> bytes:
    try:
        return read_up_to(stream, num_bytes)
    except Exception as error:
        raise ValueError(f"the record at byte {offset} cannot be read: {describe_error(error)}") from error


def _masked_crc32c(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


@functools.cache
def _tensorflow() -> Any:
    """TensorFlow, imported without its talk. It is heavy: only those who read TFRecords pay for it."""
    with native_stderr_silenced():
        import tensorflow

    return tensorflow


def parse_example(record: bytes, config: ReadConfig, prompts: RecordPrompts | None = None) -> Sample:
    """The image of a serialized tf.train.Example."""
    example = _tensorflow().train.Example  # outside the try: a missing package is no fault of the record
    try:
        features = example.FromString(record).features.feature
    except Exception:  # protobuf's DecodeError
        return Sample(reason=f"the record is no tf.train.Example; it begins with {record[:16]!r}")

    def values_of(name: str) -> Sequence[Any]:
        # `in` first: asking the map for a name it lacks would add it.
        kind = features[name].WhichOneof("kind") if name in features else None
        return getattr(features[name], kind).value if kind else ()

    def first(names: tuple[str, ...]) -> str | None:
        for name in names:
            values = values_of(name)
            if values and (text := as_text(values[0])):
                return text
        return None

    key, file_name = first(config.tfrecord_key), first(config.tfrecord_file_name)
    for name in config.tfrecord_image:
        if name in features and features[name].bytes_list.value:
            rows = None if prompts is None else prompts.of_example(values_of)
            return Sample(features[name].bytes_list.value[0], key, file_name, prompts=rows)
    found = ", ".join(f"{name} ({features[name].WhichOneof('kind')})" for name in sorted(features)) or "none"
    return Sample(
        key=key,
        file_name=file_name,
        reason=f"no image feature. Features: {found}. Name the one with the encoded image with --tfrecord_image",
    )
