"""Damaged images and shards, thousands of them: nothing may crash, hang, eat memory or lose a row in silence.

python -m benchmarks.fuzz [--cases 2000] [--first 0]

Case n is made from n alone: a good file of one of the kinds below, and one to three mutations of it. Images must decode
or raise ImageError. A shard must give a row for each of its images, or a row that says what broke; what a checksum
protects must come out as it was put in.

The cases run in a process of their own, which is watched: a crash of native code, a case that takes longer than
SECONDS_A_CASE, or more than MAX_RSS_BYTES of memory is an offence like any other, and the cases after it go on.

Not offences, since no reader could tell: a tar, a TFRecord length or a PNG whose header was changed and its checksum
made right again is another valid file.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import lzma
import queue
import random
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from PIL import Image
from tqdm import tqdm

from benchmarks.machine import peak_rss_bytes
from maskbeam.transforms.images import ImageConfig, ImageError, decode_image
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.readers.shard import read_images
from maskbeam.transforms.records import EncodedImage, Shard, SourceFile

# A case takes milliseconds; these are for a machine that is busy with much else.
SECONDS_A_CASE = 300.0
SECONDS_TO_START = 600.0  # importing TensorFlow
MAX_RSS_BYTES = 3 * 2**30
MAX_PIXELS = 10_000_000  # of a decoded image, so that cases are quick; the limit works the same at any number

# What is in each shard: bytes that no compression shortens, so that damage hits them.
IMAGES = [np.random.default_rng(number).bytes(3000) for number in range(5)]

Mutation = Callable[[bytes, random.Random], bytes]


# Good files.


@dataclass(frozen=True)
class Kind:
    """A kind of file to damage.

    Attributes:
      format: as in Shard, or "image".
      make: the good file.
      mutations: of its own, beside COMMON.
      checked: a checksum covers the images' bytes, each image's or the whole stream's.
    """

    format: str
    make: Callable[[], bytes]
    mutations: tuple[Mutation, ...] = ()
    checked: bool = False


def photo(mode: str = "RGB") -> Image.Image:
    """Coloured blotches, 120x90."""
    noise = np.random.default_rng(7).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(noise).resize((120, 90)).convert(mode)


def encode(format_name: str, mode: str = "RGB", **options: object) -> bytes:
    """The photo as a file."""
    buffer = io.BytesIO()
    photo(mode).save(buffer, format_name, **options)
    return buffer.getvalue()


def make_tar(tar_format: int) -> bytes:
    """A tar of IMAGES: three members a sample, a long name, a directory, a link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for number, image in enumerate(IMAGES):
            stem = f"{'d/' * 60}{number}" if number == 2 else f"{number}"
            for name, data in ((f"{stem}.jpg", image), (f"{stem}.json", b"{}")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo(f"{stem}.link")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    return buffer.getvalue()


def masked_crc(data: bytes) -> bytes:
    """The checksum of TFRecord files."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)


def make_example(image: bytes) -> bytes:
    """A serialized tf.train.Example with the feature image/encoded."""

    def message(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    entry = message(1, b"image/encoded") + message(2, message(1, message(1, image)))
    return message(1, message(1, entry))


def frame_record(record: bytes) -> bytes:
    """A record as it lies in a TFRecord file."""
    length = struct.pack("<Q", len(record))
    return length + masked_crc(length) + record + masked_crc(record)


def make_tfrecord() -> bytes:
    """A TFRecord file of IMAGES."""
    return b"".join(frame_record(make_example(image)) for image in IMAGES)


def make_parquet(**options: object) -> bytes:
    """A Parquet file of IMAGES with keys."""
    buffer = io.BytesIO()
    table = pa.table({"image": pa.array(IMAGES, pa.binary()), "key": [f"key {n}" for n in range(len(IMAGES))]})
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def make_parquet_struct() -> bytes:
    """Likewise, as Hugging Face datasets store images."""
    buffer = io.BytesIO()
    rows = [{"bytes": image, "path": f"{number}.jpg"} for number, image in enumerate(IMAGES)]
    pq.write_table(pa.table({"image": rows}), buffer, compression="zstd", row_group_size=2)
    return buffer.getvalue()


def by_parts(compress: Callable[[bytes], bytes], data: bytes) -> bytes:
    """Compressed streams one after the other, as pigz, pbzip2 and pzstd write them."""
    return b"".join(compress(data[first : first + 4000]) for first in range(0, len(data), 4000))


# Mutations of any file.


def flip_bits(data: bytes, chance: random.Random) -> bytes:
    """Some bits."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def truncate(data: bytes, chance: random.Random) -> bytes:
    """The end is missing."""
    return data[: chance.randrange(len(data))]


def piece(data: bytes, chance: random.Random) -> tuple[int, int]:
    """Start and end of some bytes, often on the borders that formats have."""
    step = chance.choice((1, 1, 4, 512))
    size = max(chance.choice((1, 4, 16, 512, 2000)) // step, 1) * step
    start = chance.randrange(len(data)) // step * step
    return start, min(start + size, len(data))


def duplicate(data: bytes, chance: random.Random) -> bytes:
    """Some bytes come twice."""
    start, end = piece(data, chance)
    return data[:end] + data[start:]


def insert(data: bytes, chance: random.Random) -> bytes:
    """Some bytes that do not belong there."""
    start, end = piece(data, chance)
    return data[:start] + chance.choice((bytes(end - start), chance.randbytes(end - start))) + data[start:]


def delete(data: bytes, chance: random.Random) -> bytes:
    """Some bytes are missing."""
    start, end = piece(data, chance)
    return data[:start] + data[end:]


def overwrite(data: bytes, chance: random.Random) -> bytes:
    """Some bytes are others."""
    start, end = piece(data, chance)
    return data[:start] + chance.choice((bytes(end - start), chance.randbytes(end - start))) + data[end:]


def edit_number(data: bytes, chance: random.Random) -> bytes:
    """An absurd length, offset or count: zero, huge or negative, of any width."""
    width = chance.choice((1, 2, 4, 8))
    value = chance.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1)))
    place = chance.choice((chance.randrange(len(data)), chance.randrange(min(len(data), 64))))
    return data[:place] + value.to_bytes(width, chance.choice(("little", "big"))) + data[place + width :]


