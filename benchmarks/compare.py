"""Times maskbeam and SamAutomaticMaskGenerator (torch) on the same weights and photos, alternating in one run.

python -m benchmarks.compare [--model sam_tiny|vit_b|vit_h|PRESET] [--photos DIR|FILE ...] [--rounds 3] [--json FILE]
                             [--transformers]

Measured: one image at a time, from its pixels in memory to the list of COCO RLE masks, in wall seconds. For each photo
the reference and ours take turns; a ratio is that of a pair of neighbours, and the median of all pairs is reported.
--transformers adds Hugging Face's pipeline as a third side, whose ratio is that of its run and of ours before it. What
it does differently is in benchmarks/transformers_side.py; its masks are compared with the reference's, not judged.
Stages: the reference's by wrapping its functions; ours as the product reports them, except that each embedding is
waited for, so that a backend that works ahead (JAX) does not book the image encoder under predict_masks.

Left out: reading and decoding the photo; loading and the first call, which compiles, both printed apart (for vit_b and
vit_h loading is only what it takes to hand the weights over); and where a stand-in takes torchvision's place, the time
that the torch sides spend in the stand-in's NMS.

Models. A preset (the embedded sam_tiny, or anything KerasHub knows) runs with its real output on both sides. vit_b and
vit_h are SAM's architectures with random weights, whose masks are noise that no filter sees in practice. There the
networks do all their work, and then the same synthetic, SAM-like answers take the place of their outputs: masks of
log-uniform size, and predicted IoUs such that 60 % of the prompts have a candidate above --pred_iou_thresh (the share
is printed). Handing them out is left out of the torch sides' time and left in ours.

Peak memory is that of a fresh process for each side that labels the largest photo once, with the same settings.
--in_flight N adds ours with N copies of each photo through label_chunk: decoding, device and masks overlap as in the
pipeline. With a GPU, torch and Keras both use it; the torch sides stay float32 whatever --dtype is.

Without torch, --no_reference times ours alone. Needs the bench extra otherwise.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.machine import (
    OtherProcesses,
    describe_machine,
    device_peak_bytes,
    peak_rss_bytes,
    print_machine,
    reset_peak_rss,
    rss_bytes,
    set_environment,
)
from benchmarks.photos import REPOSITORY, SHIPPED_PHOTOS, find_photos
from benchmarks.sides import SIDES, Ours, Reference, Run, load_sides
from maskbeam.transforms.evaluation.agreement import MATCH_IOU, compare_masks
from maskbeam.transforms.images import ImageConfig, decode_image
from maskbeam.transforms.masks.amg import AmgConfig
from maskbeam.transforms.records import Mask

if TYPE_CHECKING:  # torch, for the reference alone
    from benchmarks.parity import Comparison
    from benchmarks.transformers_side import HuggingFace

BUSY_NEIGHBOURS = 0.05  # of the machine's CPU time used by other processes: more spoils the ratio


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison and prints it; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    set_environment()
    config = make_config(args)
    if args.memory_of:
        print(json.dumps(measure_memory(args, config)))
        return 0

    machine = describe_machine()
    print_machine(machine)
    print(f"model {args.model}, dtype {args.dtype}, {settings_line(config)}, {args.rounds} rounds")
    asked = {"reference": not args.no_reference, "ours": True, "transformers": args.transformers}
    reference, ours, hugging_face = load_sides(args.model, args.dtype, config, [side for side in SIDES if asked[side]])
    assert ours is not None  # it is always asked for here
    sides = [side for side in (reference, ours, hugging_face) if side is not None]
    if reference is not None:
        print(f"reference: torch, float32, on {reference.device}")
    if reference is not None and hugging_face is not None:
        print(transformers_line(reference, hugging_face))
    warm_ups = [warm_up(side) for side in sides]
    for warm in warm_ups:
        line = f"{warm.side}: load {warm.load:.1f} s, first call {warm.first:.1f} s, the same again {warm.second:.1f} s"
        print(line + (f": compiled in {warm.first - warm.second:.1f} s" if warm.side == "ours" else ""), flush=True)

    others = OtherProcesses()
    photos = [compare_photo(path, args, config, reference, ours, hugging_face) for path in find_photos(args.photos)]
    summary = {**summarize(photos, args.rounds), "cpu_of_others": others.share()}
    print_summary(summary)
    if reference is not None:
        print_torchvision(reference, photos)
        print_contract(photos, args.dtype)
    memory = [] if args.no_memory else [run_memory_of(side.name, argv) for side in sides]
    print_memory(memory)
    if args.json:
        report = {
            "machine": machine,
            "arguments": vars(args),
            "config": asdict(config),
            "warm_up": [asdict(warm) for warm in warm_ups],
            "photos": [photo.to_dict() for photo in photos],
            "summary": summary,
            "memory": memory,
        }
        Path(args.json).write_text(json.dumps(report, indent=2, default=str) + "\n")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Times maskbeam and torch's SamAutomaticMaskGenerator on the same weights and photos.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="sam_tiny", help="sam_tiny, vit_b, vit_h (random weights), or a preset")
    parser.add_argument("--photos", nargs="+", type=Path, default=[SHIPPED_PHOTOS], help="files and directories")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs a photo (default: 3)")
    parser.add_argument("--points_per_side", type=int, default=32)
    parser.add_argument("--points_per_batch", type=int, default=64)
    parser.add_argument("--pred_iou_thresh", type=float, default=AmgConfig.pred_iou_thresh)
    parser.add_argument("--stability_score_thresh", type=float, default=AmgConfig.stability_score_thresh)
    parser.add_argument("--dtype", default="float32", help="of our matrix products; the reference stays float32")
    parser.add_argument("--in_flight", type=int, default=0, help="also time ours with so many images in flight")
    parser.add_argument("--no_reference", action="store_true", help="ours alone; needs no torch")
    parser.add_argument("--no_memory", action="store_true", help="without the processes that measure memory")
    parser.add_argument("--transformers", action="store_true", help="also time Hugging Face's mask-generation pipeline")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--memory_of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.transformers and args.no_reference:
        parser.error("--transformers is held against the reference, on its weights: leave out --no_reference")
    if args.transformers and importlib.util.find_spec("transformers") is None:
        parser.error("--transformers needs a package that is not installed: pip install -e '.[bench]'")
    missing = [str(path) for path in args.photos if not path.exists()]
    if missing:
        parser.error(f"--photos: there is no {', '.join(missing)}")
    if not find_photos(args.photos):
        parser.error(f"no image files in {', '.join(map(str, args.photos))}")
    return args


def make_config(args: argparse.Namespace) -> AmgConfig:
    """The parameters of both sides."""
    names = ("points_per_side", "points_per_batch", "pred_iou_thresh", "stability_score_thresh")
    return AmgConfig(**{name: getattr(args, name) for name in names})


def settings_line(config: AmgConfig) -> str:
    """The parameters that matter for speed."""
    return (
        f"{config.points_per_side}x{config.points_per_side} points in batches of {config.points_per_batch}, "
        f"pred_iou_thresh {config.pred_iou_thresh}, stability_score_thresh {config.stability_score_thresh}"
    )


@dataclass(frozen=True)
class WarmUp:
    """Seconds until a side is ready: loading, and two calls with a single prompt."""

    side: str
    load: float
    first: float
    second: float


def warm_up(side: Reference | Ours | HuggingFace) -> WarmUp:
    """Labels a small image with one prompt, twice, keeping whatever mask comes: every program of ours is compiled."""
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    config = replace(side.config, points_per_side=1, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    first, second = (side.run(pixels, None, config).seconds for _ in range(2))
    return WarmUp(side.name, side.load, first, second)


@dataclass
class PhotoRuns:
    """All that was measured on one photo."""

    name: str
    size_hw: tuple[int, int]
    surviving_prompts: float | None
    runs: dict[str, list[Run]] = field(default_factory=lambda: {side: [] for side in SIDES})
    in_flight_seconds: float | None = None
    comparison: Comparison | None = None
    transformers: TransformersAgreement | None = None

    def ratios(self, side: str = "reference") -> list[float]:
        """Of the pairs of a run of that side and of ours; none without the side."""
        pairs = zip(self.runs[side], self.runs["ours"], strict=False)
        return [other.seconds / ours.seconds for other, ours in pairs]

    def agreement(self) -> tuple[int, int, int, bool]:
        """Masks of the reference, of ours, RLE strings on both sides, and whether the same masks are in the same order.

        A mask is known by its prompt and predicted IoU, so that a pixel within rounding does not make it another one.
        """
        reference, ours = self.runs["reference"][0].masks, self.runs["ours"][0].masks
        identical = count_identical(reference, ours)
        same_order = len(reference) == len(ours) and all(
            one.prompt == other.prompt and abs(one.predicted_iou - other.predicted_iou) <= 1e-5
            for one, other in zip(reference, ours, strict=True)
        )
        return len(reference), len(ours), identical, same_order

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the masks."""
        runs = {
            side: [
                {"seconds": r.seconds, "stages": r.stages, "excluded": r.excluded, "masks": len(r.masks)} for r in runs
            ]
            for side, runs in self.runs.items()
        }
        return {
            "name": self.name,
            "size_hw": self.size_hw,
            "surviving_prompts": self.surviving_prompts,
            "runs": runs,
            "ratios": self.ratios(),
            "transformers_ratios": self.ratios("transformers"),
            "in_flight_seconds": self.in_flight_seconds,
            "agreement": self.agreement() if self.runs["reference"] else None,
            "contract": asdict(self.comparison) if self.comparison else None,
            "transformers": asdict(self.transformers) if self.transformers else None,
        }


