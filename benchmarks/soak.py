"""The long run: nothing is lost when processes are killed, memory stays flat, and no damaged file does harm.

python -m benchmarks.soak [--images 3000] [--kills 20] [--cases 2000] [--plot FILE.png] [--json FILE]    (= make soak)

Three parts, each with the embedded model on a 4x4 grid; 0 leaves a part out. The exit code is 1 if a line of the table
at the end says "off".

- Images: `maskbeam label` on so many small JPEGs in one start: loose, in tars, TFRecords and Parquet. They are crops of
  the six shipped photos, scaled, with noise; 2 % are damaged on purpose. Each must have one row, the damaged ones a
  failed one. While it runs, resident memory, CPU time and the images done are sampled. Memory: the median over the last
  tenth of the images against that over the second tenth (the first warms up), and the least-squares slope between.
  Speed: CPU seconds an image, which neighbours on the machine disturb least, of the first and the last 500 images; the
  images a second of both are printed beside it.
- Kills: one data set is labeled undisturbed, then with kill -9 of the process (in turns with one and with two worker
  processes), then with kill -9 of one of two worker processes, each so many times at random moments, each time started
  again. The rows must be those of the undisturbed run, `seconds` aside, no image twice, no other file in the output,
  and no worker that outlives its launcher.
- Cases: damaged images and shards, see benchmarks/fuzz.py.

Left out: other runners and file systems; those are in the tests.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from benchmarks import fuzz
from benchmarks.machine import describe_machine, print_machine, set_environment
from benchmarks.photos import REPOSITORY, SHIPPED_PHOTOS, find_photos

GRID = ["--points_per_side=4", "--points_per_batch=16"]
TWO_PROCESSES = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]

IMAGES_A_SHARD = 125
BROKEN_SHARE = 0.02
SAMPLE_SECONDS = 0.25
ENDS = 500  # images at either end whose speed is compared
WARM_UP = 50  # images before the first of them: the model is compiled

# What still counts as flat and as steady.
MAX_RSS_GROWTH = 0.05
MAX_SLOWDOWN = 0.2

KILL_CHUNK = 4
PATIENCE = 300.0  # seconds for what should take a few


@dataclass(frozen=True)
class Check:
    """A line of the table at the end."""

    name: str
    found: str
    expected: str
    ok: bool


def main(argv: list[str] | None = None) -> int:
    """Runs the parts and prints the table; returns the exit code, 1 if something was off."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", allow_abbrev=False)
    parser.add_argument("--images", type=int, default=3000, help="at least 1,200, or 0 (default: 3000)")
    parser.add_argument("--kills", type=int, default=20, help="of the process, and of a worker (default: 20)")
    parser.add_argument("--cases", type=int, default=2000, help="damaged files (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which processes are killed")
    parser.add_argument("--plot", type=Path, help="draw memory and speed over the images into this PNG")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args(argv)
    if 0 < args.images < 1200:
        parser.error("--images must be at least 1200: the first and the last 500 are compared")
    set_environment()
    machine = describe_machine()
    print_machine(machine)
    checks: list[Check] = []
    report: dict[str, Any] = {"machine": machine, "arguments": vars(args)}
    with tempfile.TemporaryDirectory(prefix="maskbeam-soak-") as name:
        folder = Path(name)
        if args.images:
            growth = label_many(folder / "many", args.images)
            checks += growth.checks()
            report["images"] = asdict(growth)
            if args.plot:
                plot(growth.samples).savefig(args.plot)
        if args.kills:
            checks += kill_and_go_on(folder / "kills", args.kills, random.Random(args.seed))
        if args.cases:
            fuzzed = fuzz.watch_cases(0, args.cases, progress=True)
            fuzz.print_report(fuzzed)
            checks.append(
                Check(f"{fuzzed.cases} damaged files", f"{len(fuzzed.offences)} offences", "0", not fuzzed.offences)
            )
            report["cases"] = vars(fuzzed)  # asdict would count the pairs of its Counter
    print_table(checks)
    if args.json:
        report["checks"] = [asdict(check) for check in checks]
        args.json.write_text(json.dumps(report, indent=2, default=str) + "\n")
    return 0 if all(check.ok for check in checks) else 1


