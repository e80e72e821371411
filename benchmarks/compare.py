"""Times maskbeam and SamAutomaticMaskGenerator (torch) on the same weights and photos, alternating in one run.

python -m benchmarks.compare [--model sam_tiny|vit_b|vit_h|PRESET] [--photos DIR|FILE ...] [--rounds 3] [--json FILE]

Measured: one image at a time, from its pixels in memory to the list of COCO RLE masks, in wall seconds. For each photo
the reference and ours take turns; a ratio is that of a pair of neighbours, and the median of all pairs is reported.
Stages: the reference's by wrapping its functions; ours as the product reports them, except that each embedding is
waited for, so that a backend that works ahead (JAX) does not book the image encoder under predict_masks.

Left out: reading and decoding the photo; loading and the first call, which compiles, both printed apart (for vit_b and
vit_h loading is only what it takes to hand the weights over); and where a stand-in takes torchvision's place, the time
that the reference spends in the stand-in's NMS.

Models. A preset (the embedded sam_tiny, or anything KerasHub knows) runs with its real output on both sides. vit_b and
vit_h are SAM's architectures with random weights, whose masks are noise that no filter sees in practice. There both
networks do all their work, and then the same synthetic, SAM-like answers take the place of both outputs: masks of
log-uniform size, and predicted IoUs such that 60 % of the prompts have a candidate above --pred_iou_thresh (the share
is printed). Handing them out is left out of the reference's time and left in ours.

Peak memory is that of a fresh process for each side that labels the largest photo once, with the same settings.
--in_flight N adds ours with N copies of each photo through label_chunk: decoding, device and masks overlap as in the
pipeline. With a GPU, torch and Keras both use it; the reference stays float32 whatever --dtype is.

Without torch, --no_reference times ours alone. Needs the bench extra otherwise.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from PIL import Image

from transforms.amg import MASKS_PER_POINT, AmgConfig, Sam, Scored, label_image, layer_point_grids
from transforms.embedded import resolve_preset
from transforms.frame import resized_hw
from transforms.images import IMAGE_EXTENSIONS, ImageConfig, decode_image
from transforms.records import Chunk, EncodedImage, Mask, Shard
from transforms.threads import host_threads

if TYPE_CHECKING:  # torch, for the reference alone
    from benchmarks.parity import Comparison, Decoded

REPOSITORY = Path(__file__).parent.parent
SHIPPED_PHOTOS = REPOSITORY / "pipeline" / "photos"

# The embedded model's predicted IoU is low (its model card); these keep some dozens of masks an image.
TINY_THRESHOLDS: dict[str, Any] = {"pred_iou_thresh": 0.19, "stability_score_thresh": 0.65}

# SAM's image encoders (segment_anything/build_sam.py, commit dca509f); what they share is in random_backbone.
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "vit_b": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "global_attention_layer_indices": [2, 5, 8, 11]},
    "vit_h": {
        "hidden_size": 1280,
        "num_layers": 32,
        "num_heads": 16,
        "global_attention_layer_indices": [7, 15, 23, 31],
    },
}

SURVIVING_PROMPTS = 0.6  # of the synthetic answers: prompts with a candidate above pred_iou_thresh
SIDES = ("reference", "ours")
BUSY_NEIGHBOURS = 0.05  # of the machine's CPU time used by other processes: more spoils the ratio

_VERSIONED = ("keras", "keras-hub", "tensorflow", "jax", "torch", "torchvision", "segment-anything-py", "numpy")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "XLA_FLAGS")


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
    reference, ours = load_sides(args, config, SIDES[1:] if args.no_reference else SIDES)
    assert ours is not None  # it is always asked for here
    sides: list[Reference | Ours] = [ours] if reference is None else [reference, ours]
    if reference is not None:
        print(f"reference: torch, float32, on {reference.device}")
    warm_ups = [warm_up(side) for side in sides]
    for warm in warm_ups:
        line = f"{warm.side}: load {warm.load:.1f} s, first call {warm.first:.1f} s, the same again {warm.second:.1f} s"
        print(line + (f": compiled in {warm.first - warm.second:.1f} s" if warm.side == "ours" else ""), flush=True)
    if args.transformers:
        print(transformers_line())

    others = OtherProcesses()
    photos = [compare_photo(path, args, config, reference, ours) for path in find_photos(args.photos)]
    summary = {**summarize(photos, args.rounds), "cpu_of_others": others.share()}
    print_summary(summary)
    if reference is not None:
        print(reference.torchvision_line(photos))
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
    parser.add_argument("--pred_iou_thresh", type=float, help="default: 0.19 for sam_tiny, else the reference's")
    parser.add_argument("--stability_score_thresh", type=float, help="default: 0.65 for sam_tiny, else the reference's")
    parser.add_argument("--dtype", default="float32", help="of our matrix products; the reference stays float32")
    parser.add_argument("--in_flight", type=int, default=0, help="also time ours with so many images in flight")
    parser.add_argument("--no_reference", action="store_true", help="ours alone; needs no torch")
    parser.add_argument("--no_memory", action="store_true", help="without the two processes that measure memory")
    parser.add_argument("--transformers", action="store_true", help="say how Hugging Face's pipeline compares")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--memory_of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    missing = [str(path) for path in args.photos if not path.exists()]
    if missing:
        parser.error(f"--photos: there is no {', '.join(missing)}")
    if not find_photos(args.photos):
        parser.error(f"no image files in {', '.join(map(str, args.photos))}")
    return args


def set_environment() -> None:
    """Before Keras is imported: its backend, and a GPU that torch and JAX can share."""
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def make_config(args: argparse.Namespace) -> AmgConfig:
    """The parameters of both sides."""
    thresholds = dict(TINY_THRESHOLDS) if args.model == "sam_tiny" else {}
    thresholds |= {name: value for name in TINY_THRESHOLDS if (value := getattr(args, name)) is not None}
    return AmgConfig(points_per_side=args.points_per_side, points_per_batch=args.points_per_batch, **thresholds)


def settings_line(config: AmgConfig) -> str:
    """The parameters that matter for speed."""
    return (
        f"{config.points_per_side}x{config.points_per_side} points in batches of {config.points_per_batch}, "
        f"pred_iou_thresh {config.pred_iou_thresh}, stability_score_thresh {config.stability_score_thresh}"
    )


def find_photos(paths: Sequence[Path]) -> list[Path]:
    """Files as given, and the image files of directories by name."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found += [file for file in inside if not path.is_dir() or file.suffix.lower() in IMAGE_EXTENSIONS]
    return found


