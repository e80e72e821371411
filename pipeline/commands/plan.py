"""maskbeam plan: what a run will take, from the list of shards and a bounded sample of them.

Image files are counted exactly. Of Parquet files the footers are read, of tar and TFRecord files the first images of a
few, and the rest is estimated from the bytes. No image is decoded, and no model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise

from maskbeam.pipeline.exits import EXIT_DONE, UsageError
from maskbeam.pipeline.options import parse_job
from maskbeam.pipeline.results import format_some, write_result
from maskbeam.transforms.chunks import CHUNK_BYTES
from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.estimate import (
    Count,
    Plan,
    PlanConfig,
    Sample,
    ShardEstimate,
    count_images,
    make_plan,
    plural,
    work_per_image,
)
from maskbeam.transforms.files.beam_files import FileSystems
from maskbeam.transforms.files.parquet_file import open_parquet
from maskbeam.transforms.files.paths import relative_path
from maskbeam.transforms.files.storage import read_json
from maskbeam.transforms.files.streams import open_file
from maskbeam.transforms.labels.layout import RUN_FILE, SUMMARY_FILE
from maskbeam.transforms.masks.amg import AmgConfig
from maskbeam.transforms.match_shards import InputConfig, Matched, match_shards
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.readers.tar import read_tar
from maskbeam.transforms.readers.tfrecord import tfrecord_records
from maskbeam.transforms.records import Shard, WorkerTime

# What is read at most: of each format so many shards, spread over the list, and of each of those so many images, or
# the images that begin in its first bytes. A Parquet file's footer counts its rows, so more of them are read.
_SHARDS_SAMPLED = {"tar": 16, "tfrecord": 16, "parquet": 256}
_IMAGES_SAMPLED = 64
_BYTES_SAMPLED = 16 * 2**20
_THREADS = 16  # most of the time is waiting, if the files are far away

_DESCRIPTION = (
    "Tells what a run will take: images, files, bytes, hours and money. Reads the list of shards and a small sample."
)
# Of the parameters of the masks, those that change how long an image takes.
_WORK = ("points_per_side", "point_grids", "crop_n_layers", "crop_n_points_downscale_factor")


@dataclass(frozen=True)
class PlanFlags(PlanConfig):
    """What the run will run on, and where the plan goes.

    Attributes:
      rate_from: directory of labels of the same kind, as `label --limit` makes of a few hundred of the images: what a
        worker took there gives images_per_second and startup_minutes.
      json: file for the whole plan, on any Beam file system; replaced if it exists.
    """

    rate_from: str | None = None
    json: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate_from is not None and self.images_per_second is not None:
            raise ValueError("give either --images_per_second or --rate_from, not both.")


@dataclass(frozen=True)
class PlanJob:
    """Everything `maskbeam plan` was asked to do."""

    input: InputConfig
    amg: AmgConfig
    plan: PlanFlags


@dataclass(frozen=True)
class FormatCount:
    """The input files of one format.

    Attributes:
      images: estimated, unless exact.
      exact: whether they were counted.
      margin: two standard errors of images; None = not known.
      sampled: files that were opened.
      broken: "path: what is wrong" of those among them that break off.
    """

    format: str
    files: int
    num_bytes: int
    images: int
    exact: bool
    margin: int | None
    sampled: int
    broken: tuple[str, ...]


def main(argv: list[str]) -> int:
    """Parses the flags and makes the plan."""
    return run_plan(parse_plan(argv))


def parse_plan(argv: list[str]) -> PlanJob:
    """Command line -> what to do. A limit would need all images read; of the masks, only what takes time is asked."""
    without = ("limit", *(field.name for field in fields(AmgConfig) if field.name not in _WORK))
    return parse_job("plan", PlanJob, argv, _DESCRIPTION, without)


def read_rate(labels: str) -> tuple[float, float]:
    """What a worker took for an earlier run.

    Returns:
      (images a second on a 32x32 grid without crops, minutes of start-up).

    Raises:
      UsageError: it is not known.
    """
    try:
        workers = WorkerTime.from_dict(read_json(FileSystems.join(labels, SUMMARY_FILE))["workers"])
        work = work_per_image(AmgConfig.from_dict(read_json(FileSystems.join(labels, RUN_FILE))["amg"]))
    except Exception as error:  # each file system has an error of its own, and each old version lacks something else
        raise UsageError(
            f"cannot read a rate from --rate_from {labels}: {describe_error(error)}. Give the directory of a finished "
            "run of `maskbeam label`, or --images_per_second."
        ) from error
    if workers.images_per_second is None:
        raise UsageError(
            f"the run in --rate_from {labels} labeled too few images for a rate. Label some hundreds, or give "
            "--images_per_second."
        )
    return workers.images_per_second * work, (workers.load_model + workers.compile) / workers.started / 60


def run_plan(job: PlanJob) -> int:
    """Makes the plan, prints it and writes it as JSON.

    Raises:
      UsageError: nothing matches the input, or the JSON file cannot be written.
    """
    try:
        matched = match_shards(job.input)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    config = job.plan
    if config.rate_from is not None:
        rate, startup_minutes = read_rate(config.rate_from)
        config = replace(config, images_per_second=rate, startup_minutes=startup_minutes, rate_from=None)
    counts, shards = count_input(matched)
    plan = make_plan(shards, config, job.amg, job.input.chunk_size, CHUNK_BYTES)
    warnings = (*_warn_of_input(matched, counts), *plan.warnings)
    print(format_plan(plan, counts, warnings, config))
    if job.plan.json is not None:
        content = {
            "job": asdict(job),
            "root": matched.root,
            "input": [asdict(count) for count in counts],
            "ignored_files": len(matched.ignored),
            **asdict(plan),
            "warnings": warnings,
        }
        write_result(job.plan.json, content)
    return EXIT_DONE


def count_input(matched: Matched) -> tuple[list[FormatCount], list[ShardEstimate]]:
    """Counts the images of all shards, by format and by shard."""
    counts, estimates = [], []
    for name in sorted({shard.format for shard in matched.shards}):
        shards = [shard for shard in matched.shards if shard.format == name]
        samples: dict[int, Sample] = {}
        if name == "image":
            count = Count(tuple(float(len(shard.files)) for shard in shards), exact=True, margin=0.0)
        else:
            samples = _sample_shards(shards, _SHARDS_SAMPLED[name])
            count = count_images([shard.num_bytes for shard in shards], samples)
        names = [relative_path(shard.path, matched.root) for shard in shards]
        counts.append(
            FormatCount(
                format=name,
                files=sum(len(shard.files) for shard in shards),
                num_bytes=sum(shard.num_bytes for shard in shards),
                images=round(sum(count.per_shard)),
                exact=count.exact,
                margin=None if count.margin is None else round(count.margin),
                sampled=len(samples),
                broken=tuple(f"{names[index]}: {sample.error}" for index, sample in samples.items() if sample.error),
            )
        )
        estimates += [
            ShardEstimate(shard_name, images, shard.num_bytes)
            for shard_name, images, shard in zip(names, count.per_shard, shards, strict=True)
        ]
    return counts, estimates


def _sample_shards(shards: Sequence[Shard], count: int) -> dict[int, Sample]:
    """Samples shards that are spread evenly over the list."""
    count = min(count, len(shards))
    positions = [index * len(shards) // count for index in range(count)]
    with ThreadPoolExecutor(_THREADS) as threads:
        samples = threads.map(sample_shard, (shards[position] for position in positions))
        return dict(zip(positions, samples, strict=True))


def sample_shard(shard: Shard) -> Sample:
    """Counts a Parquet file's rows, or measures the first images of another file. Raises nothing for broken ones."""
    (file,) = shard.files
    ends = [0]
    try:
        with open_file(file) as source:
            if not source.peek(1):
                raise ValueError("the file is empty (0 bytes)")
            if shard.format == "parquet":
                return Sample(open_parquet(source).metadata.num_rows, file.num_bytes, whole=True)
            images = tfrecord_records(source) if shard.format == "tfrecord" else read_tar(source, ReadConfig())
            for _ in images:
                ends.append(source.tell())  # in the file, so compression and what lies between images are included
                if len(ends) > _IMAGES_SAMPLED or ends[-1] >= _BYTES_SAMPLED:
                    return Sample(len(ends) - 1, ends[-1], False, tuple(end - start for start, end in pairwise(ends)))
    except Exception as error:  # parsers raise all sorts of things on broken bytes
        return Sample(len(ends), file.num_bytes, whole=True, error=describe_error(error))
    return Sample(len(ends) - 1, file.num_bytes, whole=True)


