"""maskbeam view: which images of which labels are shown, as an HTML report or as plain pictures."""

from __future__ import annotations

import hashlib
import heapq
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from maskbeam.pipeline.exits import EXIT_DONE, EXIT_FAILED, UsageError
from maskbeam.pipeline.options import parse_job
from maskbeam.pipeline.progress import progress_bar
from maskbeam.pipeline.report.writer import (
    ShownImage,
    begin_report,
    delete_report,
    grey_canvas,
    holds_report,
    write_images,
    write_page,
)
from maskbeam.pipeline.results import describe_model
from maskbeam.transforms.draw import draw_masks
from maskbeam.transforms.evaluation.statistics import Statistics
from maskbeam.transforms.files.paths import absolute
from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.labels.layout import shard_name
from maskbeam.transforms.labels.run_file import Run, read_run
from maskbeam.transforms.labels.schema import row_to_mask
from maskbeam.transforms.labels.tables import ChunkTables, list_chunks, read_chunk, read_image_ids
from maskbeam.transforms.match_shards import InputConfig, check_output
from maskbeam.transforms.photos import PhotoMissing, Photos, open_photo

_MAX_FAILURES = 10_000  # in the report's list; the number told is that of all

_DESCRIPTION = (
    "Makes an HTML report of labels: photos with their masks drawn over them, scores, statistics and failed images. "
    "Open index.html in a browser; it needs no server and no network."
)


@dataclass(frozen=True)
class LabelsConfig:
    """Which labels are shown, and where their photos are.

    Attributes:
      labels: directory of labels, as `label`, `refine` or `import` writes it, on any Beam file system.
      images: files, directories and globs of the photos, like `label --input`, if they are not where they were
        labeled. A photo is found by its image_id, as the path relative to the directory that all of these lie in. Loose
        files are found by their file name, too, or, under whatever name, by their sha256.
    """

    labels: str
    images: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SampleConfig:
    """Which images are shown. The statistics and the failed images are always those of all.

    Attributes:
      sample: how many images to draw by the seed; all of them if there are fewer.
      seed: another one draws other images. A larger sample with the same seed adds to the smaller one.
      image_id: show these images instead of a sample.
    """

    sample: int = 1000
    seed: int = 0
    image_id: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.sample < 1:
            raise ValueError(f"sample is {self.sample}; expected at least 1 image.")


@dataclass(frozen=True)
class ReportConfig:
    """What is made.

    Attributes:
      output: local directory of the report. An earlier report in it is replaced.
      photo_side: longest side of the photos in the report, in pixels; the report grows with its square.
      png: write one PNG an image, the photo at its full size with the masks drawn over it, instead of the report.
    """

    output: str
    photo_side: int = 1280
    png: bool = False

    def __post_init__(self) -> None:
        if not self.output or "://" in self.output:
            raise ValueError(f"output is {self.output!r}; expected a local directory, for a browser to open.")
        if self.photo_side < 1:
            raise ValueError(f"photo_side is {self.photo_side}; expected at least 1 pixel.")


@dataclass(frozen=True)
class ViewJob:
    """Everything `maskbeam view` was asked to do."""

    labels: LabelsConfig
    sample: SampleConfig
    report: ReportConfig


def main(argv: list[str]) -> int:
    """Parses the flags and makes the report."""
    return run_view(parse_view(argv))


def parse_view(argv: list[str]) -> ViewJob:
    """Command line -> what to do."""
    return parse_job("view", ViewJob, argv, _DESCRIPTION)


def run_view(job: ViewJob) -> int:
    """Makes the report or the pictures, and says where they are.

    Raises:
      UsageError: the labels, the photos or the output are not as expected.
    """
    try:
        run = read_run(job.labels.labels)
        listed = list_chunks(job.labels.labels)
        photos = _find_photos(job.labels, job.report.output, run)
        ids, num_images = _choose(job.sample, read_image_ids(job.labels.labels, listed))
        output = _prepare_output(job.report)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    chunks = _with_progress((read_chunk(job.labels.labels, chunk) for chunk in listed), num_images)
    try:
        if job.report.png:
            return _write_pictures(chunks, ids, photos, run.image_config, output)
        return _write_report(job, chunks, ids, photos, run, output)
    except (ValueError, OSError) as error:  # the labels are damaged, or the output cannot be written
        print(f"maskbeam: {error}", file=sys.stderr)
        return EXIT_FAILED


def _find_photos(config: LabelsConfig, output: str, run: Run) -> Photos:
    if config.images is not None:
        check_output(InputConfig(config.images), output)
    return Photos(run.root or "/", config.images, run.input_format, run.read_config)