COMMON: tuple[Mutation, ...] = (flip_bits, truncate, duplicate, insert, delete, overwrite, edit_number)


# Mutations that know the format. Those with a checksum make it right again.


def edit_tar_header(data: bytes, chance: random.Random) -> bytes:
    """A header of an odd type, or with an odd number or name."""
    headers = [place for place in range(0, len(data) - 511, 512) if data[place + 257 : place + 262] == b"ustar"]
    if not headers:
        return data
    place = chance.choice(headers)
    header = bytearray(data[place : place + 512])
    start, values = chance.choice(
        (
            (156, [bytes([kind]) for kind in b"\x000123456789LKxgSXNVDM?"]),
            (
                124,
                [b"00000000000\0", b"77777777777\0", b"-0000000001\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"z" * 12],
            ),
            (0, [b"../../../../etc/passwd\0", b"/abs\0", b"\xff" * 100, b"\0" * 100, b"a\n.jpg\0"]),
            (157, [b"\xff" * 100, b"GNU.sparse"]),
            (257, [b"ustar  \0", b"ustar\x0000", b"xxxxxxxx"]),
            (386, [b"0" * 96, b"\xff" * 96]),  # the map of a sparse file
            (482, [b"\1" + b"77777777777\0"]),  # it goes on
        )
    )
    value = chance.choice(values)
    header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:place] + bytes(header) + data[place + 512 :]


