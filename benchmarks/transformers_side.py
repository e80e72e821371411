"""A third side of a comparison: Hugging Face's mask-generation pipeline, on the weights of the torch reference.

Its SamModel is the reference's network with other names. The images are resized by its Pillow processor, which is what
it takes where torchvision is missing, and which resizes as the reference does. What differs from the reference:

- every mask is upsampled and scored for stability, also those that the predicted IoU has already ruled out;
- a stability of exactly stability_score_thresh is dropped;
- the result holds uncompressed RLE, and beside it every mask decoded again, in Python, as an array of the image's size;
- it does not say which prompt made a mask, nor its stability.
"""

from __future__ import annotations

import gc
import re
import time
from collections import defaultdict
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers import MaskGenerationPipeline, SamConfig, SamModel
from transformers.models.sam import image_processing_pil_sam as processing
from transformers.utils.import_utils import BACKENDS_MAPPING

from benchmarks.models import Answers
from benchmarks.reference import STAND_INS, Sam, importable_torchvision
from benchmarks.sides import Function, Run, answering, timed_stages
from maskbeam.transforms.masks import rle
from maskbeam.transforms.masks.amg import AmgConfig
from maskbeam.transforms.records import Mask, Prompt

NETWORK_ROUNDING = 1e-4  # between the two networks, as a share of the largest value (or of 1, if that is larger)

# From the reference's names to SamModel's, as in transformers' own convert_sam_to_hf.py. The MLPs are in _rename.
_NAMES = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.blocks\.", ".layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.neck\.0\.", ".neck.conv1."),
    (r"\.neck\.1\.", ".neck.layer_norm1."),
    (r"\.neck\.2\.", ".neck.conv2."),
    (r"\.neck\.3\.", ".neck.layer_norm2."),
    (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".shared_embedding.positional_embedding"),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
)


def build_sam_model(sam: Sam) -> SamModel:
    """transformers' model with the architecture and the weights of the reference's.

    Raises:
      RuntimeError: SamModel has no place for a weight, or another shape for it.
      ValueError: the image encoder is not SAM's ViT.
    """
    encoder, prompt_encoder, decoder = sam.image_encoder, sam.prompt_encoder, sam.mask_decoder
    if not hasattr(encoder, "patch_embed"):
        raise ValueError("transformers' SamModel has SAM's ViT alone: leave out the side 'transformers' for this model")
    block, transformer = encoder.blocks[0], decoder.transformer
    frame = {"image_size": encoder.img_size, "patch_size": encoder.patch_embed.proj.kernel_size[0]}
    config = SamConfig(
        vision_config={
            **frame,
            "hidden_size": encoder.patch_embed.proj.out_channels,
            "output_channels": encoder.neck[0].out_channels,
            "num_hidden_layers": len(encoder.blocks),
            "num_attention_heads": block.attn.num_heads,
            "qkv_bias": block.attn.qkv.bias is not None,
            "use_abs_pos": encoder.pos_embed is not None,
            "use_rel_pos": block.attn.use_rel_pos,
            "window_size": max(block.window_size for block in encoder.blocks),
            "global_attn_indexes": [index for index, block in enumerate(encoder.blocks) if block.window_size == 0],
            "num_pos_feats": prompt_encoder.embed_dim // 2,
            "mlp_dim": block.mlp.lin1.out_features,
        },
        prompt_encoder_config={
            **frame,
            "hidden_size": prompt_encoder.embed_dim,
            "mask_input_channels": prompt_encoder.mask_downscaling[3].out_channels,
        },
        mask_decoder_config={
            "hidden_size": decoder.transformer_dim,
            "mlp_dim": transformer.layers[0].mlp.lin1.out_features,
            "num_hidden_layers": transformer.depth,
            "num_attention_heads": transformer.num_heads,
            "num_multimask_outputs": decoder.num_multimask_outputs,
            "iou_head_depth": decoder.iou_prediction_head.num_layers,
            "iou_head_hidden_dim": decoder.iou_prediction_head.layers[0].out_features,
            "layer_norm_eps": transformer.layers[0].norm1.eps,  # 1e-5; SamConfig's own default is 1e-6
        },
    )
    model = SamModel(config)
    weights = sam.state_dict()
    renamed = {_rename(name, weights): tensor for name, tensor in weights.items()}
    shared = renamed["prompt_encoder.shared_embedding.positional_embedding"]
    model.load_state_dict({**renamed, "shared_image_embedding.positional_embedding": shared})
    return model.eval()


def _rename(name: str, weights: dict[str, torch.Tensor]) -> str:
    """SamModel's name for a weight of the reference.

    Its MLPs call the first layer proj_in and the last proj_out, and count those between from 0.
    """
    mlp = re.fullmatch(r"(.*(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)layers\.(\d+)\.(\w+)", name)
    if mlp:
        prefix, index, kind = mlp[1], int(mlp[2]), mlp[3]
        is_last = f"{prefix}layers.{index + 1}.{kind}" not in weights
        return prefix + ("proj_in" if index == 0 else "proj_out" if is_last else f"layers.{index - 1}") + f".{kind}"
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


