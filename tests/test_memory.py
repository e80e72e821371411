"""Input that would fill the memory: what the process takes above what it has when it is ready, as the system counts it.

Each case runs in a process of its own, since a peak never goes down again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import read_labels, write_photos

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]
MB = 2**20

# Labels a photo first, so that all is loaded, then the case; prints the kilobytes of the peak above the peak before.
PROGRAM = """
import resource, sys
from tests.conftest import label
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
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
