"""Wall time of the whole pipeline, files to Parquet, and the share of it that the model stage has.

python -m benchmarks.pipeline [--images 300] [--photos DIR] [--json FILE] [flags of `maskbeam label` ...]

Measured: `maskbeam label` in a process of its own, as users start it, three times: twice on one image and once on all.
The wall time of the second start with one image is the start-up: imports, loading the model, compiling it, and one
image. (The first start finds cold files, and fills whatever caches the backend keeps between processes.) What the whole
run takes beyond that is the time of its other images, and its seconds in summary.json, less those of the one image,
say where it went:

- model stage is the wall time within GenerateMasks, from a chunk's encoded images to its masks. Its share of the wall
  time tells how little everything else (reading, Beam, writing) holds it up.
- The stages within it are seconds of the threads that did them, side by side, so they add up to more than its wall
  time. write is Parquet, outside of it.

The photos are copies of the shipped ones, or those of --photos, all of them. Flags that are not known here go to
`maskbeam label`; with the embedded model the thresholds are those of benchmarks.compare unless given.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, print_machine, set_environment
from benchmarks.photos import REPOSITORY, SHIPPED_PHOTOS, find_photos

# The command, with a clock around the model stage.
TIMED_COMMAND = """
import sys, time
from pathlib import Path
from transforms import segment

label_chunk, spent = segment.label_chunk, []

def timed(*args, **kwargs):
    start = time.perf_counter()
    chunk = label_chunk(*args, **kwargs)
    spent.append(time.perf_counter() - start)
    return chunk

segment.label_chunk = timed
from maskbeam.pipeline.cli import main
code = main(sys.argv[2:])
Path(sys.argv[1]).write_text(str(sum(spent)))
sys.exit(code)
"""


@dataclass(frozen=True)
class Start:
    """One run of `maskbeam label`.

    Attributes:
      wall: seconds from start to exit of the process.
      cpu: seconds of its processor time, all threads together.
      model_stage: wall seconds within GenerateMasks.
      summary: summary.json.
    """

    wall: float
    cpu: float
    model_stage: float
    summary: dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Runs the pipeline and prints the split; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline",
        description="Times maskbeam label on some hundred photos. Other flags go to maskbeam label.",
        allow_abbrev=False,
    )
    parser.add_argument("--images", type=int, default=300, help="copies of the shipped photos (default: 300)")
    parser.add_argument("--photos", type=Path, help="directory of photos in their place")
    parser.add_argument("--model", default="sam_tiny")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args, label_flags = parser.parse_known_args(argv)
    set_environment()

    machine = describe_machine()
    print_machine(machine)
    print(f"maskbeam label --model {args.model} {' '.join(label_flags)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="maskbeam-bench-") as folder:
        photos = args.photos or copy_photos(Path(folder) / "photos", args.images)
        command = ["label", "--model", args.model, *label_flags]
        first = start(command, photos, Path(folder) / "first", "--limit=1")
        second = start(command, photos, Path(folder) / "second", "--limit=1")
        whole = start(command, photos, Path(folder) / "whole")
    report = split(first, second, whole)
    print_report(report)
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine, "model": args.model, "flags": label_flags, **report}, indent=2) + "\n"
        )
    return 0


def copy_photos(folder: Path, images: int) -> Path:
    """So many copies of the shipped photos, in turns."""
    folder.mkdir()
    photos = find_photos([SHIPPED_PHOTOS])
    for index in range(images):
        photo = photos[index % len(photos)]
        shutil.copyfile(photo, folder / f"{index:05d}-{photo.name}")
    return folder


def start(command: list[str], photos: Path, output: Path, *flags: str) -> Start:
    """Runs `maskbeam label` from start to end.

    Raises:
      CalledProcessError: it failed; its own words are on stderr.
    """
    output.mkdir()
    clock = output.with_suffix(".clock")
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", TIMED_COMMAND, str(clock), *command, f"--input={photos}", f"--output={output}", *flags],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    return Start(wall, cpu, float(clock.read_text()), json.loads((output / "summary.json").read_text()))


def split(first: Start, second: Start, whole: Start) -> dict[str, Any]:
    """Where the time of the whole run went; all values in seconds but where named otherwise."""
    wall = whole.wall - second.wall
    images = whole.summary["images"] - second.summary["images"]
    if images < 1:
        raise ValueError("at least two photos are needed: the first belongs to the start-up")
    stages = {stage: seconds - second.summary["seconds"][stage] for stage, seconds in whole.summary["seconds"].items()}
    return {
        "first_start": first.wall,
        "start_up": second.wall,
        "whole": whole.wall,
        "after_start_up": wall,
        "images_after_start_up": images,
        "images_per_second": images / wall,
        "masks": whole.summary["masks"],
        "failed": whole.summary["failed"],
        "stages": stages,
        "model_share": (whole.model_stage - second.model_stage) / wall,
        "cpu_share": (whole.cpu - second.cpu) / wall / (os.cpu_count() or 1),
    }


def print_report(report: dict[str, Any]) -> None:
    """The split as a table."""
    wall, images = report["after_start_up"], report["images_after_start_up"]
    print(f"{images + 1} images, {report['failed']} failed, {report['masks']} masks")
    print(f"{'whole run':32}{report['whole']:9.1f} s")
    print(f"{'start-up, with one image':32}{report['start_up']:9.1f} s   (first start {report['first_start']:.1f} s)")
    print(f"{'after start-up':32}{wall:9.1f} s   {images} images, {report['images_per_second']:.2f} images/s")
    for stage, seconds in report["stages"].items():
        print(f"  {stage:30}{seconds:9.1f} s of threads{'' if stage == 'write' else ', within the model stage'}")
    print(f"{'model stage, share of the rest':32}{100 * report['model_share']:9.1f} %")
    print(f"{'all cores in use':32}{100 * report['cpu_share']:9.1f} %")


if __name__ == "__main__":
    sys.exit(main())
