"""Boxes to masks: maskbeam against KerasHub's own layers called plainly, and against the torch reference.

python -m benchmarks.prompts [--model sam_tiny|vit_b|PRESET] [--boxes 1 7 20 100] [--repeats 5] [--photo FILE] [--torch]

Three sides on the same weights, in the same process and the same order, one photo, random boxes:
  maskbeam  embeds the photo, and its decoder answers all boxes, mask 0 of each;
  keras_hub SAMPromptEncoder and SAMMaskDecoder as they are, compiled by XLA as one call for all boxes;
  torch     SamPredictor.set_image, then predict_torch of all boxes at once (--torch; needs the bench extra).
"decode" is boxes to low-res logits on the host; "all" is pixels to RLE, with maskbeam's post-processing for all three.
Every side runs once before it is timed. Reported is the best of the repeats, which take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.models import RANDOM_MODELS, random_backbone
from benchmarks.photos import find_photos
from maskbeam.transforms.masks import rle
from maskbeam.transforms.masks.candidates import mask_to_runs, measure_mask
from maskbeam.transforms.masks.frame import Upsampling, resized_hw, to_frame, to_frame_points
from maskbeam.transforms.masks.prompted import PromptedConfig, label_prompts
from maskbeam.transforms.masks.prompts import batch_prompts, check_prompts
from maskbeam.transforms.records import Prompts
from maskbeam.transforms.threads import host_threads

PHOTOS = Path(__file__).parent.parent / "pipeline" / "demo_photos"

# A side: (H, W, 3) pixels and (P, 4) boxes -> decode, which gives (P, low, low) logits, and all, which gives RLE.
Side = tuple[Callable[[], np.ndarray], Callable[[], list[str]]]


def main(argv: Sequence[str] | None = None) -> None:
    """Times all sides and prints a line for each number of boxes and each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sam_tiny", help="a preset, or one of " + ", ".join(RANDOM_MODELS))
    parser.add_argument("--boxes", type=int, nargs="+", default=[1, 7, 20, 100])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--photo", type=Path, default=find_photos([PHOTOS])[0])
    parser.add_argument("--torch", action="store_true", help="time the reference, too")
    args = parser.parse_args(argv)
    backbone = load(args.model)
    pixels = np.asarray(Image.open(args.photo).convert("RGB"))
    make_sides = {"maskbeam": ours(backbone), "keras_hub": plain(backbone)}
    if args.torch:
        make_sides["torch"] = reference(backbone)
    for count in args.boxes:
        boxes = random_boxes(count, pixels.shape[:2])
        sides = {name: make(pixels, boxes) for name, make in make_sides.items()}
        check_answers({name: decode() for name, (decode, _) in sides.items()})
        for part, name in enumerate(("decode", "all")):
            seconds = best_of({side: functions[part] for side, functions in sides.items()}, args.repeats)
            figures = "  ".join(
                f"{side} {1000 * value:8.1f} ms ({value / seconds['maskbeam']:.2f} x)"
                for side, value in seconds.items()
            )
            print(f"{count:4d} boxes, {name:6s}: {figures}", flush=True)


def load(model: str) -> Any:
    """KerasHub's model: random weights by name, or a preset."""
    from maskbeam.transforms.models.sam.model import load_backbone

    return random_backbone(model) if model in RANDOM_MODELS else load_backbone(model)


def random_boxes(count: int, size_hw: tuple[int, ...]) -> np.ndarray:
    """(count, 4) XYXY in the image, of all sizes."""
    rng = np.random.default_rng(count)
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * np.array(size_hw[::-1])
    return corners.reshape(-1, 4)


def best_of(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest of some calls of each, which take turns after one call that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in seconds.items()}


def check_answers(logits: dict[str, np.ndarray]) -> None:
    """Raises RuntimeError unless all sides answer alike, within rounding."""
    for name, values in logits.items():
        difference = float(np.abs(values - logits["maskbeam"]).max())
        if difference > 1e-3 * max(1.0, float(np.abs(values).max())):
            raise RuntimeError(f"{name} answers differ from maskbeam's by {difference}: they are not the same model")


def to_counts(logits: np.ndarray, upsampling: Upsampling) -> list[str]:
    """The post-processing of every side: stability, and RLE."""
    counts = []
    for of_mask in logits:
        measure_mask(of_mask, upsampling, 0.0, 1.0)
        runs = mask_to_runs(of_mask, upsampling, 0.0, (0, 0), upsampling.size_hw)
        counts.append(rle.runs_to_counts(runs))
    return counts