def edit_pax(data: bytes, chance: random.Random) -> bytes:
    """A pax header before everything else."""
    record = chance.choice(
        (
            b"size=18446744073709551615",
            b"size=-1000",
            b"size=x",
            b"path=" + b"../" * 5000,
            b"GNU.sparse.major=1\n12 GNU.sparse.minor=0",
            b"GNU.sparse.map=0,1,999999999999,1",
            b"GNU.sparse.size=99999999999",
            b"hdrcharset=BINARY",
            b"path=\xed\xa0\x80\x00.jpg",
            b"=",
        )
    )
    length = len(record) + 3
    while length != len(body := b"%d %s\n" % (length, record)):
        length = len(body)
    body = chance.choice((body, body, body * 3, body[:-1], b"0 a=b\n", b"9" * 4000))
    info = tarfile.TarInfo(chance.choice(("pax", "g/" * 40)))
    info.type, info.size = chance.choice((tarfile.XHDTYPE, tarfile.XGLTYPE)), len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512) + data


def edit_tfrecord_length(data: bytes, chance: random.Random) -> bytes:
    """A record of another length, whose checksum is right."""
    places, place = [], 0
    while place + 12 <= len(data) and masked_crc(data[place : place + 8]) == data[place + 8 : place + 12]:
        places.append(place)
        place += 16 + int.from_bytes(data[place : place + 8], "little")
    if not places:
        return data
    place = chance.choice(places)
    before = int.from_bytes(data[place : place + 8], "little")
    values = (0, 1, max(before - 1, 0), before + 1, 2**20, 2**30, 2**31, 2**63, 2**64 - 1)
    length = struct.pack("<Q", chance.choice(values))
    return data[:place] + length + masked_crc(length) + data[place + 12 :]