def count_identical(some: Sequence[Mask], others: Sequence[Mask]) -> int:
    """RLE strings that are on both sides."""
    return (Counter(mask.counts for mask in some) & Counter(mask.counts for mask in others)).total()


@dataclass(frozen=True)
class TransformersAgreement:
    """Hugging Face's masks of a photo held against the reference's.

    Attributes:
      masks: of Hugging Face.
      identical: RLE strings on both sides.
      matched: pairs of masks with a mask IoU of at least MATCH_IOU.
      mean_matched_iou: of these pairs; None without one.
    """

    masks: int
    identical: int
    matched: int
    mean_matched_iou: float | None


def compare_photo(
    path: Path,
    args: argparse.Namespace,
    config: AmgConfig,
    reference: Reference | None,
    ours: Ours,
    hugging_face: HuggingFace | None,
) -> PhotoRuns:
    """Times all rounds on one photo, in turns, and prints a line for each."""
    pixels = decode_image(path.read_bytes(), ImageConfig()).pixels
    size_hw = pixels.shape[0], pixels.shape[1]
    answers = ours.answers(size_hw)
    photo = PhotoRuns(path.name, size_hw, answers.surviving_prompts if answers else None)
    print(f"\n{path.name}, {size_hw[1]}x{size_hw[0]}")
    if answers is not None:
        answers.store()
        percent = 100 * answers.surviving_prompts
        print(f"  {percent:.1f} % of the prompts have a candidate above {config.pred_iou_thresh}")
    for index in range(args.rounds):
        line = []
        for side in (reference, ours, hugging_face):
            if side is not None:
                photo.runs[side.name].append(side.run(pixels, answers))
                line.append(f"{side.name} {photo.runs[side.name][-1].seconds:.3f} s")
        if reference is not None:
            line.append(f"ratio {photo.ratios()[-1]:.2f}")
        if hugging_face is not None:
            line.append(f"of transformers {photo.ratios('transformers')[-1]:.2f}")
        print(f"  round {index + 1}: {', '.join(line)}", flush=True)
    if args.in_flight:
        photo.in_flight_seconds = ours.run_in_flight(path.read_bytes(), args.in_flight, answers)
        print(f"  ours, {args.in_flight} copies in flight: {photo.in_flight_seconds:.3f} s an image, decoding included")
    if reference is not None:
        if args.dtype == "float32":
            first = photo.runs["reference"][0], photo.runs["ours"][0]
            photo.comparison = reference.judge(*first, pixels, answers)
        print_agreement(photo)
    if reference is not None and hugging_face is not None:
        expected, actual = photo.runs["reference"][0].masks, photo.runs["transformers"][0].masks
        agreement = compare_masks(expected, actual)
        photo.transformers = TransformersAgreement(
            len(actual), count_identical(expected, actual), agreement.matched, agreement.mean_matched_iou
        )
        print_transformers_agreement(photo.transformers, len(expected))
    return photo