def print_table(checks: list[Check]) -> None:
    """What was found, line by line."""
    rows = [("", "found", "expected"), *((check.name, check.found, check.expected) for check in checks)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row, verdict in zip(rows, ["", *("ok" if check.ok else "off" for check in checks)], strict=True):
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) + f"  {verdict}")


# The images.


def make_images(count: int) -> Iterator[bytes]:
    """Small JPEGs, no two alike, of which some are damaged (an empty one, a cut one, a page of HTML, in turns)."""
    photos = [Image.open(path).convert("RGB") for path in find_photos([SHIPPED_PHOTOS])]
    for number in range(count):
        chance = np.random.default_rng(number)
        photo = photos[number % len(photos)]
        side = int(chance.uniform(0.3, 0.9) * min(photo.size))
        left, top = (int(chance.integers(0, extent - side + 1)) for extent in photo.size)
        size = int(chance.integers(96, 257)), int(chance.integers(96, 257))
        pixels = np.asarray(photo.crop((left, top, left + side, top + side)).resize(size))
        noise = chance.normal(0, 6, pixels.shape)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        data = buffer.getvalue()
        if is_broken(number):
            data = (b"", data[: len(data) // 2], b"<!DOCTYPE html><p>%d" % number)[number % 3]
        yield data


def is_broken(number: int) -> bool:
    """Every fiftieth, and at another place in each fifty."""
    every = round(1 / BROKEN_SHARE)
    return number % every == number // every % every


def write_images(folder: Path, count: int) -> dict[str, bool]:
    """Writes make_images in shards of all formats, in turns; returns the image ids and which are broken."""
    folder.mkdir(parents=True)
    image_ids: dict[str, bool] = {}
    shard: list[bytes] = []
    for number, data in enumerate(tqdm(make_images(count), total=count, unit="image", desc="making images")):
        shard.append(data)
        if len(shard) == IMAGES_A_SHARD or number == count - 1:
            first = number + 1 - len(shard)
            names = write_shard(folder, first, shard)
            image_ids.update({name: is_broken(first + index) for index, name in enumerate(names)})
            shard = []
    return image_ids


def write_shard(folder: Path, first: int, images: list[bytes]) -> list[str]:
    """One shard; returns its image ids."""
    kind = ("loose", "tar", "tfrecord", "loose", "parquet")[first // IMAGES_A_SHARD % 5]
    name = f"{first:06d}"
    if kind == "loose":
        (folder / name).mkdir()
        for index, data in enumerate(images):
            (folder / name / f"{index:03d}.jpg").write_bytes(data)
        return [f"{name}/{index:03d}.jpg" for index in range(len(images))]
    path = folder / f"{name}.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            for index, data in enumerate(images):
                info = tarfile.TarInfo(f"{index:03d}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    elif kind == "tfrecord":
        path.write_bytes(b"".join(fuzz.frame_record(fuzz.make_example(data)) for data in images))
    else:
        pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), path, row_group_size=50)
    return [f"{path.name}#{row}" for row in range(len(images))]


# `maskbeam label` as a process of its own.


def start(data: Path, output: Path, scratch: Path, *flags: str) -> subprocess.Popen[bytes]:
    """Starts the command. Its progress files, named by process ids, come to lie below `scratch`."""
    scratch.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pipeline", "label", f"--input={data}", f"--output={output}"]
    with (scratch / "stderr.txt").open("ab") as errors:
        return subprocess.Popen(
            [*command, *GRID, *flags],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(scratch)},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


def run_to_end(data: Path, output: Path, scratch: Path, *flags: str) -> None:
    """Runs the command to its good end.

    Raises:
      RuntimeError: it failed; its own words are in the message.
    """
    process = start(data, output, scratch, *flags)
    if process.wait() != 0:
        words = (scratch / "stderr.txt").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"maskbeam label ended with exit code {process.returncode}: {words}")


def progress_files(scratch: Path) -> list[Path]:
    """One for each process that labels, of this start and of those before; named by the process's id."""
    return list(scratch.glob("maskbeam-*/progress/*"))


def read_rows(output: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of images (without `seconds`) and of annotations, sorted."""
    images, annotations = (
        [row for path in sorted((output / name).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
        for name in ("images", "annotations")
    )
    for row in images:
        del row["seconds"]
    images.sort(key=lambda row: row["image_id"])
    annotations.sort(key=lambda row: (row["image_id"], row["mask_index"]))
    return images, annotations


def stray_files(output: Path) -> list[str]:
    """Files in an output that a finished run does not leave."""
    names = sorted(path.relative_to(output).as_posix() for path in output.rglob("*"))
    known = {"run.json", "summary.json", "annotations", "images"}
    return [
        name
        for name in names
        if name not in known and not (name.startswith(("annotations/", "images/")) and name.endswith(".parquet"))
    ]


# Part one: many images.


@dataclass(frozen=True)
class Sample:
    """The process at one moment: images done, seconds since the start, CPU seconds, resident memory."""

    images: int
    wall: float
    cpu: float
    rss_bytes: int


@dataclass
class Growth:
    """What came of many images.

    Attributes:
      images: how many there were.
      missing, twice, wrong_status: image ids whose rows are not what they should be.
      strays: files in the output that should not be there.
      samples: in the order of time.
    """

    images: int
    failed: int = 0
    missing: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    wrong_status: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def between(self, first: float, last: float) -> list[Sample]:
        """Samples taken when so many images were done."""
        return [sample for sample in self.samples if first <= sample.images <= last]

    def speed(self, first: int, last: int) -> tuple[float, float]:
        """Images a second and CPU seconds an image between two numbers of images."""
        within = self.between(first, last)
        images = within[-1].images - within[0].images
        return images / (within[-1].wall - within[0].wall), (within[-1].cpu - within[0].cpu) / images

    def checks(self) -> list[Check]:
        """The lines of the table."""
        second, last = (
            statistics.median(sample.rss_bytes for sample in self.between(first * self.images, end * self.images))
            for first, end in ((0.1, 0.2), (0.9, 1))
        )
        growth = last / second - 1
        steady = self.between(0.1 * self.images, self.images)
        slope, _ = np.polyfit([s.images for s in steady], [s.rss_bytes for s in steady], 1)
        (first_rate, first_cpu), (last_rate, last_cpu) = (
            self.speed(WARM_UP, WARM_UP + ENDS),
            self.speed(self.images - ENDS, self.images),
        )
        wrong = [*self.missing, *self.twice, *self.wrong_status]
        return [
            Check(
                f"{self.images} images ({self.failed} broken): missing, twice, wrong status",
                f"{len(self.missing)}, {len(self.twice)}, {len(self.wrong_status)}"
                + (f" {wrong[:3]}" if wrong else ""),
                "0, 0, 0",
                not wrong,
            ),
            Check("other files in the output", str(len(self.strays)), "0", not self.strays),
            Check(
                "memory, second tenth and last tenth",
                f"{second / 1e6:.0f} and {last / 1e6:.0f} MB, {100 * growth:+.1f} %",
                f"at most {100 * MAX_RSS_GROWTH:+.0f} %",
                growth <= MAX_RSS_GROWTH,
            ),
            Check("memory, slope", f"{slope / 1e3:+.1f} kB an image", "", True),
            Check(
                f"CPU an image, first and last {ENDS}",
                f"{1000 * first_cpu:.0f} and {1000 * last_cpu:.0f} ms, {100 * (last_cpu / first_cpu - 1):+.1f} %",
                f"at most {100 * MAX_SLOWDOWN:+.0f} %",
                last_cpu <= first_cpu * (1 + MAX_SLOWDOWN),
            ),
            Check(f"speed, first and last {ENDS}", f"{first_rate:.1f} and {last_rate:.1f} images/s", "", True),
        ]


def label_many(folder: Path, count: int) -> Growth:
    """Labels many images in one process and samples it meanwhile."""
    image_ids = write_images(folder / "data", count)
    growth = Growth(count, sum(image_ids.values()))
    output, scratch = folder / "labels", folder / "scratch"
    process = start(folder / "data", output, scratch)
    began = time.perf_counter()
    with tqdm(total=count, unit="image", desc="labeling") as bar:
        while process.poll() is None:
            time.sleep(SAMPLE_SECONDS)
            sample = take_sample(process.pid, scratch, time.perf_counter() - began)
            if sample is not None:
                growth.samples.append(sample)
                bar.update(sample.images - bar.n)
    if process.returncode != 0:
        raise RuntimeError(f"maskbeam label failed: {(scratch / 'stderr.txt').read_text(errors='replace')[-2000:]}")
    found: dict[str, list[str]] = {}
    for row in read_rows(output)[0]:
        found.setdefault(row["image_id"], []).append(row["status"])
    growth.missing = sorted(image_ids.keys() ^ found.keys())
    growth.twice = [image_id for image_id, statuses in found.items() if len(statuses) > 1]
    growth.wrong_status = [
        image_id
        for image_id, broken in image_ids.items()
        if image_id in found and (found[image_id][0] == "failed") != broken
    ]
    growth.strays = stray_files(output)
    return growth


def take_sample(pid: int, scratch: Path, wall: float) -> Sample | None:
    """None before the first image, and once the process has ended."""
    try:
        images = sum(path.stat().st_size for path in progress_files(scratch)) // 8
        statistics_line = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    if not images or "VmRSS:" not in status:
        return None
    cpu = (int(statistics_line[11]) + int(statistics_line[12])) / os.sysconf("SC_CLK_TCK")
    rss = int(status.partition("VmRSS:")[2].split()[0]) * 1024
    return Sample(images, wall, cpu, rss)


# Part two: kills.


@dataclass
class Kills:
    """What came of one series of kills. `early` were before a first new chunk was committed."""

    kills: int = 0
    early: int = 0
    starts: int = 0
    outlived: int = 0


def kill_and_go_on(folder: Path, kills: int, chance: random.Random) -> list[Check]:
    """Labels one data set undisturbed, and under two series of kills; compares the rows."""
    images = 20 * KILL_CHUNK + 4 * kills * KILL_CHUNK  # more chunks than are done between kills
    write_images(folder / "data", images)
    flags = [f"--chunk_size={KILL_CHUNK}"]
    undisturbed = folder / "undisturbed"
    run_to_end(folder / "data", undisturbed, folder / "scratch", *flags)
    expected, names = read_rows(undisturbed), output_files(undisturbed)
    checks = []
    for victim, modes in (("the process", ([], TWO_PROCESSES)), ("a worker process", (TWO_PROCESSES,))):
        output = folder / victim.replace(" ", "_")
        series = kill_series(folder, output, flags, modes, victim == "a worker process", kills, chance)
        run_to_end(folder / "data", output, folder / "scratch", *flags)
        rows = read_rows(output)
        differing = sum(a != b for table, other in zip(rows, expected, strict=True) for a, b in _pairs(table, other))
        strays = [*stray_files(output), *(output_files(output) ^ names)]
        ids = [row["image_id"] for row in rows[0]]
        checks += [
            Check(
                f"kill -9 of {victim}: kills",
                f"{series.kills} in {series.starts} starts, {series.early} before a new chunk",
                str(kills),
                series.kills == kills,
            ),
            Check(f"  rows that differ, of {sum(map(len, rows))}", str(differing), "0", differing == 0),
            Check("  images twice", str(len(ids) - len(set(ids))), "0", len(ids) == len(set(ids))),
            Check("  other files in the output", f"{len(strays)} {strays[:3] if strays else ''}", "0", not strays),
            Check("  workers that outlived the process", str(series.outlived), "0", series.outlived == 0),
        ]
    return checks


def _pairs(rows: list[Any], others: list[Any]) -> Iterator[tuple[Any, Any]]:
    for index in range(max(len(rows), len(others))):
        yield (rows[index] if index < len(rows) else None), (others[index] if index < len(others) else None)


def output_files(output: Path) -> set[str]:
    """Names of an output's files."""
    return {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}


def kill_series(
    folder: Path,
    output: Path,
    flags: list[str],
    modes: tuple[list[str], ...],
    of_worker: bool,
    kills: int,
    chance: random.Random,
) -> Kills:
    """Starts the command again and again, and kills it or a worker, until it was killed so often or got through."""
    series = Kills()
    images = output / "images"

    def committed() -> int:
        return len(list(images.glob("*.parquet")))

    with tqdm(total=kills, unit="kill", desc="kills of a worker" if of_worker else "kills of the process") as bar:
        while series.kills < kills:
            scratch = folder / f"{output.name}-{series.starts}"
            process = start(folder / "data", output, scratch, *flags, *modes[series.starts % len(modes)])
            series.starts += 1
            before = committed()
            # Any moment: while it starts, while its first chunk is in work, or a few chunks later.
            new_chunks = chance.choice((0, 0, 1, 2, 3))
            if new_chunks:
                wait_for(lambda: committed() >= before + new_chunks, process)  # noqa: B023
            elif of_worker:
                wait_for(lambda: bool(progress_files(scratch)), process)  # noqa: B023
            time.sleep(chance.uniform(0, 0.5 if new_chunks else 8))
            workers = [int(path.name) for path in progress_files(scratch) if int(path.name) != process.pid]
            if process.poll() is not None:  # it got through
                break
            victim = process.pid
            if of_worker:
                if not (living := [pid for pid in workers if is_alive(pid)]):
                    process.kill()
                    raise RuntimeError("no worker process is left to kill")
                victim = chance.choice(living)
            os.kill(victim, signal.SIGKILL)
            series.kills += 1
            series.early += committed() == before
            bar.update()
            process.wait(PATIENCE)
            series.outlived += not all_end([int(path.name) for path in progress_files(scratch)])
    return series


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Waits until something happened or the process ended."""
    deadline = time.monotonic() + PATIENCE
    while not happened() and process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"nothing happened for {PATIENCE:.0f} s")
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """False also for a process that is dead and not yet taken note of."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def all_end(pids: list[int], seconds: float = 30) -> bool:
    """Whether all these processes end by themselves; those that do not are ended."""
    deadline = time.monotonic() + seconds
    while living := [pid for pid in pids if is_alive(pid)]:
        if time.monotonic() > deadline:
            for pid in living:
                os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


# The plot.


def plot(samples: list[Sample]) -> Figure:
    """Resident memory, and images a second over stretches of 100 images, over the images done; both from zero."""
    rates, last = [], samples[0]
    for sample in samples:
        if sample.images - last.images >= 100:
            rates.append((sample.images, (sample.images - last.images) / (sample.wall - last.wall)))
            last = sample
    figure = Figure(figsize=(9, 6), layout="constrained")
    memory, speed = figure.subplots(2, 1, sharex=True)
    sizes = [(sample.images, sample.rss_bytes / 1e6) for sample in samples]
    for axes, points, name in ((memory, sizes, "resident memory, MB"), (speed, rates, "images a second")):
        axes.plot(*zip(*points, strict=True))
        axes.set(ylabel=name, ylim=(0, 1.1 * max(value for _, value in points)))
        axes.spines[["top", "right"]].set_visible(False)
    speed.set_xlabel("images")
    return figure


if __name__ == "__main__":
    sys.exit(main())
