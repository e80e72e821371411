"""What a run will take: images, files, bytes, hours and money, from the sizes of the shards and a sample of them.

Plain arithmetic, and estimates where the input does not tell: pipeline/commands/plan.py reads the sample and prints the
result.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from maskbeam.transforms.masks.amg import AmgConfig, layer_point_grids

# On disk, measured on the output of `maskbeam demo` and on chunks of 32 images (docs/scaling.md): a row of either
# table, and what a chunk's two files hold beside rows.
BYTES_PER_MASK = 200
BYTES_PER_IMAGE = 140
BYTES_PER_CHUNK = 24_000

# A worker's longest wait for the others is at most its longest shard. At a tenth of its share, that costs 10 %.
SHARDS_PER_WORKER = 10
# From these on a plan is worth a warning.
_SLOWEST_TO_MEAN = 1.25
_FULL_CHUNK = 0.5
_MAX_OUTPUT_FILES = 100_000
_MIN_CHUNKS_TO_JUDGE = 100


@dataclass(frozen=True)
class PlanConfig:
    """What the run will run on.

    Attributes:
      images_per_second: what one worker labels with a 32x32 grid and no crops, its start-up apart; other grids and
        crops are counted from there. Without it, no hours are planned.
      workers: workers that label at the same time.
      price_per_hour: of one worker, in any currency. Without it, no cost is planned.
      masks_per_image: mean number of masks of an image. SA-1B's 11 million images have 1.1 billion.
      startup_minutes: until a worker labels its first image: it boots, fetches its image, loads and compiles the model.
    """

    images_per_second: float | None = None
    workers: int = 1
    price_per_hour: float | None = None
    masks_per_image: float = 100.0
    startup_minutes: float = 5.0

    def __post_init__(self) -> None:
        if self.images_per_second is not None and not 0 < self.images_per_second < math.inf:
            raise ValueError(f"images_per_second is {self.images_per_second}; expected more than 0.")
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; expected at least 1.")
        for name in ("price_per_hour", "masks_per_image", "startup_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; expected 0 or more.")


@dataclass(frozen=True)
class Sample:
    """What was read of one shard.

    Attributes:
      image_bytes: bytes of the file that each image takes, compression and whatever lies between the images included.
        Empty where only the number of images is known.
      images: images found.
      num_bytes: bytes of the file that they take.
      whole: whether these are all images of the shard.
      error: why the shard breaks off; `label` makes a failed row of it, and it is counted in images.
    """

    images: int
    num_bytes: int
    whole: bool
    image_bytes: tuple[int, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Count:
    """Images of shards.

    Attributes:
      per_shard: estimated, except where the shard was sampled as a whole.
      exact: whether they all were.
      margin: two standard errors of the sum, in images; None where the sample says nothing of how sizes differ.
    """

    per_shard: tuple[float, ...]
    exact: bool
    margin: float | None


def count_images(sizes: Sequence[int], samples: Mapping[int, Sample]) -> Count:
    """Counts the images of shards by their bytes.

    The bytes that an image takes are those of all samples together (a ratio estimate, as of clusters). How far they may
    be off is told by how far the shards' own ratios differ or, where only one was sampled, those of its images:
    Cochran, Sampling Techniques, 3rd edition, chapter 6.

    Args:
      sizes: bytes of each shard.
      samples: by the shard's position in sizes. Broken shards say nothing of the others. Where all are broken, each of
        the others is taken for the one row that says so.

    >>> count_images([1000, 500, 250], {0: Sample(10, 1000, whole=True), 1: Sample(2, 200, whole=False)})
    Count(per_shard=(10, 5.0, 2.5), exact=False, margin=0.0)
    """
    intact = [sample for sample in samples.values() if sample.error is None and sample.images]
    images, num_bytes = sum(sample.images for sample in intact), sum(sample.num_bytes for sample in intact)
    whole = {position: sample for position, sample in samples.items() if sample.whole}
    per_shard = tuple(
        whole[position].images if position in whole else size * images / num_bytes if num_bytes else 1.0
        for position, size in enumerate(sizes)
    )
    if len(whole) == len(sizes):
        return Count(per_shard, exact=True, margin=0.0)
    clusters = [(sample.images, sample.num_bytes) for sample in intact]
    if len(clusters) == 1:
        clusters = [(1, size) for size in intact[0].image_bytes]
    if len(clusters) < 2:
        return Count(per_shard, exact=False, margin=None)
    rest = sum(count for position, count in enumerate(per_shard) if position not in whole)
    ratio = num_bytes / images
    squares = sum((cluster_bytes - ratio * cluster_images) ** 2 for cluster_images, cluster_bytes in clusters)
    error = math.sqrt(squares * len(clusters) / (len(clusters) - 1)) / num_bytes
    return Count(per_shard, exact=False, margin=2 * error * rest)


def work_per_image(config: AmgConfig) -> float:
    """How much longer an image takes than with a 32x32 grid and no crops, at most.

    Passes through the image encoder grow with the crops, passes through the mask decoder with the prompts. Which of the
    two takes longer depends on the model and the device, so the larger of both ratios is taken.

    >>> work_per_image(AmgConfig(crop_n_layers=1)), work_per_image(AmgConfig(points_per_side=16))
    (5.0, 1.0)
    """
    crops, prompts = count_work(config)
    standard_crops, standard_prompts = count_work(AmgConfig())
    return max(crops / standard_crops, prompts / standard_prompts)


def plural(count: int, noun: str) -> str:
    """A number of things.

    >>> plural(1, "shard"), plural(2000, "shard")
    ('1 shard', '2,000 shards')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def count_work(config: AmgConfig) -> tuple[int, int]:
    """Crops and prompts of an image: layer i has (2^i)^2 crops, each with the layer's grid.

    >>> count_work(AmgConfig(crop_n_layers=2, crop_n_points_downscale_factor=2))
    (21, 3072)
    """
    grids = layer_point_grids(config)
    return sum(4**layer for layer in range(len(grids))), sum(4**layer * len(grid) for layer, grid in enumerate(grids))