def print_agreement(photo: PhotoRuns) -> None:
    """How far the two sides' masks, and networks, agree."""
    reference, ours, identical, same_order = photo.agreement()
    print(
        f"  masks: reference {reference}, ours {ours}, identical RLE strings {identical}, "
        f"{'the same masks in the same order' if same_order else 'the lists differ'}"
    )
    nets = [photo.runs[side][0].network_iou for side in ("reference", "ours")]
    if nets[0] is not None and nets[1] is not None:
        difference = float(np.abs(nets[0] - nets[1]).max())
        print(f"  networks: predicted IoU, before it is replaced, differs by at most {difference:.1e}")
    comparison = photo.comparison
    if comparison is not None and (comparison.violations or not same_order or identical < reference):
        from benchmarks.parity import print_comparison

        print_comparison(f"  {photo.name}", comparison)


def print_transformers_agreement(agreement: TransformersAgreement, expected: int) -> None:
    """A line."""
    mean = "" if agreement.mean_matched_iou is None else f", their mean IoU {agreement.mean_matched_iou:.5f}"
    print(
        f"  transformers: masks {agreement.masks}, identical RLE strings {agreement.identical}, of the reference's "
        f"{expected} matched at IoU >= {MATCH_IOU}: {agreement.matched}{mean}"
    )