@torch.no_grad()
def check_network(sam: Sam, model: SamModel) -> float:
    """Runs both networks on one random frame with four points.

    Returns:
      the largest difference of embedding, low-resolution logits and predicted IoU, as a share of the largest value of
      each, or of 1 if that is larger.

    Raises:
      RuntimeError: it is above NETWORK_ROUNDING: they are not the same network.
    """
    size, device = sam.image_encoder.img_size, sam.device
    generator = torch.Generator().manual_seed(0)
    frame = torch.randn(1, 3, size, size, generator=generator).to(device)
    points = (size * torch.rand(4, 1, 2, generator=generator)).to(device)
    labels = torch.ones(4, 1, device=device)

    embedding = sam.image_encoder(frame)
    sparse, dense = sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)
    expected = (embedding, *sam.mask_decoder(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense, True))
    embeddings = model.get_image_embeddings(frame)
    output = model(image_embeddings=embeddings, input_points=points[None], input_labels=labels[None])
    actual = embeddings, output.pred_masks[0], output.iou_scores[0]

    difference = max(
        float((one - other).abs().max() / one.abs().max().clamp(min=1))
        for one, other in zip(expected, actual, strict=True)
    )
    if difference > NETWORK_ROUNDING:
        raise RuntimeError(
            f"transformers' SamModel is not the reference's network: on one frame they differ by {difference:.1e}, "
            f"expected at most {NETWORK_ROUNDING}. Its masks would be those of another model."
        )
    return difference


class HuggingFace:
    """transformers.MaskGenerationPipeline."""

    name = "transformers"

    def __init__(self, model: SamModel, config: AmgConfig, synthetic: bool, load: float) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(self.device)
        self.config = config
        self.synthetic = synthetic
        self.load = load
        self.frame_size = model.config.vision_config.image_size
        processor = processing.SamImageProcessorPil(
            size={"longest_edge": self.frame_size}, pad_size={"height": self.frame_size, "width": self.frame_size}
        )
        self._pipeline = MaskGenerationPipeline(model=self.model, image_processor=processor, device=self.device)

    def answers(self, size_hw: tuple[int, int]) -> Answers | None:
        """As Ours.answers."""
        low_size = 4 * self.frame_size // self.model.config.vision_config.patch_size
        return Answers(size_hw, self.frame_size, low_size, self.config) if self.synthetic else None

    def run(self, pixels: np.ndarray, answers: Answers | None, config: AmgConfig | None = None) -> Run:
        """Labels one image."""
        config = config or self.config
        image = Image.fromarray(pixels)
        stages: defaultdict[str, float] = defaultdict(float)
        network_iou: list[np.ndarray] = []
        gc.collect()
        with (
            importable_torchvision(),
            mock.patch.dict(BACKENDS_MAPPING, {"torchvision": (lambda: True, "")}),  # which asks for the package
            timed_stages(self._functions(), stages, self._wait),
            answering(self.model.mask_decoder, answers, stages, self._wait, network_iou),
        ):
            start = time.perf_counter()
            output = self._pipeline(
                image,
                points_per_crop=config.points_per_side,
                points_per_batch=config.points_per_batch,
                crops_n_layers=0,
                pred_iou_thresh=config.pred_iou_thresh,
                stability_score_thresh=config.stability_score_thresh,
                mask_threshold=0.0,
                crops_nms_thresh=config.box_nms_thresh,
                output_rle_mask=True,
            )
            self._wait()
            seconds = time.perf_counter() - start
        stages["other"] = seconds - sum(stages.values())
        excluded = {} if answers is None else {"synthetic answers": stages.pop("synthetic answers")}
        if "torchvision" in STAND_INS:
            excluded["stand-in NMS"] = stages.pop("NMS", 0.0)
        return Run(
            seconds - sum(excluded.values()),
            dict(stages),
            excluded,
            _read_masks(output),
            np.concatenate(network_iou) if network_iou else None,
        )

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _functions(self) -> list[Function]:
        from torchvision.ops import boxes  # the stand-in where it is missing

        return [
            ("resize", self._pipeline.image_processor, "preprocess"),
            ("image encoder", self.model, "get_image_embeddings"),
            ("prompt encoder", self.model.prompt_encoder, "forward"),
            ("mask decoder", self.model.mask_decoder, "forward"),
            ("upsampling", self._pipeline.image_processor, "post_process_masks"),
            ("stability", processing, "_compute_stability_score"),
            ("boxes", processing, "_batched_mask_to_box"),
            ("RLE", processing, "_mask_to_rle"),
            ("RLE decoded again", processing, "_rle_to_mask"),
            ("NMS", boxes, "batched_nms"),
        ]


def _read_masks(output: dict[str, Any]) -> tuple[Mask, ...]:
    """The pipeline's result. What it does not tell, stability and prompt, is NaN."""
    masks = []
    for segmentation, predicted_iou in zip(output["rle_mask"], output["scores"].tolist(), strict=True):
        height, width = segmentation["size"]
        counts = rle.lengths_to_counts(segmentation["counts"], (height, width))
        area, bbox_xywh = rle.area_and_bbox_xywh(counts, (height, width))
        masks.append(
            Mask(
                size_hw=(height, width),
                counts=counts,
                bbox_xywh=bbox_xywh,
                area=area,
                predicted_iou=predicted_iou,
                stability_score=float("nan"),
                prompt=Prompt(((float("nan"), float("nan")),)),
                crop_box_xywh=(0.0, 0.0, float(width), float(height)),
            )
        )
    return tuple(masks)
