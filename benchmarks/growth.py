"""How time and memory grow: with the number of images, points, image size, crops and the batch of prompts.

python -m benchmarks.growth [--images 1000] [--repeats 3] [--plot growth.png] [--json FILE]

Measured, with the embedded model: label_chunk in this process, from JPEG bytes to RLE.

- Number of images: copies of the shipped photos on a small grid, chunk after chunk as in the pipeline. Resident memory
  after the first tenth of the images and after all of them (it should stay within 5 %), and wall seconds an image over
  the first and the last tenth.
- Everything else: one photo at a time, 1024x683 pixels and 16x16 points unless the row says otherwise; the median of
  --repeats, after one more that compiles.

Left out: loading and compiling the model, reading files, Beam, writing Parquet. The prompts of a row count all crops.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from benchmarks.machine import describe_machine, print_machine, rss_bytes, set_environment
from benchmarks.photos import SHIPPED_PHOTOS, chunk_of, find_photos
from maskbeam.transforms.generate_masks import label_chunk
from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.load_model import ModelConfig, load_model
from maskbeam.transforms.masks.amg import MASKS_PER_POINT, AmgConfig, Sam
from maskbeam.transforms.masks.automatic import AutomaticLabeler
from maskbeam.transforms.model_health import ModelHealth
from maskbeam.transforms.records import LabeledImage
from maskbeam.transforms.threads import host_threads

PHOTO = SHIPPED_PHOTOS / "dandelions.jpg"
CHUNK_SIZE = 32
SMALL_GRID = 4  # points a side while images are counted: the images should go fast, not be hard
LONG_SIDE = 1024
POINTS_PER_SIDE = 16

# What is varied, each from the same middle.
POINTS_PER_SIDES = (8, 16, 32, 64)
LONG_SIDES = (256, 512, 1024, 2048, 4096)
CROP_LAYERS = (0, 1, 2)
BATCHES = (16, 64, 256)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
      varied: the name of what is varied, with its unit.
      value: what it is set to.
      prompts: points over all crops of an image.
      seconds: wall seconds an image.
      masks: kept, an image (a mean where there are several images).
      rss_bytes: resident memory after it.
    """

    varied: str
    value: int
    prompts: int
    seconds: float
    masks: float
    rss_bytes: int


Label = Callable[[list[bytes], AmgConfig], list[LabeledImage]]


def main(argv: list[str] | None = None) -> int:
    """Measures all rows, prints the table and draws the plot; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", allow_abbrev=False)
    parser.add_argument("--images", type=int, default=1000, help="a multiple of 10 (default: 1000)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is taken (default: 3)")
    parser.add_argument("--plot", type=Path, help="draw the table into this PNG")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args(argv)
    if args.images < 10 or args.repeats < 1:
        parser.error("--images must be at least 10 and --repeats at least 1")
    set_environment()
    machine = describe_machine()
    print_machine(machine)
    print("sam_tiny; MB are 10^6 bytes")
    print("varied               value  prompts  seconds/image  seconds/1000 prompts   masks  RSS MB")
    with host_threads() as threads:
        label = labeler(load_model(ModelConfig()), threads)
        rows = [*grow_images(label, args.images), *vary_settings(label, args.repeats)]
    fewer, more = rows[:2]
    more_rss, more_seconds = more.rss_bytes / fewer.rss_bytes - 1, more.seconds / fewer.seconds - 1
    print(
        f"at {more.value} images, RSS differs by {100 * more_rss:+.1f} % from that at {fewer.value}, "
        f"seconds an image by {100 * more_seconds:+.1f} %"
    )
    if args.plot:
        plot(rows).savefig(args.plot)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    return 0


def labeler(sam: Sam, threads: ThreadPoolExecutor) -> Label:
    """Labels encoded images in chunks, as the pipeline's model stage does."""

    def label(images: list[bytes], config: AmgConfig) -> list[LabeledImage]:
        labeled: list[LabeledImage] = []
        for first in range(0, len(images), CHUNK_SIZE):
            chunk = chunk_of(images[first : first + CHUNK_SIZE])
            labeled += label_chunk(AutomaticLabeler(sam, config), chunk, ImageConfig(), threads, ModelHealth()).images
        failures = [image.failure.reason for image in labeled if image.failure]
        if failures:
            raise RuntimeError(f"{len(failures)} images failed: {failures[0]}")
        return labeled

    return label