def schedule(durations: Sequence[float], workers: int) -> list[float]:
    """How long each worker is busy, if the longest jobs are given out first, each to whoever is free.

    Graham, Bounds on multiprocessing timing anomalies (1969): the slowest worker takes at most 4/3 of what the best
    schedule takes. Runners know no durations; in any order, it takes at most the mean and one longest job.

    >>> schedule([3, 3, 2, 2, 2], 2)
    [5.0, 7.0]
    """
    loads = [(0.0, worker) for worker in range(workers)]
    for duration in sorted(durations, reverse=True):
        load, worker = loads[0]
        heapq.heapreplace(loads, (load + duration, worker))
    return sorted(load for load, _ in loads)


@dataclass(frozen=True)
class ShardEstimate:
    """One shard, as one worker will read it.

    Attributes:
      name: for people.
      images: estimated.
      num_bytes: of its file or files.
    """

    name: str
    images: float
    num_bytes: int


@dataclass(frozen=True)
class Hours:
    """Wall time until the slowest worker ends: its start-up, then its labeling; mean is what the mean worker labels."""

    total: float
    startup: float
    mean: float
    slowest: float


@dataclass(frozen=True)
class Cost:
    """Of all workers until the slowest one ends, in the currency of price_per_hour; startup and waiting are parts."""

    total: float
    startup: float
    waiting: float


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
      images: estimated.
      chunks: each is an annotations and an images file.
      work: see work_per_image.
      hours: None without a rate.
      cost: None without a rate or a price.
      warnings: where the plan will hurt, and what to do.
    """

    shards: int
    images: int
    chunks: int
    output_files: int
    output_bytes: int
    work: float
    hours: Hours | None
    cost: Cost | None
    warnings: tuple[str, ...]


def make_plan(
    shards: Sequence[ShardEstimate], config: PlanConfig, amg: AmgConfig, chunk_size: int, chunk_bytes: int
) -> Plan:
    """The plan for shards.

    Args:
      chunk_size, chunk_bytes: a chunk closes at so many images, or at so many bytes of them.
    """
    work = work_per_image(amg)
    images = sum(shard.images for shard in shards)
    chunks = sum(_count_chunks(shard, chunk_size, chunk_bytes) for shard in shards)
    hours = _plan_hours(shards, config, work)
    return Plan(
        shards=len(shards),
        images=round(images),
        chunks=chunks,
        output_files=2 * chunks,
        output_bytes=round(
            images * (BYTES_PER_IMAGE + config.masks_per_image * BYTES_PER_MASK) + chunks * BYTES_PER_CHUNK
        ),
        work=work,
        hours=hours,
        cost=_plan_cost(hours, config),
        warnings=(
            *_warn_of_workers(shards, config.workers, images),
            *_warn_of_files(shards, chunks, images, chunk_size, chunk_bytes),
        ),
    )


def _plan_hours(shards: Sequence[ShardEstimate], config: PlanConfig, work: float) -> Hours | None:
    if config.images_per_second is None:
        return None
    hours_per_image = work / config.images_per_second / 3600
    loads = schedule([shard.images * hours_per_image for shard in shards], config.workers)
    startup = config.startup_minutes / 60
    return Hours(startup + loads[-1], startup, fmean(loads), loads[-1])


def _plan_cost(hours: Hours | None, config: PlanConfig) -> Cost | None:
    if hours is None or config.price_per_hour is None:
        return None
    price = config.workers * config.price_per_hour
    return Cost(price * hours.total, price * hours.startup, price * (hours.slowest - hours.mean))


def _count_chunks(shard: ShardEstimate, chunk_size: int, chunk_bytes: int) -> int:
    return max(1, math.ceil(shard.images / chunk_size), math.ceil(shard.num_bytes / chunk_bytes))


def _warn_of_workers(shards: Sequence[ShardEstimate], workers: int, images: float) -> list[str]:
    warnings = []
    if workers > len(shards):
        warnings.append(
            f"{workers} workers for {plural(len(shards), 'shard')}: a shard is read by one worker, so "
            f"{workers - len(shards)} will have nothing to do. Use fewer workers, or split the "
            f"input into {SHARDS_PER_WORKER * workers} shards."
        )
    loads = schedule([shard.images for shard in shards], min(workers, len(shards)))
    if loads[-1] > _SLOWEST_TO_MEAN * fmean(loads):
        largest = max(shards, key=lambda shard: shard.images)
        goal = math.ceil(images / workers / SHARDS_PER_WORKER)
        warnings.append(
            f"the slowest worker takes {loads[-1] / fmean(loads):.1f} times the mean, because shards are large or few: "
            f"{largest.name} alone has {largest.images:,.0f} of {images:,.0f} images, and one worker reads it. Split "
            f"shards to {goal:,} images or fewer."
        )
    return warnings


def _warn_of_files(
    shards: Sequence[ShardEstimate], chunks: int, images: float, chunk_size: int, chunk_bytes: int
) -> list[str]:
    warnings = []
    bytes_per_image = sum(shard.num_bytes for shard in shards) / max(images, 1)
    full = min(chunk_size, chunk_bytes / max(bytes_per_image, 1))
    tiny = chunks >= _MIN_CHUNKS_TO_JUDGE and images / chunks < _FULL_CHUNK * full
    if tiny:
        warnings.append(
            f"chunks have {images / chunks:.1f} images in the mean and could have {full:.0f}, because shards or "
            f"directories are tiny: {len(shards):,} of them make {2 * chunks:,} output files. Pack the images into "
            "shards of some hundreds."
        )
    if 2 * chunks > _MAX_OUTPUT_FILES:
        times = math.ceil(2 * chunks / _MAX_OUTPUT_FILES)
        remedy = f" --chunk_size {times * chunk_size} makes about {2 * chunks // times:,}."
        warnings.append(
            f"{2 * chunks:,} output files: listing them takes long, and so does reading {chunks:,} footers when a run "
            f"goes on.{'' if tiny or full < chunk_size else remedy}"
        )
    return warnings