def _choose(config: SampleConfig, image_ids: Iterator[str]) -> tuple[set[str], int]:
    """The ids of the images to show, and the number of all.

    Each image gets a number by its id and the seed, and those with the lowest numbers are drawn, in constant memory.
    """
    num_images = 0

    def counted() -> Iterator[str]:
        nonlocal num_images
        for image_id in image_ids:
            num_images += 1
            yield image_id

    if config.image_id is None:
        ids = set(heapq.nsmallest(config.sample, counted(), key=lambda image_id: _number(config.seed, image_id)))
        return ids, num_images
    wanted = set(config.image_id)
    ids = {image_id for image_id in counted() if image_id in wanted}
    if unknown := [image_id for image_id in config.image_id if image_id not in ids]:
        raise ValueError(
            f"no image in the labels has the id {unknown[0]!r}. Expected ids as in the column image_id of the images "
            "table: paths relative to the input's root, in shards <shard>#<row>."
        )
    return ids, num_images


def _number(seed: int, image_id: str) -> bytes:
    return hashlib.sha256(f"{seed} {image_id}".encode()).digest()


def _prepare_output(config: ReportConfig) -> Path:
    """The directory, without an earlier report.

    Raises:
      ValueError: it holds something else.
    """
    output = Path(absolute(config.output))
    if config.png and holds_report(output):
        raise ValueError(f"the output {config.output!r} holds a report. Choose another directory for the pictures.")
    if config.png:
        output.mkdir(parents=True, exist_ok=True)
        return output
    if holds_report(output):
        delete_report(output)
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"the output {config.output!r} holds something that is no report. Choose a new directory.")
    begin_report(output)
    return output


def _with_progress(chunks: Iterator[ChunkTables], num_images: int) -> Iterator[ChunkTables]:
    """The chunks, with a progress bar of their images if somebody is there to see it."""
    with progress_bar(total=num_images, unit="image") as bar:
        for chunk in chunks:
            yield chunk
            bar.update(chunk.images.num_rows)


def _write_pictures(
    chunks: Iterator[ChunkTables], ids: Collection[str], photos: Photos, config: ImageConfig, output: Path
) -> int:
    """One PNG an image that was decoded, named by its id."""
    written = 0
    for row, masks in (pair for chunk in chunks for pair in chunk.rows()):
        if row["image_id"] not in ids:
            continue
        shown = ShownImage(row, masks, photos.read(row))
        if shown.size_hw is None:
            _tell(f"no picture of {shown.image_id}: {row['error_stage']}: {row['error']}")
            continue
        try:
            pixels = open_photo(shown.photo, row["sha256"], shown.size_hw, config)
        except PhotoMissing as error:
            _tell(f"{shown.image_id}: {error} Its masks are drawn on grey.")
            pixels = grey_canvas(shown.size_hw)
        picture = draw_masks(pixels, [row_to_mask(mask) for mask in masks])
        # Unique, and safe whatever the id is: the name is percent-encoded.
        Image.fromarray(picture).save(output / f"{shard_name(shown.image_id)}.png")
        written += 1
    print(f"{written} pictures: {output}")
    return EXIT_DONE


def _tell(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _write_report(
    job: ViewJob,
    chunks: Iterator[ChunkTables],
    ids: Collection[str],
    photos: Photos,
    run: Run,
    output: Path,
) -> int:
    statistics = Statistics()
    failures: list[dict[str, Any]] = []

    def shown_images() -> Iterator[ShownImage]:
        for row, masks in (pair for chunk in chunks for pair in chunk.rows()):
            statistics.add_image(row, masks)
            if row["status"] == "failed" and len(failures) < _MAX_FAILURES:
                failures.append({name: row[name] for name in ("image_id", "error_stage", "error")})
            if row["image_id"] in ids:
                yield ShownImage(row, masks, photos.read(row))

    lines = write_images(shown_images(), job.report.photo_side, run.image_config, output)
    index: dict[str, Any] = {
        "labels": job.labels.labels,
        "run": {name: getattr(run, name) for name in ("model", "model_fingerprint", "dtype", "backend", "root")},
        "amg": run.amg,
        "statistics": statistics.to_dict(),
        "failures": failures,
        "images": lines,
    }
    write_page(index, output)
    print(f"model: {describe_model(run)}")
    print(f"report of {len(lines)} of {statistics.statuses.total()} images: {output / 'index.html'}")
    if missing := sum(line["problem"] for line in lines):
        print(
            f"{missing} of its photos were not found or are not those that were labeled: their masks are on grey, and "
            "their pages say why. Say where the photos are with --images."
        )
    return EXIT_DONE
