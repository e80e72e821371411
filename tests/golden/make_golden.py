"""Makes the golden fixture beside this file: a tiny SAM, a few images, and what the torch reference makes of them.

python -m tests.golden.make_golden [prompts]            (needs the bench extra; ten seconds)

With "prompts", only what SamPredictor makes of prompts, with the preset that is there.

The weights are random, but not plain random ones, whose masks are scattered over the whole image: see make_weights.
Two runs on one machine give the same bytes. README.md describes the files.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import keras_hub
import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from benchmarks.reference import (
    Sam,
    SamAutomaticMaskGenerator,
    build_torch_sam,
    count_dropped,
    load_torch_weights,
    randomize,
    reference_generator,
)

# After benchmarks.reference, which stands in for torchvision where that is missing.
from segment_anything import SamPredictor  # isort: skip
from segment_anything.utils.transforms import ResizeLongestSide  # isort: skip

GOLDEN = Path(__file__).parent
PRESET = GOLDEN / "sam_128"
PROMPTS = GOLDEN / "prompts"

# Found by trying seeds 0 to 29, each with a few strengths of _localize, on three of the CASES: the most masks of a
# medium size, among those whose logits in float32 and in float64 are within 2.5e-5.
SEED = 20

# (width, height) in pixels: wide, tall, exactly the model's frame, and a strip.
IMAGE_SIZES_WH = ((160, 120), (97, 151), (128, 128), (200, 40))

# (image, name of the setting, arguments of SamAutomaticMaskGenerator). The random model is less sure of itself than
# SAM and its logits are smaller, so the thresholds and the offset are lower than SAM's.
SURE: dict[str, Any] = {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.6, "stability_score_offset": 0.2}
LAX: dict[str, Any] = {**SURE, "stability_score_thresh": 0.3, "box_nms_thresh": 0.9}
CROPS: dict[str, Any] = {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2}
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("blobs_160x120", "grid", {"points_per_side": 8, **SURE}),
    ("blobs_97x151", "crops1", {"points_per_side": 8, **SURE, **CROPS}),
    ("blobs_160x120", "crops2", {"points_per_side": 8, **LAX, **CROPS, "crop_n_layers": 2}),
    ("blobs_200x40", "crops1_clean", {"points_per_side": 8, **LAX, **CROPS, "min_mask_region_area": 60}),
    ("blobs_97x151", "clean", {"points_per_side": 8, **LAX, "min_mask_region_area": 3}),
    ("blobs_128x128", "all", {"points_per_side": 6, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}),
    (
        "blobs_200x40",
        "odd_batch",
        {"points_per_side": 7, "points_per_batch": 13, **SURE, "stability_score_offset": 0.3},
    ),
    ("blobs_128x128", "logits", {"points_per_side": 4, **LAX}),
    ("blobs_160x120", "crops1_logits", {"points_per_side": 4, **LAX, **CROPS, "min_mask_region_area": 20}),
)

# The cases whose network outputs are stored too.
LOGITS_OF = ("blobs_128x128.logits", "blobs_160x120.crops1_logits")


# Prompts of each kind for an image: points, whether a box, whether a coarse mask.
KINDS = {
    "foreground": (1, False, False),
    "background": (1, False, False),
    "3 points": (3, False, False),
    "8 points": (8, False, False),
    "20 points": (20, False, False),
    "box": (0, True, False),
    "box and 1 point": (1, True, False),
    "box and 8 points": (8, True, False),
    "mask": (0, False, True),
    "mask and box": (0, True, True),
    "mask and 3 points": (3, False, True),
    "mask, box and 3 points": (3, True, True),
}
PROMPTS_OF_A_KIND = 3

# Fields of PromptedConfig, and the kinds of prompts that are answered with them.
SOME_KINDS = ("foreground", "3 points", "box", "box and 1 point", "mask and box")
PROMPT_CASES: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({"box_of_mask": False}, tuple(KINDS)),
    ({}, ("mask", "mask and 3 points")),
    ({"mask": "single"}, SOME_KINDS),
    ({"mask": "best"}, SOME_KINDS),
    ({"mask": "stable"}, SOME_KINDS),
    ({"mask": "all"}, SOME_KINDS),
    ({"refine_steps": 1}, ("foreground", "3 points", "box", "box and 1 point")),
)
PROMPTED_IMAGES_WH = ((160, 120), (97, 151))

# Pixels whose logit in the reference is nearer to zero than this may be otherwise: tests/transforms/models.
NEAR = 1e-4


def main() -> None:
    torch.set_num_threads(1)  # so that sums do not depend on the number of cores
    if sys.argv[1:] == ["prompts"]:
        make_prompts()
        return
    images = {f"blobs_{width}x{height}": make_image(width, height) for width, height in IMAGE_SIZES_WH}
    for name, pixels in images.items():
        Image.fromarray(pixels).save(GOLDEN / f"{name}.png")

    backbone = build_backbone()
    sam = build_torch_sam(backbone)
    make_weights(sam, list(images.values()))
    load_torch_weights(backbone, sam.state_dict())
    shutil.rmtree(PRESET, ignore_errors=True)
    keras_hub.models.SAMImageSegmenter(backbone=backbone, preprocessor=None).save_to_preset(str(PRESET))
    (PRESET / "metadata.json").unlink()  # only the date of saving; loading does without

    total: Counter[str] = Counter()
    for image, setting, settings in CASES:
        total += make_case(backbone, image, images[image], setting, settings)
    for reason in ("predicted_iou", "stability", "crop_edge", "box_nms", "crop_nms", "small_region"):
        if not total[reason]:
            raise RuntimeError(f"no case drops a candidate because of {reason}: change SEED or CASES")
    make_prompts()


@torch.no_grad()
def make_prompts() -> None:
    """Writes what SamPredictor.predict answers to prompts of every kind, each asked alone."""
    backbone = keras_hub.models.SAMImageSegmenter.from_preset(str(PRESET), preprocessor=None).backbone
    predictor = SamPredictor(build_torch_sam(backbone))
    PROMPTS.mkdir(exist_ok=True)
    low_res_logits: dict[str, Any] = {}
    for width, height in PROMPTED_IMAGES_WH:
        name = f"blobs_{width}x{height}"
        predictor.set_image(np.asarray(Image.open(GOLDEN / f"{name}.png").convert("RGB")))
        rng = np.random.default_rng([width, height])
        prompts = {kind: [make_prompt(kind, width, height, rng) for _ in range(PROMPTS_OF_A_KIND)] for kind in KINDS}
        cases = []
        for config, kinds in PROMPT_CASES:
            asked = [prompt for kind in kinds for prompt in prompts[kind]]
            answers = [ask(predictor, prompt, config) for prompt in asked]
            cases.append(
                {"config": config, "prompts": asked, "answers": [[record(*a) for a in some] for some in answers]}
            )
            if "refine_steps" in config:
                low_res_logits[name] = np.concatenate([[low for *_, low in some] for some in answers])
        golden = {"photo": f"{name}.png", "size": [height, width], "cases": cases}
        (PROMPTS / f"{name}.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
        print(f"{name}: {sum(len(case['prompts']) for case in cases)} prompts")
    np.savez_compressed(PROMPTS / "refined_logits.npz", **low_res_logits)


def make_prompt(kind: str, width: int, height: int, rng: np.random.Generator) -> dict[str, Any]:
    """A prompt in pixels of the image: box [x0, y0, x1, y1], points, labels, RLE counts of a mask; None = has none."""
    num_points, has_box, has_mask = KINDS[kind]
    size = np.array([width, height])
    points = (rng.uniform(0, 1, (num_points, 2)) * (size - 1)).round(2)
    labels = np.r_[1, rng.integers(0, 2, num_points)][:num_points]
    if kind == "background":
        labels = np.zeros(1, int)
    centre, radii = rng.uniform(0.3, 0.7, 2) * size, rng.uniform(0.1, 0.25, 2) * size
    y, x = np.mgrid[:height, :width]
    ellipse = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 < 1
    return {
        "box": np.concatenate([centre - radii, centre + radii]).round(2).tolist() if has_box else None,
        "points": points.tolist(),
        "labels": labels.tolist(),
        "mask": encode(ellipse) if has_mask else None,
    }


Answer = tuple[int, float, np.ndarray, np.ndarray]  # mask token, predicted IoU, logits of the image, low-res logits


def ask(predictor: SamPredictor, prompt: dict[str, Any], config: dict[str, Any]) -> list[Answer]:
    """The reference's answer to one prompt, by the rules of PromptedConfig."""
    box, given = prompt["box"], {}
    if prompt["mask"] is not None:
        size_hw = predictor.original_size
        rle = {"size": list(size_hw), "counts": prompt["mask"]}
        given["mask_input"] = to_logits(coco_mask.decode(rle), predictor)
        if box is None and config.get("box_of_mask", True):
            x, y, w, h = coco_mask.toBbox(rle).tolist()
            box = [x, y, x + w, y + h]
    if prompt["points"]:
        given |= {"point_coords": np.array(prompt["points"]), "point_labels": np.array(prompt["labels"])}
    if box is not None:
        given["box"] = np.array(box)

    def predict(multimask_output: bool, **given: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return predictor.predict(**given, multimask_output=multimask_output, return_logits=True)

    logits, predicted_iou, low = (
        np.concatenate(both) for both in zip(predict(False, **given), predict(True, **given), strict=True)
    )
    best = 1 + int(predicted_iou[1:].argmax())
    is_click = prompt["labels"] == [1] and box is None and prompt["mask"] is None
    choices = {
        "auto": [best if is_click else 0],
        "single": [0],
        "best": [best],
        "stable": [0 if is_stable(torch.from_numpy(low[:1])) else best],
        "all": [0, 1, 2, 3],
    }
    tokens = choices[config.get("mask", "auto")]
    if config.get("refine_steps"):
        given["mask_input"] = low[tokens]
        logits, predicted_iou, low = predict(False, **given)
        tokens = [0]
    return [(token, float(predicted_iou[token]), logits[token], low[token]) for token in tokens]


def to_logits(mask: np.ndarray, predictor: SamPredictor) -> np.ndarray:
    """(H, W) uint8 -> (1, low, low) float32: resized as the reference resizes images, cut at one half, padded."""
    low = predictor.model.prompt_encoder.mask_input_size[0]
    resized = ResizeLongestSide(low).apply_image(mask * 255) > 127
    padded = np.zeros((low, low), bool)
    padded[: resized.shape[0], : resized.shape[1]] = resized
    return np.where(padded, math.log(999), -math.log(999)).astype(np.float32)[None]


def is_stable(low_res_logits: torch.Tensor) -> bool:
    """_get_stability_scores of facebookresearch/sam2, sam2/modeling/sam/mask_decoder.py, and SAM 2's two numbers."""
    mask_logits = low_res_logits.flatten(-2)
    area_i = torch.sum(mask_logits > 0.05, dim=-1).float()
    area_u = torch.sum(mask_logits > -0.05, dim=-1).float()
    return bool(torch.where(area_u > 0, area_i / area_u, 1.0) >= 0.98)


def record(token: int, predicted_iou: float, logits: np.ndarray, low_res_logits: np.ndarray) -> dict[str, Any]:
    """An answer as the fixture has it: RLE of the mask and of the pixels where the reference itself is unsure."""
    near = encode(np.abs(logits) < NEAR)
    return {"token": token, "predicted_iou": predicted_iou, "counts": encode(logits > 0), "near": near}


def encode(mask: np.ndarray) -> str:
    """(H, W) bool -> COCO compressed RLE."""
    counts: bytes = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    return counts.decode()


def make_case(
    backbone: keras_hub.models.SAMBackbone, image: str, pixels: np.ndarray, setting: str, settings: dict[str, Any]
) -> Counter[str]:
    """Runs the reference on one image, writes its masks and perhaps its logits; returns what its filters dropped."""
    generator = reference_generator(backbone, **settings)
    outputs = capture_outputs(generator.predictor.model)
    with count_dropped() as dropped:
        masks = generator.generate(pixels)
    case = {
        "photo": f"{image}.png",
        "size": list(pixels.shape[:2]),
        "settings": settings,
        "num_candidates": len(masks) + dropped.total(),
        "dropped": dict(sorted(dropped.items())),
        "masks": masks,
    }
    stem = f"{image}.{setting}"
    (GOLDEN / f"{stem}.json").write_text(json.dumps(case, separators=(",", ":")) + "\n")
    if stem in LOGITS_OF:
        arrays: dict[str, Any] = {
            f"{name}_{crop}": np.concatenate(batches)
            for name, crops in outputs.items()
            for crop, batches in enumerate(crops[:1] if name == "image_embedding" else crops)
        }
        np.savez_compressed(GOLDEN / f"{stem}.npz", **arrays)
    print(f"{stem}: {len(masks)} masks of {case['num_candidates']} candidates, dropped {case['dropped']}")
    return dropped


def capture_outputs(sam: Sam) -> dict[str, list[list[np.ndarray]]]:
    """Records what the networks return from now on: for each name a list of crops, each a list of batches.

    image_embedding (1, grid, grid, channels), low_res_logits (P, 3, low, low), iou_predictions (P, 3), all float32.
    """
    outputs: dict[str, list[list[np.ndarray]]] = {"image_embedding": [], "low_res_logits": [], "iou_predictions": []}

    def start_crop(module: Any, args: Any, embedding: torch.Tensor) -> None:
        outputs["image_embedding"].append([embedding.permute(0, 2, 3, 1).numpy()])
        outputs["low_res_logits"].append([])
        outputs["iou_predictions"].append([])

    def add_batch(module: Any, args: Any, decoded: tuple[torch.Tensor, torch.Tensor]) -> None:
        outputs["low_res_logits"][-1].append(decoded[0].numpy())
        outputs["iou_predictions"][-1].append(decoded[1].numpy())

    sam.image_encoder.register_forward_hook(start_crop)
    sam.mask_decoder.register_forward_hook(add_batch)
    return outputs


def make_image(width: int, height: int) -> np.ndarray:
    """Coloured ellipses on a waved and noisy background, (height, width, 3) uint8."""
    rng = np.random.default_rng([width, height])
    y, x = np.mgrid[:height, :width]
    pixels = np.tile(rng.uniform(60, 190, 3), (height, width, 1))
    for _ in range(3):
        frequency_x, frequency_y, phase = rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3), rng.uniform(0, 2 * np.pi)
        wave = np.sin(frequency_x * x + frequency_y * y + phase)
        pixels += 12 * wave[..., None] * rng.uniform(-1, 1, 3)
    for _ in range(9):
        dx, dy = x - rng.uniform(0, width), y - rng.uniform(0, height)
        radii = rng.uniform(0.04, 0.18, 2) * max(width, height)
        angle = rng.uniform(0, np.pi)
        along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        pixels[(along / radii[0]) ** 2 + (across / radii[1]) ** 2 < 1] = rng.uniform(0, 255, 3)
    return (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)