def edit_example(data: bytes, chance: random.Random) -> bytes:
    """A record whose message is damaged, and whose checksum is right."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < size + 16 or size < 1:
        return data
    record = chance.choice((flip_bits, truncate, overwrite))(data[12 : 12 + size], chance)
    return frame_record(record) + data[16 + size :]


def edit_parquet_footer(data: bytes, chance: random.Random) -> bytes:
    """Something of the file's own description, or the length of it."""
    size = int.from_bytes(data[-8:-4], "little")
    start = len(data) - 8 - size
    if start < 4 or size == 0:
        return data
    if chance.random() < 0.2:
        value = chance.choice((0, 1, size - 1, size + 1, 2**31 - 1, 2**32 - 1))
        return data[:-8] + value.to_bytes(4, "little") + data[-4:]
    footer = bytearray(data[start:-8])
    for _ in range(chance.choice((1, 1, 2, 4))):
        footer[chance.randrange(size)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    return data[:start] + bytes(footer) + data[-8:]


def edit_parquet_page(data: bytes, chance: random.Random) -> bytes:
    """Something of the first bytes of a page, where its sizes and encodings stand."""
    changed = bytearray(data)
    for place in rng_places(data, chance):
        changed[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    return bytes(changed)


def rng_places(data: bytes, chance: random.Random) -> list[int]:
    """Some bytes of page headers: the first stands after the magic, the others before what looks like an image."""
    starts = [4] + [data.find(image[:16]) - 40 for image in IMAGES if data.find(image[:16]) > 40]
    return [min(chance.choice(starts) + chance.randrange(60), len(data) - 1) for _ in range(chance.choice((1, 2, 3)))]


def edit_png_chunk(data: bytes, chance: random.Random) -> bytes:
    """Something in a PNG's chunk, whose checksum is right."""
    places = [found.start() - 4 for found in re.finditer(rb"IHDR|PLTE|tRNS|eXIf|iCCP|zTXt|iTXt|IDAT|fcTL|acTL", data)]
    place = chance.choice([each for each in places if each >= 0] or [-1])
    size = int.from_bytes(data[place : place + 4], "big")
    if place < 0 or not 0 < size < len(data) - place - 11:
        return data
    body = bytearray(data[place + 4 : place + 8 + size])
    for _ in range(chance.choice((1, 1, 3))):
        body[4 + chance.randrange(size)] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
    return data[: place + 4] + bytes(body) + struct.pack(">I", zlib.crc32(body)) + data[place + 8 + size + 4 :]


# These leave a valid file that says something else.
_REWRITES: tuple[Mutation, ...] = (edit_tar_header, edit_pax, edit_tfrecord_length, edit_example)

_TAR = (edit_tar_header, edit_tar_header, edit_pax)
_TFRECORD = (edit_tfrecord_length, edit_example)
_PARQUET = (edit_parquet_footer, edit_parquet_footer, edit_parquet_page)
_GNU, _PAX, _USTAR = tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT

KINDS: dict[str, Kind] = {
    "jpeg": Kind("image", lambda: encode("JPEG", exif=photo().getexif(), quality=80)),
    "jpeg progressive": Kind("image", lambda: encode("JPEG", progressive=True)),
    "jpeg cmyk": Kind("image", lambda: encode("JPEG", "CMYK")),
    "jpeg multi-picture": Kind("image", lambda: encode("MPO", save_all=True, append_images=[photo()])),
    "png": Kind("image", lambda: encode("PNG"), (edit_png_chunk,)),
    "png palette": Kind("image", lambda: encode("PNG", "P", transparency=3), (edit_png_chunk,)),
    "png animated": Kind(
        "image", lambda: encode("PNG", save_all=True, append_images=[photo().rotate(90)]), (edit_png_chunk,)
    ),
    "png 16-bit": Kind("image", lambda: encode("PNG", "I;16"), (edit_png_chunk,)),
    "gif": Kind("image", lambda: encode("GIF", "P", save_all=True, append_images=[photo("P")], disposal=2)),
    "tiff": Kind("image", lambda: encode("TIFF")),
    "tiff lzw": Kind("image", lambda: encode("TIFF", compression="tiff_lzw")),
    "tiff deflate": Kind("image", lambda: encode("TIFF", compression="tiff_adobe_deflate")),
    "tiff jpeg": Kind("image", lambda: encode("TIFF", compression="jpeg")),
    "tiff fax": Kind("image", lambda: encode("TIFF", "1", compression="group4")),
    "tiff float": Kind("image", lambda: encode("TIFF", "F")),
    "tiff big": Kind("image", lambda: encode("TIFF", big_tiff=True)),
    "webp": Kind("image", lambda: encode("WEBP")),
    "webp lossless": Kind("image", lambda: encode("WEBP", "RGBA", lossless=True)),
    "webp animated": Kind("image", lambda: encode("WEBP", save_all=True, append_images=[photo().rotate(90)])),
    "bmp": Kind("image", lambda: encode("BMP")),
    "bmp palette": Kind("image", lambda: encode("BMP", "P")),
    "dib": Kind("image", lambda: encode("DIB")),
    "tar ustar": Kind("tar", lambda: make_tar(_USTAR), _TAR),
    "tar gnu": Kind("tar", lambda: make_tar(_GNU), _TAR),
    "tar pax": Kind("tar", lambda: make_tar(_PAX), _TAR),
    "tar.gz": Kind("tar", lambda: gzip.compress(make_tar(_PAX), mtime=0), checked=True),
    "tar.bz2": Kind("tar", lambda: by_parts(bz2.compress, make_tar(_PAX)), checked=True),
    "tar.xz": Kind("tar", lambda: by_parts(lzma.compress, make_tar(_PAX)), checked=True),
    "tar.zst": Kind("tar", lambda: by_parts(zstandard.compress, make_tar(_PAX))),
    "tfrecord": Kind("tfrecord", make_tfrecord, _TFRECORD, checked=True),
    "tfrecord.gz": Kind("tfrecord", lambda: gzip.compress(make_tfrecord(), mtime=0), checked=True),
    "tfrecord.zlib": Kind("tfrecord", lambda: zlib.compress(make_tfrecord()), checked=True),
    "tfrecord.bz2": Kind(
        "tfrecord", lambda: b"".join(bz2.compress(record) for record in split_records(make_tfrecord())), checked=True
    ),
    "parquet": Kind("parquet", partial(make_parquet, compression="none"), _PARQUET),
    "parquet snappy": Kind("parquet", partial(make_parquet, compression="snappy", row_group_size=2), _PARQUET),
    "parquet zstd": Kind(
        "parquet", partial(make_parquet, compression="zstd", use_dictionary=False, data_page_version="2.0"), _PARQUET
    ),
    "parquet checksums": Kind("parquet", partial(make_parquet, write_page_checksum=True), _PARQUET),
    "parquet struct": Kind("parquet", make_parquet_struct, _PARQUET),
}


def split_records(data: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file, each with its frame."""
    while data:
        size = 16 + int.from_bytes(data[:8], "little")
        yield data[:size]
        data = data[size:]


# Cases.


@dataclass(frozen=True)
class Case:
    """A damaged file, and what was done to it."""

    number: int
    kind: str
    mutations: tuple[str, ...]
    data: bytes
    rewritten: bool


@cache
def good_file(kind: str) -> bytes:
    """Made once a process."""
    return KINDS[kind].make()


def make_case(number: int) -> Case:
    """Case `number`, the same each time."""
    chance = random.Random(number)
    names = list(KINDS)
    name = names[number % len(names)]
    data, applied = good_file(name), []
    for _ in range(chance.choice((1, 1, 2, 3))):
        own = KINDS[name].mutations
        mutation = chance.choice(own if own and chance.random() < 0.4 else COMMON)
        if data:
            data = mutation(data, chance)
            applied.append(mutation)
    return Case(
        number, name, tuple(each.__name__ for each in applied), data, any(each in _REWRITES for each in applied)
    )


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
      number, kind, mutations: as in Case.
      result: "as it was", "changed", "failed" or "failed in part".
      offence: what must not be; None if nothing.
    """

    number: int
    kind: str
    mutations: tuple[str, ...]
    result: str
    offence: str | None = None


def run_case(case: Case, folder: Path) -> Outcome:
    """Decodes or reads a case and judges what comes of it."""
    try:
        result, offence = _decode(case) if KINDS[case.kind].format == "image" else _read(case, folder)
    except BaseException as error:  # an offence by itself, whatever it is
        result, offence = "raised", f"raised {type(error).__name__}: {error}"
    return Outcome(case.number, case.kind, case.mutations, result, offence)


def _decode(case: Case) -> tuple[str, str | None]:
    config = ImageConfig(max_pixels=MAX_PIXELS)
    try:
        decoded = decode_image(case.data, config)
    except ImageError as error:
        return "failed", None if str(error) else "an error without words"
    pixels = decoded.pixels
    if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,) or not 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS:
        return "changed", f"decoded to {pixels.dtype} {pixels.shape}"
    whole = decode_image(good_file(case.kind), config).pixels
    return "as it was" if np.array_equal(pixels, whole) else "changed", None


def _read(case: Case, folder: Path) -> tuple[str, str | None]:
    path = folder / "shard"
    path.write_bytes(case.data)
    kind = KINDS[case.kind]
    shard = Shard("shard", str(path), kind.format, (SourceFile(str(path), len(case.data)),), max_images=10_000)
    return judge(list(read_images(shard, ReadConfig(), str(folder))), kind, case.rewritten)


def judge(rows: list[EncodedImage], kind: Kind, rewritten: bool) -> tuple[str, str | None]:
    """What became of a damaged shard of IMAGES, and what must not be."""
    good = [row.data for row in rows if row.failure is None]
    result = "failed in part" if good else "failed"
    if len(good) == len(rows):
        result = "as it was" if good == IMAGES else "changed"
    offence = None
    if [row.row for row in rows] != list(range(len(rows))):
        offence = "rows are not numbered from 0"
    elif any(bool(row.data) == bool(row.failure) for row in rows):
        offence = "a row has neither bytes nor a reason, or both"
    elif len(rows) >= 10_000:
        offence = "rows without end"
    elif len(good) == len(rows) < len(IMAGES) and not rewritten:
        offence = f"{len(good)} of {len(IMAGES)} images and no reason for the others"
    elif (
        kind.checked
        and not rewritten
        and not set(good) <= set(IMAGES)
        # A stream's checksum is at its end, when its images have been given away; then there is a failed row.
        and (kind.format == "tfrecord" or len(good) == len(rows))
    ):
        offence = "an image is not what it was, and a checksum could have told"
    return result, offence


# Many cases, watched.


@dataclass
class Report:
    """All outcomes.

    Attributes:
      results: how often each result came up.
      offences: the outcomes that must not be.
      peak_rss_bytes: of the process that ran the cases.
    """

    cases: int = 0
    results: Counter[str] = field(default_factory=Counter)
    offences: list[Outcome] = field(default_factory=list)
    peak_rss_bytes: int = 0

    def add(self, outcome: Outcome) -> None:
        """Counts an outcome."""
        self.cases += 1
        self.results[outcome.result] += 1
        if outcome.offence:
            self.offences.append(outcome)


def run_cases(first: int, cases: int) -> Iterator[Outcome]:
    """Runs cases in this process, which a crash or a hang would take with it."""
    warnings.simplefilter("ignore")  # Pillow's, of damaged EXIF
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + cases):
            yield run_case(make_case(number), Path(folder))


def watch_cases(first: int, cases: int, progress: bool = False) -> Report:
    """Runs cases in processes of their own and judges those, too."""
    report = Report()
    end = first + cases
    with tqdm(total=cases, unit="case", desc="fuzz", disable=not progress) as bar:
        while first < end:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.fuzz",
                    "--worker",
                    "--first",
                    str(first),
                    "--cases",
                    str(end - first),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=Path(__file__).parent.parent,
                text=True,
            )
            lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
            reader = threading.Thread(target=_read_lines, args=(process, lines), daemon=True)
            reader.start()
            first = _follow(process, lines, first, end, report, bar)
            reader.join()
    if report.peak_rss_bytes > MAX_RSS_BYTES:
        report.offences.append(Outcome(-1, "all", (), "memory", f"took {report.peak_rss_bytes / 1e9:.1f} GB of memory"))
    return report