def print_contract(photos: list[PhotoRuns], dtype: str) -> None:
    """The verdict over all photos."""
    if dtype != "float32":
        print(f"the contract is one of float32: it is not asked of {dtype}")
        return
    from benchmarks.parity import contract_holds

    contract_holds([photo.comparison for photo in photos if photo.comparison])


def print_torchvision(reference: Reference, photos: list[PhotoRuns]) -> None:
    """Whether torchvision is the real one, and what the stand-in's NMS took."""
    if reference.torchvision_is_real:
        version = importlib.metadata.version("torchvision")
        print(f"torchvision {version}: its NMS is part of the time of the sides that use it")
        return
    for side in ("reference", "transformers"):
        seconds = [run.excluded["stand-in NMS"] for photo in photos for run in photo.runs[side]]
        if seconds:
            took = f"{_mean(seconds):.3f} s an image, left out of the time of {side}"
            print(f"torchvision is a stand-in: its NMS took {took}")


def summarize(photos: list[PhotoRuns], rounds: int) -> dict[str, Any]:
    """Over all photos: seconds an image are means over photos of medians over rounds; stages are means."""
    sides = [side for side in SIDES if photos[0].runs[side]]
    summary: dict[str, Any] = {"photos": len(photos), "rounds": rounds}
    for side in sides:
        runs = [run for photo in photos for run in photo.runs[side]]
        seconds = _mean(statistics.median(run.seconds for run in photo.runs[side]) for photo in photos)
        stages = {stage: _mean(run.stages.get(stage, 0.0) for run in runs) for stage in runs[0].stages}
        excluded = {cause: _mean(run.excluded.get(cause, 0.0) for run in runs) for cause in runs[0].excluded}
        summary[side] = {"seconds": seconds, "stages": stages, "excluded": excluded}
    for name, side in (("ratio", "reference"), ("transformers_ratio", "transformers")):
        ratios = [ratio for photo in photos for ratio in photo.ratios(side)]
        if ratios:
            summary[name] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    in_flight = [photo.in_flight_seconds for photo in photos if photo.in_flight_seconds is not None]
    if in_flight:
        summary["in_flight_seconds"] = _mean(in_flight)
    return summary