def _warn_of_input(matched: Matched, counts: Sequence[FormatCount]) -> list[str]:
    warnings = []
    if matched.ignored:
        warnings.append(
            f"files ignored, since their names tell no format: {len(matched.ignored):,} "
            f"({format_some(matched.ignored)}). If they hold images, say what they are with --input_format."
        )
    for count in counts:
        if count.broken:
            warnings.append(
                f"{len(count.broken)} of the {count.sampled} {count.format} files that were opened break off: "
                f"{'; '.join(count.broken[:3])}. Each makes a failed row."
            )
    return warnings


def format_plan(plan: Plan, counts: Sequence[FormatCount], warnings: Sequence[str], config: PlanConfig) -> str:
    """What the command prints."""
    approximate = "" if all(count.exact for count in counts) else "~"
    lines = [_line(f"{count.format} files", count.files, _describe_count(count)) for count in counts]
    lines += [
        _line("images", f"{approximate}{plan.images:,}", f"in {plural(plan.shards, 'shard')}, each read by one worker"),
        _line("work an image", f"{plan.work:.2f}", "1 = a 32x32 grid without crops, as --images_per_second is for"),
        _line("chunks", f"{approximate}{plan.chunks:,}", f"{approximate}{plural(plan.output_files, 'Parquet file')}"),
        _line("output", _bytes(plan.output_bytes), f"with {config.masks_per_image:g} masks per image"),
        *_format_hours(plan, config),
    ]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in warnings)])


