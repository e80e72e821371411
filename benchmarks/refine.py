"""Seconds that `maskbeam refine` takes for a million stored candidates, by what it is asked to do.

python -m benchmarks.refine [--images 1000] [--json FILE]

Synthetic labels: 640 x 480 images with 1000 candidates each, of 60 objects: ellipses of 8 to 120 pixels of radius, each
candidate's centre and radii off by a few per cent, predicted IoU and stability spread from the bar to 1. As many such
images as make a chunk are drawn, and stored again and again under other names.

Measured: run_refine in this process, from reading Parquet to summary.json; wall seconds, and CPU seconds of all
threads. Left out: starting Python and importing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine, print_machine, set_environment
from maskbeam.pipeline.commands.refine import parse_refine, run_refine
from maskbeam.transforms.labels.commit import commit_chunk
from maskbeam.transforms.labels.run_file import Run, write_run
from maskbeam.transforms.masks import rle
from maskbeam.transforms.masks.amg import AmgConfig
from maskbeam.transforms.records import (
    CropBox,
    Dropped,
    EncodedImage,
    LabeledChunk,
    LabeledImage,
    Shard,
    StoredCandidate,
)

SIZE_HW = (480, 640)
CANDIDATES, OBJECTS, CHUNK_SIZE = 1000, 60, 32
CONFIG = AmgConfig(keep_candidates=True)

CASES = {
    "the same settings": "",
    "thresholds and area": "--pred_iou_thresh 0.8 --stability_score_thresh 0.9 --min_mask_area 400 --max_masks 50",
    "all above the bar, NMS at 0.9": "--pred_iou_thresh 0.705 --stability_score_thresh 0.77 --box_nms_thresh 0.9",
    "whole objects": "--containment whole",
    "parts": "--containment parts",
    "NMS by masks": "--nms_by mask",
    "small regions cleaned": "--min_mask_region_area 100",
}


def main(argv: list[str] | None = None) -> int:
    """Writes the labels, refines them for each case and prints a line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refine", allow_abbrev=False)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args(argv)
    set_environment()
    machine = describe_machine()
    print_machine(machine)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        labels = Path(folder) / "labels"
        write_labels(labels, args.images)
        stored = sum(file.stat().st_size for file in (labels / "candidates").iterdir())
        print(f"{args.images * CANDIDATES} candidates of {args.images} images, {stored / 1e6:.0f} MB")
        print(f"{'':<36}{'wall s':>8}{'CPU s':>8}{'masks':>9}")
        for number, (name, flags) in enumerate(CASES.items()):
            measured.append({"case": name, **measure(labels, Path(folder) / str(number), flags.split())})
            print("{case:<36}{wall:>8.1f}{cpu:>8.1f}{masks:>9}".format(**measured[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "bytes": stored, "cases": measured}, indent=2) + "\n")
    return 0


def measure(labels: Path, output: Path, flags: list[str]) -> dict[str, Any]:
    """One run of refine."""
    job, changes = parse_refine(["--labels", str(labels), "--output", str(output), *flags])
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        code = run_refine(job, changes)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if code:
        raise RuntimeError(f"refine failed: {flags}")
    summary = json.loads((output / "summary.json").read_text())
    return {"flags": flags, "wall": wall, "cpu": cpu, "masks": summary["masks"]}


def write_labels(output: Path, images: int) -> None:
    """Labels without masks, as `label --keep_candidates` would write them."""
    run = Run(root="/", model_fingerprint="none", amg=asdict(CONFIG))
    write_run(str(output), run)
    drawn = [tuple(draw_candidates(seed)) for seed in range(CHUNK_SIZE)]
    shard = Shard("synthetic.tar", "/synthetic.tar", "tar", ())
    for index, first in enumerate(range(0, images, CHUNK_SIZE)):
        chunk = tuple(
            LabeledImage(
                source=EncodedImage(f"synthetic.tar#{row}", row, None, None, b""),
                num_bytes=0,
                sha256="",
                size_hw=SIZE_HW,
                exif_orientation=1,
                num_candidates=CANDIDATES,
                dropped=Dropped(box_nms=CANDIDATES),
                candidates=(drawn[row % CHUNK_SIZE],),
            )
            for row in range(first, min(first + CHUNK_SIZE, images))
        )
        final = first + CHUNK_SIZE >= images
        commit_chunk(LabeledChunk.of(shard, index, chunk, final, "digest", keep_candidates=True), str(output), run)


def draw_candidates(seed: int) -> Iterator[StoredCandidate]:
    """The candidates of one image."""
    random = np.random.default_rng(seed)
    height, width = SIZE_HW
    crop = CropBox((0, 0, width, height), 0)
    centres = random.uniform((0, 0), (width, height), (OBJECTS, 2))
    radii = random.uniform(8, 120, (OBJECTS, 2))
    x, y = np.arange(width)[:, None], np.arange(height)[None]  # transposed, as runs go down the columns
    for one in random.integers(0, OBJECTS, CANDIDATES):
        rx, ry = radii[one] * random.normal(1, 0.05, 2)
        cx, cy = centres[one] + radii[one] * random.normal(0, 0.05, 2)
        bits = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
        counts = rle.runs_to_counts(rle.bits_to_runs(bits, (0, 0), SIZE_HW))
        area, (left, top, w, h) = rle.area_and_bbox_xywh(counts, SIZE_HW)
        bar = CONFIG.bar
        yield StoredCandidate(
            crop=crop,
            point_xy=(float(cx), float(cy)),
            predicted_iou=float(np.float32(random.uniform(bar.pred_iou_thresh + 0.001, 1))),
            stability_score=float(np.float32(random.uniform(bar.stability_score_thresh, 1))),
            box_xyxy=(int(left), int(top), int(left + w - 1), int(top + h - 1)) if area else (0, 0, 0, 0),
            counts=counts,
            area=area,
        )


if __name__ == "__main__":
    sys.exit(main())