def chunk_of(images: Sequence[bytes]) -> Chunk:
    """Encoded images as label_chunk takes them."""
    encoded = tuple(EncodedImage(f"image {row}", row, None, None, data) for row, data in enumerate(images))
    return Chunk(Shard("benchmark", "benchmark", "image", ()), 0, encoded, final=True, digest="")


# The machine


def describe_machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu_info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu_info.read_text()) if cpu_info.exists() else None
    versions = {}
    for package in _VERSIONED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
        "backend": os.environ.get("KERAS_BACKEND", "tensorflow"),
        "accelerators": accelerators(),
        "gpus": gpu_names(),
        "threads": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
    }


def accelerators() -> list[str]:
    """Devices other than CPUs that the backend sees."""
    import keras

    return [device for device in keras.distribution.list_devices() if not device.lower().startswith("cpu")]


def gpu_names() -> list[str]:
    """The NVIDIA GPUs of the machine, whoever uses them."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.splitlines()


def print_machine(machine: dict[str, Any]) -> None:
    """Three lines."""
    cpu, cores, ram_gib, load = (machine[key] for key in ("cpu", "cores", "ram_gib", "load_average"))
    print(f"{cpu}, {cores} cores, {ram_gib} GiB, load average {load} at the start")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = ", ".join(f"{name}={value}" for name, value in machine["threads"].items()) or "the libraries' own choice"
    print(f"Python {machine['python']}, {versions}; threads: {threads}")
    gpus = f"; GPUs of the machine: {'; '.join(machine['gpus'])}" if machine["gpus"] else ""
    print(f"backend {machine['backend']} on {', '.join(machine['accelerators']) or 'CPU'}{gpus}")


class OtherProcesses:
    """What share of the machine's CPU time other processes have used since this object was made.

    They do not slow both sides alike: torch's threads wait for each other at every loop, so that one that is kept from
    its core keeps all of them. With a busy neighbour the reference was seen to take eight times as long, ours three to
    four.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float:
        """From 0 to 1."""
        wall, busy, own = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return max(busy - own, 0.0) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: wall time, CPU time of all processes, and of this one."""
        user, nice, system, _, _, interrupts, soft_interrupts, stolen = (
            int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:9]
        )
        busy = user + nice + system + interrupts + soft_interrupts + stolen
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()


def peak_rss_bytes() -> int:
    """Highest resident memory of this process since it began, or since reset_peak_rss."""
    return _memory_field("VmHWM")


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return _memory_field("VmRSS")


def _memory_field(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not found:
        raise RuntimeError(f"/proc/self/status has no {name}: memory can be measured on Linux only")
    return int(found[1]) * 1024


def reset_peak_rss() -> bool:
    """Starts a new high-water mark, so that loading and compiling are not counted. False where Linux forbids it."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