def print_summary(summary: dict[str, Any]) -> None:
    """The table."""
    print(f"\n{summary['photos']} photos, {summary['rounds']} rounds each")
    for side in SIDES:
        if side not in summary:
            continue
        measured = summary[side]
        print(f"{side + ', seconds an image':34}{measured['seconds']:10.3f}")
        for stage, seconds in measured["stages"].items():
            print(f"  {stage:32}{seconds:10.3f}")
        for cause, seconds in measured["excluded"].items():
            print(f"  {f'left out: {cause}':32}{seconds:10.3f}")
    for name, label in (
        ("ratio", "ratio, median of the pairs"),
        ("transformers_ratio", "ratio of transformers to ours"),
    ):
        if name in summary:
            ratio = summary[name]
            print(f"{label:34}{ratio['median']:10.2f}   ({ratio['min']:.2f} to {ratio['max']:.2f})")
    share = summary["cpu_of_others"]
    warning = ": TOO MUCH, the ratio means nothing" if share > BUSY_NEIGHBOURS else ""
    print(f"{'CPU time of other processes':34}{100 * share:10.1f} %{warning}")
    if "in_flight_seconds" in summary:
        print(f"{'ours, images in flight':34}{summary['in_flight_seconds']:10.3f}   s an image")


def _mean(values: Any) -> float:
    return statistics.fmean(list(values))


def measure_memory(args: argparse.Namespace, config: AmgConfig) -> dict[str, Any]:
    """In a process of its own: labels the largest photo once with one side and returns bytes.

    Synthetic answers are drawn when asked, batch by batch, so that they take no memory beside a network's output.
    """
    paths = find_photos(args.photos)
    pixels = max((decode_image(path.read_bytes(), ImageConfig()).pixels for path in paths), key=np.size)
    (side,) = (side for side in load_sides(args.model, args.dtype, config, [args.memory_of]) if side is not None)
    warm_up(side)
    before = peak_rss_bytes()
    reset = reset_peak_rss()
    ready = rss_bytes()
    side.run(pixels, side.answers(pixels.shape[:2]))
    return {
        "side": side.name,
        "size_hw": pixels.shape[:2],
        "ready_bytes": ready,
        "peak_bytes": peak_rss_bytes(),
        "load_and_compile_peak_bytes": before if reset else None,
        "device_peak_bytes": device_peak_bytes(side.name),
    }


def run_memory_of(side: str, argv: list[str]) -> dict[str, Any]:
    """measure_memory in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", *argv, "--memory_of", side],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def print_memory(memory: list[dict[str, Any]]) -> None:
    """A line for each side."""
    for side in memory:
        height, width = side["size_hw"]
        line = (
            f"{side['side']}, peak memory on {width}x{height}: {_mib(side['peak_bytes'])}, of which the ready process "
            f"had {_mib(side['ready_bytes'])} and the image took {_mib(side['peak_bytes'] - side['ready_bytes'])}"
        )
        if side["device_peak_bytes"] is not None:
            line += f"; on the device {_mib(side['device_peak_bytes'])}"
        print(line)
    if any(side["side"] == "reference" for side in memory):
        print("(a ready process with torch also holds Keras, which reads the weights: compare what the image took)")


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


def transformers_line(reference: Reference, hugging_face: HuggingFace) -> str:
    """That both networks are the same."""
    from benchmarks.transformers_side import check_network

    difference = check_network(reference.sam, hugging_face.model)
    return (
        f"transformers: its pipeline, float32, on {hugging_face.device}; on one frame its network's output differs "
        f"from the reference's by at most {difference:.1e} of the largest value"
    )


if __name__ == "__main__":
    sys.exit(main())