def build_backbone() -> keras_hub.models.SAMBackbone:
    """A SAM of 84 thousand parameters: 128-pixel frame, 16x16 grid, 64x64 low-res logits.

    One windowed and one global block; the window of 7 does not divide the grid, so that its padding is exercised.
    """
    channels, frame_size, patch_size = 32, 128, 8
    backbone = keras_hub.models.SAMBackbone(
        image_encoder=keras_hub.models.ViTDetBackbone(
            image_shape=(frame_size, frame_size, 3),
            patch_size=patch_size,
            hidden_size=32,
            num_layers=2,
            intermediate_dim=64,
            num_heads=2,
            window_size=7,
            global_attention_layer_indices=[1],
            num_output_channels=channels,
        ),
        prompt_encoder=keras_hub.layers.SAMPromptEncoder(
            hidden_size=channels,
            image_embedding_size=(frame_size // patch_size, frame_size // patch_size),
            input_image_size=(frame_size, frame_size),
            mask_in_channels=8,
        ),
        mask_decoder=keras_hub.layers.SAMMaskDecoder(
            hidden_size=channels,
            num_layers=2,
            intermediate_dim=64,
            num_heads=4,
            embedding_dim=channels,
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=32,
        ),
    )
    backbone.mask_decoder.build()  # it is no part of the backbone's graph
    return backbone


@torch.no_grad()
def make_weights(sam: Sam, images: list[np.ndarray]) -> None:
    """Random weights with which masks lie near their prompts and every filter has something to keep and to drop."""
    randomize(sam, SEED)
    weights = sam.state_dict()  # shares the model's memory
    _localize(weights)
    _spread(sam, weights, images)
    _soften(weights)
    spread_single(sam)


def _localize(weights: dict[str, torch.Tensor]) -> None:
    """Makes the image tokens near a point attend to it, which plain random weights do not."""
    # Longer waves in the position encoding: nearness without echoes.
    weights["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"].mul_(0.5)
    # Less of the image's content beside the position.
    weights["image_encoder.neck.3.weight"].mul_(0.25)
    # Keys projected like queries, sharply: what has a similar position has a high score.
    for name, tensor in weights.items():
        if name.endswith("q_proj.weight") and "self_attn" not in name:
            tensor.mul_(2)
            weights[name.replace("q_proj", "k_proj")].copy_(tensor)
    # Nearly the same kernel for the four pixels that a transposed convolution makes of one: smooth logits.
    for layer in (0, 3):
        kernel = weights[f"mask_decoder.output_upscaling.{layer}.weight"]
        kernel.copy_(1.8 * kernel.mean(dim=(2, 3), keepdim=True) + 0.1 * kernel)


def _spread(sam: Sam, weights: dict[str, torch.Tensor], images: list[np.ndarray]) -> None:
    """Sets scale and offset of the last layers so that each of the three masks has the spread wanted.

    Mask logits: a standard deviation of 2 (rounding errors grow with it), and 3, 7 and 20 % of the pixels above 0.
    Predicted IoU: 0.6 +- 0.25. Figures are rounded, so that another machine's rounding makes the same weights.
    """
    # Channel 0 of the upscaled embedding becomes a constant, so that its factor is an offset of the logits.
    weights["mask_decoder.output_upscaling.3.weight"][:, 0] = 0
    weights["mask_decoder.output_upscaling.3.bias"][0] = 3
    constant = torch.nn.functional.gelu(torch.tensor(3.0)).item()
    heads = [f"mask_decoder.output_hypernetworks_mlps.{token}.layers.2" for token in (1, 2, 3)]
    for head in heads:
        weights[f"{head}.weight"][0] = 0
        weights[f"{head}.bias"][0] = 0

    outputs = capture_outputs(sam)
    for pixels in images:
        SamAutomaticMaskGenerator(sam, points_per_side=8, output_mode="coco_rle").generate(pixels)
    logits = np.concatenate([batch for crop in outputs["low_res_logits"] for batch in crop])
    predicted_iou = np.concatenate([batch for crop in outputs["iou_predictions"] for batch in crop])

    iou_head = "mask_decoder.iou_prediction_head.layers.2"
    for mask, (head, quantile) in enumerate(zip(heads, (0.97, 0.93, 0.8), strict=True)):
        scale = round(2 / float(logits[:, mask].std()), 2)
        weights[f"{head}.weight"].mul_(scale)
        weights[f"{head}.bias"].mul_(scale)
        weights[f"{head}.bias"][0] = -round(scale * float(np.quantile(logits[:, mask], quantile)) / constant, 2)

        token = 1 + mask
        scale = round(0.25 / float(predicted_iou[:, mask].std()), 2)
        weights[f"{iou_head}.weight"][token].mul_(scale)
        bias = scale * float(weights[f"{iou_head}.bias"][token] - predicted_iou[:, mask].mean())
        weights[f"{iou_head}.bias"][token] = round(0.6 + bias, 2)


def _soften(weights: dict[str, torch.Tensor]) -> None:
    """Makes the mask network's first LayerNorm as well-behaved as SAM's, which has four channels.

    Of two channels it leaves nothing but the sign of their difference, a step on which rounding becomes 5e-3 in the
    logits, unless the difference is as small as the square root of its epsilon, 1e-3.
    """
    for name in ("weight", "bias"):
        weights[f"prompt_encoder.mask_downscaling.0.{name}"].mul_(3e-4)


@torch.no_grad()
def spread_single(sam: Sam) -> None:
    """Sets the last layer of mask 0 so that most of its masks have an outline, whatever the prompt. No other changes.

    The upscaled embedding's channel 0 is a constant, so its factor is the logits' offset. Of the other channels, the
    directions along which their mean over an image lies stay out of the logits: their mean would differ from prompt to
    prompt by more than they differ within one. The logits' standard deviation within an image is 2 on average.
    """
    weights, head = sam.state_dict(), "mask_decoder.output_hypernetworks_mlps.0.layers.2"
    upscaled, _ = _prompted_outputs(sam)
    means = upscaled[:, 1:].mean(axis=(2, 3))
    along = torch.tensor(np.linalg.svd(means)[2][:2], dtype=torch.float32)
    for tensor in (weights[f"{head}.weight"], weights[f"{head}.bias"]):
        tensor[0] = 0
        tensor[1:] -= along.T @ (along @ tensor[1:])
    _, logits = _prompted_outputs(sam)
    scale = round(2 / float(logits.std(axis=(1, 2)).mean()), 2)
    weights[f"{head}.weight"].mul_(scale)
    weights[f"{head}.bias"].mul_(scale)
    weights[f"{head}.bias"][0] = -round(scale * float(np.median(logits)) / float(upscaled[0, 0, 0, 0]), 2)


def _prompted_outputs(sam: Sam) -> tuple[np.ndarray, np.ndarray]:
    """For prompts of all kinds: the upscaled embeddings (P, channels, low, low) and mask 0's logits (P, low, low)."""
    upscaled: list[np.ndarray] = []
    hook = sam.mask_decoder.output_upscaling.register_forward_hook(lambda *call: upscaled.append(call[2].numpy()))
    logits, predictor = [], SamPredictor(sam)
    for width, height in PROMPTED_IMAGES_WH:
        predictor.set_image(make_image(width, height))
        rng = np.random.default_rng([width, height])
        for prompt in [make_prompt(kind, width, height, rng) for kind in KINDS for _ in range(PROMPTS_OF_A_KIND)]:
            ((_, _, _, low),) = ask(predictor, prompt, {"mask": "single", "box_of_mask": False})
            logits.append(low)
    hook.remove()
    return np.concatenate(upscaled), np.stack(logits)


if __name__ == "__main__":
    main()
