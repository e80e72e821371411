"""Peak memory of labeling one JPEG of 1, 12, 48 and 100 megapixels, with masks of the whole image among the results.

python -m benchmarks.memory [--megapixels 1 12 48 100] [--points_per_side 8] [--json FILE]

Measured: resident memory of a fresh process for each size, with the embedded model, from JPEG bytes to RLE through
label_chunk, as the pipeline does it. "before" is that of the process once the model is loaded and compiled and a tiny
image labeled; then Linux's high-water mark is reset (/proc/self/clear_refs), the image labeled, and the mark read.

The photo is a shipped one, enlarged. The model is wrapped: every eighth prompt answers with logits of +10 everywhere
and a predicted IoU of 0.99, so that its three masks cover the whole image, the most that a mask can cost. NMS is
switched off (--box_nms_thresh 1), so all of them are kept and encoded.

Left out: reading the file, Beam, and writing Parquet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import (
    describe_machine,
    peak_rss_bytes,
    print_machine,
    reset_peak_rss,
    rss_bytes,
    set_environment,
)
from benchmarks.photos import REPOSITORY, SHIPPED_PHOTOS, chunk_of
from maskbeam.transforms.generate_masks import label_chunk
from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.load_model import ModelConfig, load_model
from maskbeam.transforms.masks.amg import AmgConfig, Sam, Scored
from maskbeam.transforms.masks.automatic import AutomaticLabeler
from maskbeam.transforms.model_health import ModelHealth
from maskbeam.transforms.records import LabeledImage
from maskbeam.transforms.threads import host_threads

PHOTO = SHIPPED_PHOTOS / "dandelions.jpg"
FULL_FRAME_EVERY = 8  # prompts


@dataclass(frozen=True)
class _PartlyFullFrame:
    """A batch of prompts of which some are answered with the whole frame."""

    real: Scored

    def predicted_iou(self) -> np.ndarray:
        predicted_iou = self.real.predicted_iou().copy()
        predicted_iou[::FULL_FRAME_EVERY] = 0.99
        return predicted_iou


class FullFrameSam:
    """A Sam whose every FULL_FRAME_EVERY-th prompt of a batch sees one object that fills the frame."""

    def __init__(self, sam: Sam) -> None:
        self._sam = sam
        self.frame_size = sam.frame_size
        self.low_size = sam.low_size
        self.embed = sam.embed

    def score(self, context: Any, points_xy: np.ndarray, points_per_batch: int) -> _PartlyFullFrame:
        return _PartlyFullFrame(self._sam.score(context, points_xy, points_per_batch))

    def low_res_logits(self, scored: _PartlyFullFrame, prompts: np.ndarray) -> np.ndarray:
        logits = self._sam.low_res_logits(scored.real, prompts)
        logits[prompts % FULL_FRAME_EVERY == 0] = 10.0
        return logits


def main(argv: list[str] | None = None) -> int:
    """Measures each size in a process of its own and prints a line for it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", allow_abbrev=False)
    parser.add_argument("--megapixels", nargs="+", type=float, default=[1, 12, 48, 100])
    parser.add_argument("--points_per_side", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    set_environment()
    if args.of:
        print(json.dumps(measure(args.of.read_bytes(), args.points_per_side)))
        return 0

    machine = describe_machine()
    print_machine(machine)
    grid = f"{args.points_per_side}x{args.points_per_side}"
    print(f"sam_tiny, {grid} points, every {FULL_FRAME_EVERY}th prompt full-frame; MB are 10^6 bytes")
    print(
        "  megapixels  decoded MB  before MB  peak MB  difference MB  difference/decoded  masks  full-frame  RLE bytes"
    )
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for megapixels in args.megapixels:
            path = Path(folder) / "photo.jpg"
            enlarged(megapixels).save(path, quality=90)
            measured.append(measure_apart(path, args.points_per_side))
            print(line(measured[-1]), flush=True)
    if not all(one["mark_was_reset"] for one in measured):
        print("/proc/self/clear_refs is not writable here: the peak may be that of loading and compiling the model")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "sizes": measured}, indent=2) + "\n")
    return 0


def enlarged(megapixels: float) -> Image.Image:
    """The photo at 3:2 and about so many million pixels."""
    height = round((megapixels * 1e6 / 1.5) ** 0.5)
    return Image.open(PHOTO).convert("RGB").resize((round(height * 1.5), height), Image.Resampling.BILINEAR)


def measure_apart(photo: Path, points_per_side: int) -> dict[str, Any]:
    """`measure` in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--of", photo, "--points_per_side", str(points_per_side)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(data: bytes, points_per_side: int) -> dict[str, Any]:
    """Labels one JPEG and returns bytes, as the module's docstring says."""
    sam: Any = FullFrameSam(load_model(ModelConfig()))
    config = AmgConfig(points_per_side=points_per_side, box_nms_thresh=1.0)
    with host_threads() as threads:

        def label(image: bytes) -> LabeledImage:
            (labeled,) = label_chunk(
                AutomaticLabeler(sam, config), chunk_of([image]), ImageConfig(), threads, health=ModelHealth()
            ).images
            if labeled.failure:
                raise RuntimeError(f"labeling failed: {labeled.failure.reason}")
            return labeled

        with tempfile.TemporaryFile() as file:
            Image.new("RGB", (96, 64), "gray").save(file, "JPEG")
            file.seek(0)
            label(file.read())
        mark_was_reset = reset_peak_rss()
        before = rss_bytes()
        start = time.perf_counter()
        labeled = label(data)
        seconds = time.perf_counter() - start
        peak = peak_rss_bytes()
    assert labeled.size_hw is not None  # it did not fail
    pixels = labeled.size_hw[0] * labeled.size_hw[1]
    return {
        "size_hw": labeled.size_hw,
        "jpeg_bytes": len(data),
        "decoded_bytes": 3 * pixels,
        "before_bytes": before,
        "peak_bytes": peak,
        "mark_was_reset": mark_was_reset,
        "seconds": seconds,
        "masks": len(labeled.masks),
        "full_frame_masks": sum(mask.area == pixels for mask in labeled.masks),
        "rle_bytes": sum(len(mask.counts) for mask in labeled.masks),
    }


def line(measured: dict[str, Any]) -> str:
    """A row of the table."""
    height, width = measured["size_hw"]
    difference = measured["peak_bytes"] - measured["before_bytes"]
    return (
        f"{height * width / 1e6:12.1f}{measured['decoded_bytes'] / 1e6:12.1f}{measured['before_bytes'] / 1e6:11.0f}"
        f"{measured['peak_bytes'] / 1e6:9.0f}{difference / 1e6:15.1f}{difference / measured['decoded_bytes']:20.2f}"
        f"{measured['masks']:7d}{measured['full_frame_masks']:12d}{measured['rle_bytes']:11d}"
    )


if __name__ == "__main__":
    sys.exit(main())