# Models


def random_backbone(name: str) -> Any:
    """SAM's true architecture as KerasHub builds it, with KerasHub's initial weights."""
    import keras_hub

    backbone = keras_hub.models.SAMBackbone(
        image_encoder=keras_hub.models.ViTDetBackbone(
            image_shape=(1024, 1024, 3),
            patch_size=16,
            intermediate_dim=4 * RANDOM_MODELS[name]["hidden_size"],
            window_size=14,
            num_output_channels=256,
            **RANDOM_MODELS[name],
        ),
        prompt_encoder=keras_hub.layers.SAMPromptEncoder(
            hidden_size=256, image_embedding_size=(64, 64), input_image_size=(1024, 1024), mask_in_channels=16
        ),
        mask_decoder=keras_hub.layers.SAMMaskDecoder(
            hidden_size=256,
            num_layers=2,
            intermediate_dim=2048,
            num_heads=8,
            embedding_dim=256,
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
    )
    backbone.mask_decoder.build()  # it is no part of the backbone's graph
    return backbone


def load_sides(
    args: argparse.Namespace, config: AmgConfig, names: Sequence[str]
) -> tuple[Reference | None, Ours | None]:
    """The sides that are named, on the same weights."""
    from transforms.sam import Sam as KerasSam
    from transforms.sam import load_sam

    synthetic = args.model in RANDOM_MODELS
    backbone = random_backbone(args.model) if synthetic else None
    reference = ours = None
    if "reference" in names:
        from benchmarks import reference as torch_side

        start = time.perf_counter()
        if backbone is None:
            sam = torch_side.build_torch_sam(torch_side.load_backbone(resolve_preset(args.model)))
        else:
            sam = torch_side.build_torch_sam(backbone)
            if "ours" in names:  # KerasHub's initial weights leave out too much for the networks to be compared
                torch_side.randomize(sam, seed=0)
                torch_side.load_torch_weights(backbone, sam.state_dict())
        reference = Reference(sam, config, synthetic, time.perf_counter() - start)
    if "ours" in names:
        start = time.perf_counter()
        keras_sam = load_sam(args.model, args.dtype) if backbone is None else KerasSam(backbone, args.dtype)
        ours = Ours(keras_sam, config, synthetic, time.perf_counter() - start)
    return reference, ours


# Synthetic answers of the mask decoder


class Answers:
    """What the mask decoder is made to answer for one photo: SAM-like logits and predicted IoUs, the same each time.

    A mask is an ellipse of log-uniform size somewhere in the image, with smooth and fine noise; its logits fall off
    over a border of random width, and end near +15 and -18 as SAM's do. The predicted IoU is uniform.
    """

    def __init__(self, size_hw: tuple[int, int], frame_size: int, low_size: int, config: AmgConfig) -> None:
        height, width = resized_hw(size_hw, frame_size)
        self._low_size = low_size
        self._image_hw = height * low_size / frame_size, width * low_size / frame_size
        self._stored: np.ndarray | None = None
        self.predicted_iou = draw_predicted_iou(len(layer_point_grids(config)[0]), config.pred_iou_thresh)
        self.surviving_prompts = _surviving(self.predicted_iou, config.pred_iou_thresh)

    def logits(self, prompts: np.ndarray) -> np.ndarray:
        """(len(prompts), 3, low_size, low_size) float32."""
        if self._stored is not None:
            return self._stored[prompts]
        return np.stack([self._draw(int(prompt)) for prompt in prompts])

    def store(self) -> None:
        """Draws all of them now, so that handing them out takes no time. 0.8 GB for 1024 prompts."""
        self._stored = self.logits(np.arange(len(self.predicted_iou)))

    def _draw(self, prompt: int) -> np.ndarray:
        rng = np.random.default_rng([prompt, 1])
        return np.stack([draw_logits(rng, self._low_size, self._image_hw) for _ in range(MASKS_PER_POINT)])


def draw_predicted_iou(prompts: int, threshold: float) -> np.ndarray:
    """(prompts, 3) float32, uniform up to 1, so that SURVIVING_PROMPTS have one above the threshold.

    Of twenty draws the one with the share that is nearest: few prompts scatter.
    """
    above = 1 - (1 - SURVIVING_PROMPTS) ** (1 / MASKS_PER_POINT)  # of the candidates
    low = 1 - (1 - threshold) / above
    draws = [
        np.random.default_rng(seed).uniform(low, 1, (prompts, MASKS_PER_POINT)).astype(np.float32) for seed in range(20)
    ]
    return min(draws, key=lambda iou: abs(_surviving(iou, threshold) - SURVIVING_PROMPTS))


def _surviving(predicted_iou: np.ndarray, threshold: float) -> float:
    return float((predicted_iou > threshold).any(axis=1).mean())


def draw_logits(rng: np.random.Generator, low_size: int, image_hw: tuple[float, float]) -> np.ndarray:
    """One mask's logits, (low_size, low_size) float32; image_hw is the part that shows the image."""
    unit = low_size / 256
    radius = unit * np.exp(rng.uniform(np.log(6), np.log(110)))
    stretch = np.exp(rng.uniform(-0.6, 0.6))
    angle = rng.uniform(0, np.pi)
    steepness = np.exp(rng.uniform(np.log(0.5), np.log(12))) / unit
    y = (np.arange(low_size, dtype=np.float32) - rng.uniform(0, image_hw[0]))[:, None]
    x = (np.arange(low_size, dtype=np.float32) - rng.uniform(0, image_hw[1]))[None, :]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = np.sqrt((along / (radius * stretch)) ** 2 + (across * stretch / radius) ** 2)
    coarse = Image.fromarray(rng.standard_normal((9, 9), np.float32))
    smooth = np.asarray(coarse.resize((low_size, low_size), Image.Resampling.BICUBIC))
    fine = rng.standard_normal((low_size, low_size), np.float32)
    logits = np.clip((1 - distance) * radius * steepness, -18, 15) + smooth * rng.uniform(0, 2) + 0.2 * fine
    return logits.astype(np.float32)


@dataclass
class _AnsweredContext:
    """A crop's context, and how many of its prompts have been asked."""

    real: Any
    prompts: int = 0


@dataclass(frozen=True)
class _AnsweredPrompts:
    """A batch through the real decoder, whose answers are replaced."""

    real: Scored
    first: int
    sam: AnsweringSam

    def predicted_iou(self) -> np.ndarray:
        real = self.real.predicted_iou()
        self.sam.network_iou.append(real)
        return self.sam.answers.predicted_iou[self.first : self.first + len(real)]


class AnsweringSam:
    """A Sam that does all the work of another one and then gives the synthetic answers."""

    def __init__(self, sam: Sam, answers: Answers) -> None:
        self._sam = sam
        self.answers = answers
        self.frame_size = sam.frame_size
        self.low_size = sam.low_size
        self.network_iou: list[np.ndarray] = []

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> _AnsweredContext:
        return _AnsweredContext(self._sam.embed(frame, resized_hw))

    def score(self, context: _AnsweredContext, points_xy: np.ndarray, points_per_batch: int) -> _AnsweredPrompts:
        first, context.prompts = context.prompts, context.prompts + len(points_xy)
        return _AnsweredPrompts(self._sam.score(context.real, points_xy, points_per_batch), first, self)

    def low_res_logits(self, scored: _AnsweredPrompts, prompts: np.ndarray) -> np.ndarray:
        self._sam.low_res_logits(scored.real, prompts)
        return self.answers.logits(scored.first + prompts)


# The two sides


@dataclass(frozen=True)
class Run:
    """One image labeled once.

    Attributes:
      seconds: wall time, without what the module's docstring leaves out.
      stages: seconds by stage.
      excluded: the part of the wall time that is not in `seconds`, by cause.
      masks: in the side's order.
      network_iou: (P, 3) predicted IoU of the network itself, where synthetic answers replaced it.
    """

    seconds: float
    stages: dict[str, float]
    excluded: dict[str, float]
    masks: tuple[Mask, ...]
    network_iou: np.ndarray | None = None


class _Waiting:
    """A Sam that returns from embed only when the embedding is there."""

    def __init__(self, sam: Sam) -> None:
        self._sam = sam
        self.frame_size = sam.frame_size
        self.low_size = sam.low_size
        self.score = sam.score
        self.low_res_logits = sam.low_res_logits

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> Any:
        import keras

        context = self._sam.embed(frame, resized_hw)
        for tensor in keras.tree.flatten(context)[:1]:  # all come from one program
            keras.ops.convert_to_numpy(tensor)
        return context


class Ours:
    """maskbeam's model stage."""

    name = "ours"

    def __init__(self, sam: Sam, config: AmgConfig, synthetic: bool, load: float) -> None:
        self.sam = sam
        self.config = config
        self.synthetic = synthetic
        self.load = load
        self._threads = host_threads()

    def answers(self, size_hw: tuple[int, int]) -> Answers | None:
        """For a photo of that size; None if the network's own output counts."""
        return Answers(size_hw, self.sam.frame_size, self.sam.low_size, self.config) if self.synthetic else None

    def run(self, pixels: np.ndarray, answers: Answers | None, config: AmgConfig | None = None) -> Run:
        """Labels one image."""
        waiting = _Waiting(self.sam)
        sam: Sam = waiting if answers is None else AnsweringSam(waiting, answers)
        gc.collect()
        start = time.perf_counter()
        result = label_image(sam, pixels, config or self.config, self._threads.submit)
        seconds = time.perf_counter() - start
        stages = {
            "embed": result.seconds.embed,
            "predict_masks": result.seconds.predict_masks,
            "resize, last masks": seconds - result.seconds.embed - result.seconds.predict_masks,
            "(postprocess, in threads)": result.seconds.postprocess,
        }
        network_iou = np.concatenate(sam.network_iou) if isinstance(sam, AnsweringSam) else None
        return Run(seconds, stages, {}, result.masks, network_iou)

    def run_in_flight(self, data: bytes, copies: int, answers: Answers | None) -> float:
        """Seconds an image when `copies` of one encoded photo go through the pipeline's model stage."""
        from transforms.segment import ModelHealth, label_chunk  # imports Beam, which the rest here does without

        sam = self.sam if answers is None else AnsweringSam(self.sam, answers)
        start = time.perf_counter()
        labeled = label_chunk(
            sam, chunk_of([data] * copies), ImageConfig(), self.config, self._threads, ModelHealth()
        ).images
        seconds = time.perf_counter() - start
        failures = [image.failure.reason for image in labeled if image.failure]
        if failures:
            raise RuntimeError(f"{len(failures)} images failed: {failures[0]}")
        return seconds / copies


class Reference:
    """SamAutomaticMaskGenerator."""

    name = "reference"

    def __init__(self, sam: Any, config: AmgConfig, synthetic: bool, load: float) -> None:
        import torch

        from benchmarks.reference import STAND_INS

        self._torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.sam = sam.to(self.device)
        self.config = config
        self.synthetic = synthetic
        self.load = load
        self.torchvision_is_real = "torchvision" not in STAND_INS

    def answers(self, size_hw: tuple[int, int]) -> Answers | None:
        """As Ours.answers."""
        low_size = 4 * self.sam.prompt_encoder.image_embedding_size[0]
        return Answers(size_hw, self.sam.image_encoder.img_size, low_size, self.config) if self.synthetic else None

    def run(self, pixels: np.ndarray, answers: Answers | None, config: AmgConfig | None = None) -> Run:
        """Labels one image."""
        from benchmarks.parity import read_masks
        from benchmarks.reference import SamAutomaticMaskGenerator

        config = config or self.config
        generator = SamAutomaticMaskGenerator(
            self.sam,
            output_mode="coco_rle",
            points_per_side=config.points_per_side,
            points_per_batch=config.points_per_batch,
            pred_iou_thresh=config.pred_iou_thresh,
            stability_score_thresh=config.stability_score_thresh,
        )
        stages: defaultdict[str, float] = defaultdict(float)
        network_iou: list[np.ndarray] = []
        gc.collect()
        with self._timed_stages(generator, stages), self._answering(answers, stages, network_iou):
            start = time.perf_counter()
            records = generator.generate(pixels)
            self._wait()
            seconds = time.perf_counter() - start
        stages["other"] = seconds - sum(stages.values())
        excluded = {} if answers is None else {"synthetic answers": stages.pop("synthetic answers")}
        if not self.torchvision_is_real:
            excluded["stand-in NMS"] = stages.pop("NMS", 0.0)
        return Run(
            seconds - sum(excluded.values()),
            dict(stages),
            excluded,
            read_masks({"masks": records}),
            np.concatenate(network_iou) if network_iou else None,
        )

    def _wait(self) -> None:
        if self.device == "cuda":
            self._torch.cuda.synchronize()

    @contextmanager
    def _timed_stages(self, generator: Any, stages: defaultdict[str, float]) -> Iterator[None]:
        """Adds the seconds that the reference spends in its functions to `stages`. None of them calls another."""
        from segment_anything import automatic_mask_generator as amg

        with ExitStack() as stack:
            for stage, owner, name in (
                ("resize", generator.predictor.transform, "apply_image"),
                ("image encoder", self.sam.image_encoder, "forward"),
                ("prompt encoder", self.sam.prompt_encoder, "forward"),
                ("mask decoder", self.sam.mask_decoder, "forward"),
                ("upsampling", self.sam, "postprocess_masks"),
                ("filters, copies", amg.MaskData, "filter"),
                ("filters, copies", amg.MaskData, "cat"),
                ("stability", amg, "calculate_stability_score"),
                ("boxes", amg, "batched_mask_to_box"),
                ("RLE", amg, "mask_to_rle_pytorch"),
                ("RLE", amg, "coco_encode_rle"),
                ("NMS", amg, "batched_nms"),
            ):
                timed = _timed(getattr(owner, name), stage, stages, self._wait)
                stack.enter_context(mock.patch.object(owner, name, timed))
            yield

    @contextmanager
    def _answering(
        self, answers: Answers | None, stages: defaultdict[str, float], network_iou: list[np.ndarray]
    ) -> Iterator[None]:
        """Replaces what the mask decoder returns by the synthetic answers, if there are any."""
        if answers is None:
            yield
            return
        asked = 0

        def replace_output(module: Any, inputs: Any, output: Any) -> Any:
            nonlocal asked
            network_iou.append(output[1].cpu().numpy())
            batch = np.arange(asked, asked + len(output[1]))
            asked += len(batch)
            both = answers.logits(batch), answers.predicted_iou[batch]
            return tuple(self._torch.from_numpy(array).to(self.device) for array in both)

        timed = _timed(replace_output, "synthetic answers", stages, self._wait)
        hook = self.sam.mask_decoder.register_forward_hook(timed)
        try:
            yield
        finally:
            hook.remove()

    def judge(self, reference: Run, ours: Run, pixels: np.ndarray, answers: Answers | None) -> Comparison:
        """Holds our masks against the reference's by the contract of benchmarks.parity."""
        from benchmarks import parity

        self.sam.cpu()
        judge: Any = parity.Reference(self.sam, pixels)
        if answers is not None:
            judge = _AnsweredReference(self.sam, pixels.shape[:2], answers, self.config)
        compared = parity.compare(reference.masks, ours.masks, judge, self.config)
        self.sam.to(self.device)
        return compared

    def torchvision_line(self, photos: list[PhotoRuns]) -> str:
        """Whether torchvision is the real one."""
        if self.torchvision_is_real:
            return f"torchvision {importlib.metadata.version('torchvision')}: its NMS is part of the reference's time"
        seconds = _mean(photo.runs["reference"][i].excluded["stand-in NMS"] for photo in photos for i in photo.rounds)
        return f"torchvision is a stand-in: its NMS took {seconds:.3f} s an image, left out of the reference's time"


def _timed(
    function: Callable[..., Any], stage: str, stages: defaultdict[str, float], wait: Callable[[], None]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        wait()
        stages[stage] += time.perf_counter() - start
        return result

    return call


class _AnsweredReference:
    """In place of benchmarks.parity.Reference: what a prompt was answered, upsampled as the reference does."""

    def __init__(self, sam: Any, size_hw: tuple[int, int], answers: Answers, config: AmgConfig) -> None:
        self._sam = sam
        self._size_hw = size_hw
        self._answers = answers
        self._points_xy = layer_point_grids(config)[0] * np.array(size_hw[::-1])

    def decode(self, mask: Mask) -> Decoded:
        import torch

        from benchmarks.parity import Decoded

        prompt = np.abs(self._points_xy - mask.point_xy).sum(axis=1).argmin()
        predicted_iou = self._answers.predicted_iou[prompt]
        token = int(np.abs(predicted_iou - mask.predicted_iou).argmin())
        low = torch.from_numpy(self._answers.logits(np.array([prompt])))
        input_size = resized_hw(self._size_hw, self._sam.image_encoder.img_size)
        logits = self._sam.postprocess_masks(low, input_size, self._size_hw)[0, token].numpy()
        return Decoded(logits, float(predicted_iou[token]), (0, 0))


# Measuring


@dataclass(frozen=True)
class WarmUp:
    """Seconds until a side is ready: loading, and two calls with a single prompt."""

    side: str
    load: float
    first: float
    second: float


def warm_up(side: Reference | Ours) -> WarmUp:
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

    @property
    def rounds(self) -> range:
        return range(len(self.runs["ours"]))

    def ratios(self) -> list[float]:
        """Of the pairs."""
        pairs = zip(self.runs["reference"], self.runs["ours"], strict=False)
        return [reference.seconds / ours.seconds for reference, ours in pairs]

    def agreement(self) -> tuple[int, int, int, bool]:
        """Masks of the reference, of ours, RLE strings on both sides, and whether the same masks are in the same order.

        A mask is known by its prompt and predicted IoU, so that a pixel within rounding does not make it another one.
        """
        reference, ours = (self.runs[side][0].masks for side in SIDES)
        identical = (Counter(mask.counts for mask in reference) & Counter(mask.counts for mask in ours)).total()
        same_order = len(reference) == len(ours) and all(
            one.point_xy == other.point_xy and abs(one.predicted_iou - other.predicted_iou) <= 1e-5
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
            "in_flight_seconds": self.in_flight_seconds,
            "agreement": self.agreement() if self.runs["reference"] else None,
            "contract": asdict(self.comparison) if self.comparison else None,
        }


def compare_photo(
    path: Path, args: argparse.Namespace, config: AmgConfig, reference: Reference | None, ours: Ours
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
        for side in (reference, ours):
            if side is not None:
                photo.runs[side.name].append(side.run(pixels, answers))
                line.append(f"{side.name} {photo.runs[side.name][-1].seconds:.3f} s")
        if reference is not None:
            line.append(f"ratio {photo.ratios()[-1]:.2f}")
        print(f"  round {index + 1}: {', '.join(line)}", flush=True)
    if args.in_flight:
        photo.in_flight_seconds = ours.run_in_flight(path.read_bytes(), args.in_flight, answers)
        print(f"  ours, {args.in_flight} copies in flight: {photo.in_flight_seconds:.3f} s an image, decoding included")
    if reference is not None:
        if args.dtype == "float32":
            first = {side: photo.runs[side][0] for side in SIDES}
            photo.comparison = reference.judge(first["reference"], first["ours"], pixels, answers)
        print_agreement(photo)
    return photo


def print_agreement(photo: PhotoRuns) -> None:
    """How far the two sides' masks, and networks, agree."""
    reference, ours, identical, same_order = photo.agreement()
    print(
        f"  masks: reference {reference}, ours {ours}, identical RLE strings {identical}, "
        f"{'the same masks in the same order' if same_order else 'the lists differ'}"
    )
    nets = [photo.runs[side][0].network_iou for side in SIDES]
    if nets[0] is not None and nets[1] is not None:
        difference = float(np.abs(nets[0] - nets[1]).max())
        print(f"  networks: predicted IoU, before it is replaced, differs by at most {difference:.1e}")
    if photo.comparison is not None and not (same_order and identical == reference):
        from benchmarks.parity import print_comparison

        print_comparison(f"  {photo.name}", photo.comparison)


def print_contract(photos: list[PhotoRuns], dtype: str) -> None:
    """The verdict over all photos."""
    if dtype != "float32":
        print(f"the contract is one of float32: it is not asked of {dtype}")
        return
    from benchmarks.parity import contract_holds

    contract_holds([photo.comparison for photo in photos if photo.comparison])


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
    ratios = [ratio for photo in photos for ratio in photo.ratios()]
    if ratios:
        summary["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
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
    if "ratio" in summary:
        ratio = summary["ratio"]
        print(f"{'ratio, median of the pairs':34}{ratio['median']:10.2f}   ({ratio['min']:.2f} to {ratio['max']:.2f})")
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
    reference, ours = load_sides(args, config, [args.memory_of])
    side = reference or ours
    assert side is not None  # one was asked for
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


def device_peak_bytes(side: str) -> int | None:
    """Highest memory in use on the accelerator, as the side's framework counts it; None without one."""
    import keras

    if side == "reference":
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    if not accelerators():
        return None
    if keras.backend.backend() == "jax":
        import jax

        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    import tensorflow

    return tensorflow.config.experimental.get_memory_info("GPU:0")["peak"]


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
        print("(the reference's ready process also holds Keras, which reads the weights: compare what the image took)")


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


def transformers_line() -> str:
    """Why Hugging Face's mask-generation pipeline is not measured."""
    found = importlib.util.find_spec("transformers") is not None
    return (
        f"transformers is {'installed' if found else 'not installed'}. Its mask-generation pipeline is not compared: "
        "its SamModel names its weights its own way, and nothing here converts them, so it could not run on the same "
        "weights as the two sides."
    )


if __name__ == "__main__":
    sys.exit(main())