def grow_images(label: Label, images: int) -> list[Row]:
    """Two rows: after a tenth of the images, and after all of them."""
    photos = [path.read_bytes() for path in find_photos([SHIPPED_PHOTOS])]
    config = AmgConfig(points_per_side=SMALL_GRID, points_per_batch=SMALL_GRID**2)
    label(photos, config)  # compiles
    tenth = images // 10
    rows = []
    for index in range(10):
        start = time.perf_counter()
        labeled = label([photos[i % len(photos)] for i in range(tenth)], config)
        seconds = (time.perf_counter() - start) / tenth
        masks = statistics.fmean(len(image.masks) for image in labeled)
        del labeled  # in the pipeline, it is written and gone
        row = Row("images", (index + 1) * tenth, SMALL_GRID**2, seconds, masks, rss_bytes())
        if index in (0, 9):
            rows.append(row)
            print(line(row), flush=True)
    return rows


def vary_settings(label: Label, repeats: int) -> list[Row]:
    """A row for each value of each setting."""
    cases: list[tuple[str, int, int, dict[str, Any]]] = []  # varied, value, long side, settings
    cases += [("points_per_side", n, LONG_SIDE, {"points_per_side": n}) for n in POINTS_PER_SIDES]
    cases += [("long side, pixels", n, n, {}) for n in LONG_SIDES]
    cases += [("crop_n_layers", n, LONG_SIDE, {"crop_n_layers": n}) for n in CROP_LAYERS]
    cases += [("points_per_batch", n, LONG_SIDE, {"points_per_batch": n}) for n in BATCHES]
    rows = []
    for varied, value, long_side, settings in cases:
        config = AmgConfig(**{"points_per_side": POINTS_PER_SIDE, **settings})
        rows.append(measure(label, varied, value, photo(long_side), config, repeats))
        print(line(rows[-1]), flush=True)
    return rows


def measure(label: Label, varied: str, value: int, data: bytes, config: AmgConfig, repeats: int) -> Row:
    """One row: the median of `repeats` after one that compiles."""
    (labeled,) = label([data], config)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        label([data], config)
        seconds.append(time.perf_counter() - start)
    prompts = labeled.num_candidates // MASKS_PER_POINT
    return Row(varied, value, prompts, statistics.median(seconds), len(labeled.masks), rss_bytes())


def photo(long_side: int) -> bytes:
    """The photo at 3:2, as JPEG."""
    file = io.BytesIO()
    size = long_side, round(long_side / 1.5)
    Image.open(PHOTO).convert("RGB").resize(size, Image.Resampling.BILINEAR).save(file, "JPEG", quality=90)
    return file.getvalue()


def line(row: Row) -> str:
    """A row as text."""
    return (
        f"{row.varied:19}{row.value:7d}{row.prompts:9d}{row.seconds:15.3f}{1000 * row.seconds / row.prompts:22.3f}"
        f"{row.masks:8.1f}{row.rss_bytes / 1e6:8.0f}"
    )


def plot(rows: list[Row]) -> Figure:
    """A panel for each thing varied: seconds an image; for the number of images RSS too.

    All heights are logarithmic, over a factor of ten at least, so that what is flat looks flat.
    """
    groups = {row.varied: [other for other in rows if other.varied == row.varied] for row in rows}
    panels = [("RSS, MB", "images", [(row.value, row.rss_bytes / 1e6) for row in groups["images"]])]
    panels += [
        ("seconds an image", name, [(row.value, row.seconds) for row in group]) for name, group in groups.items()
    ]
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axes, (measured, varied, points) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        settings, values = [str(setting) for setting, _ in points], [value for _, value in points]
        axes.plot(settings, values, "o-")
        for setting, value in zip(settings, values, strict=True):
            text = f"{value:.3g}" if value < 100 else f"{value:.0f}"
            axes.annotate(text, (setting, value), (0, 6), textcoords="offset points", ha="center")
        middle, half = math.sqrt(min(values) * max(values)), math.sqrt(max(10, max(values) / min(values)))
        axes.set(
            yscale="log", ylim=(middle / half / 1.3, middle * half * 1.3), xlabel=varied, ylabel=f"{measured} (log)"
        )
        axes.tick_params(axis="y", which="both", left=False, labelleft=False)  # the points tell their values
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