def _read_lines(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _follow(
    process: subprocess.Popen[str],
    lines: queue.SimpleQueue[str | None],
    first: int,
    end: int,
    report: Report,
    bar: tqdm,
) -> int:
    """Takes a worker's outcomes; returns the next case to run, which follows the one that ended it."""
    patience = SECONDS_TO_START
    while True:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            process.kill()
            line, ended = None, f"took longer than {patience:.0f} s"
        else:
            ended = "" if line else f"ended the process with exit code {process.wait()}"
        if line is None:
            process.wait()
            if first < end:
                case = make_case(first)
                report.add(Outcome(first, case.kind, case.mutations, "crashed or hung", ended))
                bar.update()
            return first + 1
        patience = SECONDS_A_CASE
        values = json.loads(line)
        if "peak_rss_bytes" in values:
            report.peak_rss_bytes = max(report.peak_rss_bytes, values["peak_rss_bytes"])
            continue
        report.add(Outcome(**{**values, "mutations": tuple(values["mutations"])}))
        bar.update()
        first += 1


def main(argv: list[str] | None = None) -> int:
    """Runs the cases and prints what became of them; returns the exit code, 1 if something was off."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", allow_abbrev=False)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        from maskbeam.transforms.readers.tfrecord import parse_example

        parse_example(b"", ReadConfig())  # imports TensorFlow, before the first case is timed
        for outcome in run_cases(args.first, args.cases):
            print(json.dumps(asdict(outcome)), flush=True)
        # Not getrusage, which begins with what the parent had.
        print(json.dumps({"peak_rss_bytes": peak_rss_bytes()}), flush=True)
        return 0
    report = watch_cases(args.first, args.cases, progress=True)
    print_report(report)
    return 1 if report.offences else 0


def print_report(report: Report) -> None:
    """Counts, and every offence."""
    print(f"{report.cases} damaged files: {', '.join(f'{name} {n}' for name, n in report.results.most_common())}")
    print(f"peak memory {report.peak_rss_bytes / 1e6:.0f} MB, {len(report.offences)} offences")
    for offence in report.offences:
        print(f"  case {offence.number} ({offence.kind}; {', '.join(offence.mutations)}): {offence.offence}")


if __name__ == "__main__":
    sys.exit(main())