def _format_hours(plan: Plan, config: PlanConfig) -> list[str]:
    if plan.hours is None:
        return ["hours and cost: give --rate_from (labels of some of the images) or --images_per_second, and --workers"]
    lines = [
        _line("hours", f"{plan.hours.total:.2f}", f"of {plural(config.workers, 'worker')}, if none fails"),
        _line("  start-up", f"{plan.hours.startup:.2f}"),
        _line("  labeling, mean worker", f"{plan.hours.mean:.2f}", f"at {config.images_per_second:.4g} images/s"),
        _line("  labeling, slowest worker", f"{plan.hours.slowest:.2f}", "if the largest shards are read first"),
    ]
    if plan.cost is None:
        return [*lines, "cost: give --price_per_hour"]
    return [
        *lines,
        _line("cost", f"{plan.cost.total:,.2f}"),
        _line("  start-up", f"{plan.cost.startup:,.2f}"),
        _line("  waiting for the slowest", f"{plan.cost.waiting:,.2f}"),
    ]


def _line(name: str, value: str | int, note: str = "") -> str:
    text = f"{value:,}" if isinstance(value, int) else value
    return f"{name:<26}{text:>16}  {note}".rstrip()


def _describe_count(count: FormatCount) -> str:
    text = f"{_bytes(count.num_bytes)}, {'' if count.exact else '~'}{count.images:,} images"
    if count.format == "image":
        return text
    of = f"{count.sampled:,} files" if count.sampled < count.files else "all"
    what = "footers" if count.format == "parquet" else f"first {_IMAGES_SAMPLED} images"
    if count.exact:
        return f"{text}, counted in {of}"
    off = f"+- {count.margin:,}" if count.margin is not None else "+- unknown"
    return f"{text} {off}, by the bytes and the {what} of {of}"


def _bytes(count: float) -> str:
    """Bytes with a unit of 1000.

    >>> _bytes(999), _bytes(21_300_000_000)
    ('999 B', '21.3 GB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit returns")
