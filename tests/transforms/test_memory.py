"""Input that would fill the memory: what the process takes above what it has when it is ready, as the system counts it.

Each case runs in a process of its own, since a peak never goes down again.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.conftest import read_labels, write_photos
from tests.test_hostile import pax_record, tar_header

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc"),
]

ROOT = Path(__file__).parents[2]
MB = 2**20

# Labels a photo first, so that all is loaded, then the case; prints the kilobytes of the peak above the peak before.
PROGRAM = """
import re, sys
from pathlib import Path
from tests.conftest import label
def peak():  # not getrusage's, which begins with the peak of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
ready, case, output = sys.argv[1:4]
assert label("--input", ready, "--output", output + "-ready") == 0
before = peak()
code = label("--input", case, "--output", output, *sys.argv[4:])
print("PEAK", peak() - before, code)
"""


def label_elsewhere(case: Path, output: Path, ready: Path, *flags: str) -> tuple[int, list[dict[str, Any]]]:
    """Bytes above the ready process, and the rows of the images."""
    command = [sys.executable, "-c", PROGRAM, str(ready), str(case), str(output), *flags]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    _, kilobytes, code = done.stdout.split()[-3:]
    assert code == "0", done.stdout + done.stderr
    return int(kilobytes) * 1024, read_labels(output).images


# Long and thin images.


def flat_png(width: int, height: int) -> bytes:
    """A white picture of a kilobyte or so, however large, made without its pixels."""

    def block(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    row, packer = b"\0" + b"\xff" * width, zlib.compressobj(9)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])  # 8-bit grey
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", body) + block(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(30_000_000, 1), (1, 30_000_000)])
def test_long_and_thin_images_are_labeled_in_the_memory_of_any_other(width: int, height: int, tmp_path: Path) -> None:
    """README promises 7 bytes a pixel, 16 for one row, and the masks next to nothing."""
    case = write_photos(tmp_path / "case", 1)
    (case / "long.png").write_bytes(flat_png(width, height))
    ready = write_photos(tmp_path / "ready", 1)
    peak, rows = label_elsewhere(case, tmp_path / "out", ready, "--points_per_side", "1", "--min_mask_region_area", "9")
    assert [(row["image_id"], row["status"], row["error"]) for row in rows] == [
        ("0.png", "labeled", None),
        ("long.png", "labeled", None),
    ]
    assert peak < 16 * width * height + 400 * MB


# Files that inflate.

ZEROS = bytes(32 * MB)


def inflating_tar(compress: Callable[[bytes], bytes]) -> bytes:
    """A tar of one image of 960 MB, then one of 4 GB, as streams that follow each other."""
    first = tarfile.TarInfo("a.jpg")
    first.size = 30 * len(ZEROS)
    second = tarfile.TarInfo("b.jpg")
    second.size = 128 * len(ZEROS)
    zeros = compress(ZEROS)
    return compress(first.tobuf()) + zeros * 30 + compress(second.tobuf()) + zeros * 128


def sparse_tar(members: int, size: int) -> bytes:
    """Images that are nothing but holes."""
    archive = b""
    for number in range(members):
        records = (b"GNU.sparse.map=0,1", b"GNU.sparse.size=%d" % size, b"GNU.sparse.numblocks=1")
        body = b"".join(map(pax_record, records))
        archive += tar_header(tarfile.XHDTYPE, len(body)) + body.ljust(512, b"\0")
        archive += tar_header(b"0", 1, f"{number}.jpg") + b"y".ljust(512, b"\0")
    return archive + bytes(1024)


def inflating_parquet(path: Path) -> None:
    """Images of zeros, 2 GB of them, a page each."""
    schema = pa.schema({"image": pa.binary()})
    table = pa.table({"image": pa.array([bytes(200 * MB)])}, schema)
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(10):
            writer.write_table(table)


def repeating_parquet(path: Path) -> None:
    """One image of 100 MB for a thousand rows: the footer has no more than the dictionary's size."""
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([bytes(100 * MB)]))
    table = pa.table({"image": images}).replace_schema_metadata(None)
    pq.write_table(table, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=2**30)


def test_files_that_inflate_are_failed_rows_in_bounded_memory(tmp_path: Path) -> None:
    case = write_photos(tmp_path / "case", 1)
    ready = write_photos(tmp_path / "ready", 1)
    compressions: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard.compress,
    }
    for name, compress in compressions.items():
        (case / f"bomb.tar.{name}").write_bytes(inflating_tar(compress))
    (case / "sparse.tar").write_bytes(sparse_tar(4, 2**30))
    inflating_parquet(case / "inflating.parquet")
    repeating_parquet(case / "repeating.parquet")
    assert all(file.stat().st_size < 8 * MB for file in case.iterdir())

    peak, rows = label_elsewhere(case, tmp_path / "out", ready)
    assert peak < 1024 * MB
    reasons = {row["image_id"]: row["error"] for row in rows}
    assert reasons.pop("0.png") is None
    for number in range(4):
        assert f"is a sparse file of {2**30} bytes" in reasons.pop(f"sparse.tar#{number}")
    # All others end with the word; of the repeated image the first rows are no image for another reason.
    last = {image_id.partition("#")[0]: reason for image_id, reason in sorted(reasons.items())}
    assert sorted(last) == [f"bomb.tar.{name}" for name in ("bz2", "gz", "xz", "zst")] + [
        "inflating.parquet",
        "repeating.parquet",
    ]
    assert all("a decompression bomb" in reason for reason in last.values()), last
