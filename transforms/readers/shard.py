"""Shards -> images, still encoded: one small reader a format, and the cutting into Chunks.

A broken file never raises: it gives the images that can be had, and a failed one that says where it breaks off.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.files.outage import StoreUnavailable, is_out
from maskbeam.transforms.files.paths import relative_path
from maskbeam.transforms.files.streams import open_file, read_up_to
from maskbeam.transforms.prompt_files.in_record import RecordPrompts
from maskbeam.transforms.readers.parquet import read_parquet
from maskbeam.transforms.readers.samples import MAX_IMAGE_BYTES, ReadConfig, Sample
from maskbeam.transforms.readers.tar import read_tar
from maskbeam.transforms.readers.tfrecord import read_tfrecord
from maskbeam.transforms.records import EncodedImage, Failure, Shard, SourceFile, escape_name, printable

# Characters of a record's key and file name: those of a whole chunk are in memory.
MAX_NAME = 2**20

# Characters of a failure's reason: members and columns are named in it, and there may be thousands.
MAX_REASON = 1000


def read_images(
    shard: Shard, config: ReadConfig, root: str, prompts: RecordPrompts | None = None
) -> Iterator[EncodedImage]:
    """The images of a shard in the order of its rows. Raises nothing, whatever the files hold.

    Args:
      shard: what to read; no more than its max_images are given, and no more is read than they need.
      config: names of features and columns.
      root: directory that image ids are relative to.
      prompts: how the prompts in the records are read; None = they are not.
    """
    samples: Iterable[Sample]
    image_ids: Iterable[str]
    if shard.format == "image":
        samples = map(read_loose, shard.files)
        image_ids = (relative_path(file.path, root) for file in shard.files)
    else:
        samples = read_container(shard.files[0], partial(READERS[shard.format], prompts=prompts), config)
        image_ids = (f"{relative_path(shard.path, root)}#{row}" for row in itertools.count())
    rows: Iterable[int | None] = itertools.repeat(None) if shard.format == "image" else itertools.count()
    for found, image_id, row in zip(itertools.islice(samples, shard.max_images), image_ids, rows, strict=False):
        sample = _without_long_names(found)
        reason = sample.reason or (None if sample.data else "the image has no bytes")
        failure = Failure("read", printable(reason)[:MAX_REASON]) if reason else None
        yield EncodedImage(
            escape_name(image_id),
            row,
            sample.key,
            sample.file_name,
            sample.data,
            failure,
            sample.annotations,
            sample.prompts,
        )


def _without_long_names(sample: Sample) -> Sample:
    longest = max(len(sample.key or ""), len(sample.file_name or ""))
    if longest <= MAX_NAME:
        return sample
    return Sample(reason=f"the key or file name has {longest} characters; at most {MAX_NAME} are read")


def read_loose(file: SourceFile) -> Sample:
    """One image file."""
    name = escape_name(file.path.rpartition("/")[2])
    too_large = Sample(file_name=name, reason=f"the file is larger than {MAX_IMAGE_BYTES} bytes")
    if file.num_bytes > MAX_IMAGE_BYTES:
        return too_large
    try:
        with open_file(file) as source:
            data = read_up_to(source, MAX_IMAGE_BYTES + 1)
    except StoreUnavailable:  # no fault of the image
        raise
    except OSError as error:
        return Sample(file_name=name, reason=str(error))
    return Sample(data, file_name=name) if len(data) <= MAX_IMAGE_BYTES else too_large


Reader = Callable[..., Iterator[Sample]]  # (io.BufferedReader, ReadConfig, prompts=RecordPrompts | None)


def read_container(file: SourceFile, reader: Reader, config: ReadConfig) -> Iterator[Sample]:
    """The samples of one file of many images and, where it breaks off, one that says why."""
    head = b""
    none_yet = True
    try:
        with open_file(file) as source:
            head = source.peek(16)[:16]
            if not head:
                raise ValueError("the file is empty (0 bytes)")
            for sample in reader(source, config):
                none_yet = False
                yield sample
    except ImportError:  # a fault of the installation, not of the file
        raise
    except Exception as error:  # parsers raise all sorts of things on broken bytes; none may end the job
        is_out(file.path)  # then it is no fault of the shard
        begins = f"; the file begins with {head!r}" if head and none_yet else ""
        yield Sample(reason=f"the shard breaks off here: {describe_error(error)}{begins}")


READERS: dict[str, Reader] = {"tfrecord": read_tfrecord, "tar": read_tar, "parquet": read_parquet}