def ours(backbone: Any) -> Callable[[np.ndarray, np.ndarray], Side]:
    """maskbeam's decoder and label_prompts."""
    from maskbeam.transforms.models.sam.model import Sam

    sam, threads, config = Sam(backbone), host_threads(), PromptedConfig()

    def make(pixels: np.ndarray, boxes: np.ndarray) -> Side:
        size_hw, prompts = (pixels.shape[0], pixels.shape[1]), Prompts.of_boxes(boxes)
        context = sam.embed(to_frame(pixels, sam.frame_size), resized_hw(size_hw, sam.frame_size))

        def decode() -> np.ndarray:
            parts = []
            for batch in batch_prompts(check_prompts(prompts, size_hw), size_hw, sam.frame_size, sam.prompt_batches):
                scored = sam.score_prompts(context, batch.coords_xy, batch.labels, None, batch.size)
                rows = np.arange(len(batch.indices))
                parts.append(sam.mask_logits(scored, rows, np.zeros_like(rows)))
            return np.concatenate(parts)

        def everything() -> list[str]:
            return [mask.counts for mask in label_prompts(sam, pixels, prompts, config, threads.submit).masks]

        return decode, everything

    return make


def plain(backbone: Any) -> Callable[[np.ndarray, np.ndarray], Side]:
    """KerasHub's layers; each number of boxes is a program of its own."""
    from keras import ops

    from maskbeam.transforms.models.backend import compile_for_backend

    frame_size = backbone.prompt_encoder.input_image_size[0]

    def decode_boxes(weights: Any, embedding: Any, boxes: Any) -> Any:
        encoded = backbone.prompt_encoder(boxes=boxes)
        return backbone.mask_decoder(image_embeddings=embedding, **encoded)["masks"][:, 0]

    embed = compile_for_backend(lambda weights, image: backbone.image_encoder(image), ())

    def make(pixels: np.ndarray, boxes: np.ndarray) -> Side:
        size_hw = (pixels.shape[0], pixels.shape[1])
        in_frame = to_frame_points(boxes.reshape(-1, 2), size_hw, frame_size).reshape(-1, 1, 2, 2).astype(np.float32)
        program = compile_for_backend(decode_boxes, ())
        upsampling = Upsampling.build(size_hw, 4 * backbone.prompt_encoder.image_embedding_size[0], frame_size)

        def embed_photo() -> Any:
            height, width = resized_hw(size_hw, frame_size)
            mean = np.array([0.485, 0.456, 0.406], np.float32)  # normalized to 0, as the reference's padding is
            image = np.broadcast_to(mean, (1, frame_size, frame_size, 3)).copy()
            image[0, :height, :width] = to_frame(pixels, frame_size)[:height, :width] / np.float32(255)
            return embed(image)

        embedding = embed_photo()

        def decode(embedding: Any = embedding) -> np.ndarray:
            return np.asarray(ops.convert_to_numpy(program(embedding, in_frame)))

        return decode, lambda: to_counts(decode(embed_photo()), upsampling)

    return make


def reference(backbone: Any) -> Callable[[np.ndarray, np.ndarray], Side]:
    """SamPredictor of segment_anything; its own upsampling is left out, since maskbeam's is faster."""
    import torch

    from benchmarks.reference import build_torch_sam
    from segment_anything import SamPredictor  # isort: skip

    predictor = SamPredictor(build_torch_sam(backbone))

    def make(pixels: np.ndarray, boxes: np.ndarray) -> Side:
        size_hw = (pixels.shape[0], pixels.shape[1])
        in_frame = torch.tensor(predictor.transform.apply_boxes(boxes, size_hw), dtype=torch.float32)
        frame_size = backbone.prompt_encoder.input_image_size[0]
        low_size = predictor.model.prompt_encoder.mask_input_size[0]
        upsampling = Upsampling.build(size_hw, low_size, frame_size)
        predictor.set_image(pixels)

        @torch.no_grad()
        def decode() -> np.ndarray:
            model = predictor.model
            sparse, dense = model.prompt_encoder(points=None, boxes=in_frame, masks=None)
            position = model.prompt_encoder.get_dense_pe()
            masks, _ = model.mask_decoder(predictor.features, position, sparse, dense, multimask_output=False)
            logits: np.ndarray = masks[:, 0].numpy()
            return logits

        def everything() -> list[str]:
            predictor.set_image(pixels)
            return to_counts(decode(), upsampling)

        return decode, everything

    return make


if __name__ == "__main__":
    main()
