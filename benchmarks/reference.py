"""The torch reference, SamAutomaticMaskGenerator, on the weights of a KerasHub SAM. Never imported by the product.

For benchmarks and for tests/golden/make_golden.py. Needs the bench extra: torch and segment-anything-py 1.0.1, which
is facebookresearch/segment-anything at commit dca509f. That package imports torchvision and OpenCV for five functions;
where one of the two is missing (torchvision has no CPU build for every torch), stand-ins with the same rules take its
place, and STAND_INS names it.

Both networks normalise pixels by the same mean and deviation: torch in Sam.preprocess on [0, 255], before it pads with
zeros; KerasHub inside the image encoder on [0, 1], so that its input must be padded with the mean. Where the encoder is
a convolutional network instead of SAM's ViT, its twin is in conv_encoder.py.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras
import keras_hub
import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import nn

from benchmarks.conv_encoder import build_conv_encoder, conv_encoder_layers


def box_area(boxes: torch.Tensor) -> torch.Tensor:
    """(N, 4) XYXY -> (N,). Stands in for torchvision.ops.boxes.box_area."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy NMS by the rules of torchvision/csrc/ops/cpu/nms_kernel.cpp. Stands in for torchvision.ops.boxes.nms.

    Ties in input order. A box is suppressed only if its IoU, in the boxes' own precision, is greater than the
    threshold in double; NaN (two boxes of zero area) suppresses nothing.

    Args:
      boxes: (N, 4) XYXY float32.
      scores: (N,).

    Returns:
      (K,) int64 indices of the kept boxes, best first.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    areas = box_area(boxes)
    keep = []
    while order.numel():
        best, rest = order[0], order[1:]
        keep.append(int(best))
        corner_0 = torch.maximum(boxes[best, :2], boxes[rest, :2])
        corner_1 = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        intersection = (corner_1 - corner_0).clamp(min=0).prod(dim=1)
        iou = intersection / (areas[best] + areas[rest] - intersection)
        order = rest[~(iou.double() > iou_threshold)]
    return torch.tensor(keep, dtype=torch.int64)


def batched_nms(boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """NMS within each category. Stands in for torchvision.ops.boxes.batched_nms.

    Categories are moved apart as torchvision does for up to 1000 boxes. For more it sorts the kept boxes by score once
    again, and that sort is not stable: in a crop NMS of more than 1000 boxes the order of ties, all masks of crops of
    one area, is torch's affair. Here it is always the input order.
    """
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    offsets = idxs.to(boxes) * (boxes.max() + 1)
    return nms(boxes + offsets[:, None], scores, iou_threshold)


def to_pil_image(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) uint8. Stands in for torchvision.transforms.functional.to_pil_image."""
    return Image.fromarray(pixels)


def resize(image: Image.Image, size_hw: tuple[int, int]) -> Image.Image:
    """Bilinear and antialiased, by Pillow. Stands in for torchvision.transforms.functional.resize."""
    return image.resize(size_hw[::-1], Image.Resampling.BILINEAR)


def connected_components_with_stats(mask: np.ndarray, connectivity: int) -> tuple[int, np.ndarray, np.ndarray, None]:
    """8-connected regions. Stands in for cv2.connectedComponentsWithStats, as far as the reference uses it.

    Regions are numbered as OpenCV does (checked against 5.0): by their first block of 2x2 pixels, row by row. It
    matters where the reference keeps the first of several largest islands.

    Args:
      mask: (H, W) uint8, 0 = background.
      connectivity: must be 8.

    Returns:
      number of regions with the background, their numbers (H, W) int32, stats (regions, 5) of which only the last
      column, the area, is set, and nothing in place of the centroids.
    """
    if connectivity != 8:
        raise ValueError(f"connectivity must be 8, got {connectivity}")
    labels, count = ndimage.label(mask, np.ones((3, 3), int))
    height, width = mask.shape
    blocks = np.arange(height)[:, None] // 2 * width + np.arange(width) // 2
    first_block = ndimage.minimum(blocks, labels, np.arange(1, count + 1))
    number = np.zeros(count + 1, np.int32)
    number[1 + np.argsort(first_block)] = np.arange(1, count + 1)
    regions = number[labels]
    stats = np.zeros((count + 1, 5), np.int32)
    stats[:, -1] = np.bincount(regions.ravel(), minlength=count + 1)
    return count + 1, regions, stats, None


def _stand_in_where_missing(package: str, modules: dict[str, dict[str, Callable[..., Any]]]) -> bool:
    """Puts modules of the given functions where `import` finds them, unless the package can be imported itself."""
    try:
        importlib.import_module(package)
        return False
    except ModuleNotFoundError:
        sys.modules.update(_make_modules(modules))
        return True


def _make_modules(modules: dict[str, dict[str, Callable[..., Any]]]) -> dict[str, types.ModuleType]:
    """Modules with the given functions, by name."""
    made = {name: types.ModuleType(name) for name in modules}
    for name, functions in modules.items():
        made[name].__dict__.update(functions)
    return made


_TORCHVISION: dict[str, dict[str, Callable[..., Any]]] = {
    "torchvision": {},
    "torchvision.ops": {},
    "torchvision.ops.boxes": {"box_area": box_area, "nms": nms, "batched_nms": batched_nms},
    "torchvision.transforms": {},
    "torchvision.transforms.functional": {"to_pil_image": to_pil_image, "resize": resize},
}
_CV2: dict[str, dict[str, Callable[..., Any]]] = {
    "cv2": {"connectedComponentsWithStats": connected_components_with_stats}
}

# The packages that stand-ins are in use for: a subset of ("torchvision", "cv2").
STAND_INS = tuple(
    package
    for package, modules in (("torchvision", _TORCHVISION), ("cv2", _CV2))
    if _stand_in_where_missing(package, modules)
)

# segment_anything binds torchvision's functions here, so that its stand-in need not stay where others would find it
# and take it for the real one. cv2 is imported only when it is used.
from segment_anything import SamAutomaticMaskGenerator  # noqa: E402
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer  # noqa: E402
from segment_anything.utils.amg import MaskData  # noqa: E402

if "torchvision" in STAND_INS:
    for _name in _TORCHVISION:
        del sys.modules[_name]


@contextmanager
def importable_torchvision() -> Iterator[None]:
    """For code that imports torchvision only when it is called: the stand-ins are found while the context is open."""
    stand_ins = _make_modules(_TORCHVISION) if "torchvision" in STAND_INS else {}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


# One row of the weight table: name in torch's state_dict, variable in Keras, axes of a torch kernel in Keras's order.
# Everything but kernels is laid out alike and has none.
Pair = tuple[str, keras.Variable, tuple[int, ...] | None]

# Dense (out, in) -> (in, out); convolution (out, in, h, w) -> (h, w, in, out); transposed convolution (in, out, h, w)
# -> (h, w, out, in).
_KERNEL_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}
_DEPTHWISE_AXES = (2, 3, 0, 1)  # (channels, 1, h, w) -> (h, w, channels, 1)


def torch_state_dict(backbone: keras_hub.models.SAMBackbone) -> dict[str, torch.Tensor]:
    """The backbone's weights as the reference's state_dict, float32."""
    state_dict = {}
    for name, variable, axes in _weight_table(backbone):
        array = keras.ops.convert_to_numpy(variable).astype(np.float32)
        if axes:
            array = array.transpose(np.argsort(axes))
        state_dict[name] = torch.from_numpy(np.ascontiguousarray(array))
    return state_dict


def load_torch_weights(backbone: keras_hub.models.SAMBackbone, state_dict: dict[str, torch.Tensor]) -> None:
    """Sets the backbone's weights from the reference's state_dict (such as an official checkpoint).

    Raises:
      ValueError: a tensor has no place in the backbone, a weight has no tensor, or their shapes differ.
    """
    table = list(_weight_table(backbone))
    names = {name for name, _, _ in table}
    if names != set(state_dict):
        raise ValueError(
            f"the state_dict does not fit the backbone: it lacks {sorted(names - set(state_dict))} "
            f"and has {sorted(set(state_dict) - names)} too many"
        )
    for name, variable, axes in table:
        array = state_dict[name].detach().float().numpy()
        if axes:
            array = array.transpose(axes)
        if array.shape != tuple(variable.shape):
            raise ValueError(f"{name} must fit {variable.path} of shape {variable.shape}, got {array.shape}")
        variable.assign(np.ascontiguousarray(array))


def _weight_table(backbone: keras_hub.models.SAMBackbone) -> list[Pair]:
    """All weights of a backbone, each exactly once."""
    table = [
        *_image_encoder_weights("image_encoder", backbone.image_encoder),
        *_prompt_encoder_weights("prompt_encoder", backbone.prompt_encoder),
        *_mask_decoder_weights("mask_decoder", backbone.mask_decoder),
    ]
    parts = (backbone.image_encoder, backbone.prompt_encoder, backbone.mask_decoder)
    weights = [weight for part in parts for weight in part.weights]
    if sorted(id(variable) for _, variable, _ in table) != sorted(id(weight) for weight in weights):
        raise ValueError(f"the weight table has {len(table)} rows, which are not the backbone's {len(weights)} weights")
    return table


def _image_encoder_weights(name: str, encoder: keras.Model) -> Iterator[Pair]:
    if not isinstance(encoder, keras_hub.models.ViTDetBackbone):
        for torch_name, layer in conv_encoder_layers(encoder):
            is_norm = isinstance(layer, keras.layers.LayerNormalization)
            yield from (_norm if is_norm else _affine)(f"{name}.{torch_name}", layer)
        return
    blocks = [layer for layer in encoder.layers if type(layer).__name__ == "WindowedTransformerEncoder"]
    (patch_embed,) = (layer for layer in encoder.layers if type(layer).__name__ == "ViTDetPatchingAndEmbedding")
    yield from _affine(f"{name}.patch_embed.proj", patch_embed.projection)
    for layer in encoder.layers:
        if type(layer).__name__ == "AddPositionalEmbedding":  # none where use_abs_pos is off
            yield f"{name}.pos_embed", layer.pos_embed, None
    for index, block in enumerate(blocks):
        prefix, attention = f"{name}.blocks.{index}", block.attention
        yield from _norm(f"{prefix}.norm1", block.layer_norm1)
        if attention.use_rel_pos:
            yield f"{prefix}.attn.rel_pos_h", attention.add_decomposed_relative_pe.rel_pos_h, None
            yield f"{prefix}.attn.rel_pos_w", attention.add_decomposed_relative_pe.rel_pos_w, None
        yield from _affine(f"{prefix}.attn.qkv", attention.qkv)
        yield from _affine(f"{prefix}.attn.proj", attention.projection)
        yield from _norm(f"{prefix}.norm2", block.layer_norm2)
        yield from _dense_stack([f"{prefix}.mlp.lin1", f"{prefix}.mlp.lin2"], block.mlp_block.dense_net)
    yield from _sequence(f"{name}.neck", encoder.neck)


def _prompt_encoder_weights(name: str, encoder: keras_hub.layers.SAMPromptEncoder) -> Iterator[Pair]:
    gaussian_matrix = encoder.positional_embedding_layer.positional_encoding_gaussian_matrix
    yield f"{name}.pe_layer.positional_encoding_gaussian_matrix", gaussian_matrix, None
    # torch numbers the labels: 0 background, 1 foreground, 2 and 3 the corners of a box
    yield from _embedding(f"{name}.point_embeddings.0", encoder.background_point_embed)
    yield from _embedding(f"{name}.point_embeddings.1", encoder.foreground_point_embed)
    yield from _embedding(f"{name}.point_embeddings.2", encoder.top_left_corner_embed)
    yield from _embedding(f"{name}.point_embeddings.3", encoder.bottom_right_corner_embed)
    yield from _embedding(f"{name}.not_a_point_embed", encoder.not_a_point_embed)
    yield from _embedding(f"{name}.no_mask_embed", encoder.no_mask_embed)
    yield from _sequence(f"{name}.mask_downscaling", encoder.mask_downscaler)


def _mask_decoder_weights(name: str, decoder: keras_hub.layers.SAMMaskDecoder) -> Iterator[Pair]:
    for index, layer in enumerate(decoder.transformer.layers):
        prefix = f"{name}.transformer.layers.{index}"
        yield from _attention(f"{prefix}.self_attn", layer.self_attention)
        yield from _norm(f"{prefix}.norm1", layer.layer_norm1)
        yield from _attention(f"{prefix}.cross_attn_token_to_image", layer.cross_attention_token_to_image)
        yield from _norm(f"{prefix}.norm2", layer.layer_norm2)
        yield from _dense_stack([f"{prefix}.mlp.lin1", f"{prefix}.mlp.lin2"], layer.mlp_block.mlp_block)
        yield from _norm(f"{prefix}.norm3", layer.layer_norm3)
        yield from _attention(f"{prefix}.cross_attn_image_to_token", layer.cross_attention_image_to_token)
        yield from _norm(f"{prefix}.norm4", layer.layer_norm4)
    final_attention = decoder.transformer.final_attention_token_to_image
    yield from _attention(f"{name}.transformer.final_attn_token_to_image", final_attention)
    yield from _norm(f"{name}.transformer.norm_final_attn", decoder.transformer.final_layer_norm)
    yield from _embedding(f"{name}.iou_token", decoder.iou_token)
    yield from _embedding(f"{name}.mask_tokens", decoder.mask_tokens)
    yield from _sequence(f"{name}.output_upscaling", decoder.output_upscaling)
    for index, mlp in enumerate(decoder.output_hypernetworks_mlps):
        yield from _mlp(f"{name}.output_hypernetworks_mlps.{index}", mlp)
    yield from _mlp(f"{name}.iou_prediction_head", decoder.iou_prediction_head)


def _affine(name: str, layer: keras.layers.Layer) -> Iterator[Pair]:
    """A dense or convolution layer."""
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    yield f"{name}.weight", layer.kernel, _DEPTHWISE_AXES if depthwise else _KERNEL_AXES[layer.kernel.ndim]
    if layer.use_bias:
        yield f"{name}.bias", layer.bias, None


def _norm(name: str, layer: keras.layers.LayerNormalization) -> Iterator[Pair]:
    yield f"{name}.weight", layer.gamma, None
    yield f"{name}.bias", layer.beta, None


def _embedding(name: str, layer: keras.layers.Embedding) -> Iterator[Pair]:
    yield f"{name}.weight", layer.embeddings, None


def _attention(name: str, layer: keras.layers.Layer) -> Iterator[Pair]:
    yield from _affine(f"{name}.q_proj", layer.query_proj)
    yield from _affine(f"{name}.k_proj", layer.key_proj)
    yield from _affine(f"{name}.v_proj", layer.value_proj)
    yield from _affine(f"{name}.out_proj", layer.out_proj)


def _sequence(name: str, layers: keras.Sequential) -> Iterator[Pair]:
    """A Sequential whose layers torch numbers alike, activations counted."""
    for index, layer in enumerate(layers.layers):
        if isinstance(layer, keras.layers.LayerNormalization):
            yield from _norm(f"{name}.{index}", layer)
        elif layer.weights:
            yield from _affine(f"{name}.{index}", layer)


def _dense_stack(names: list[str], layers: keras.Sequential) -> Iterator[Pair]:
    """A Sequential of dense layers and activations, of which torch names only the dense ones."""
    dense = [layer for layer in layers.layers if layer.weights]
    for name, layer in zip(names, dense, strict=True):
        yield from _affine(name, layer)


def _mlp(name: str, layer: keras.layers.Layer) -> Iterator[Pair]:
    yield from _dense_stack([f"{name}.layers.{index}" for index in range(layer.num_layers)], layer.mlp_block)


def build_torch_sam(backbone: keras_hub.models.SAMBackbone) -> Sam:
    """The reference's model with the architecture and the weights of a KerasHub backbone."""
    prompt_encoder, decoder = backbone.prompt_encoder, backbone.mask_decoder
    image_encoder, *normalization = _build_image_encoder(backbone.image_encoder)
    sam = Sam(
        image_encoder,
        PromptEncoder(
            embed_dim=prompt_encoder.hidden_size,
            image_embedding_size=tuple(prompt_encoder.image_embedding_size),
            input_image_size=tuple(prompt_encoder.input_image_size),
            mask_in_chans=prompt_encoder.mask_in_channels,
        ),
        MaskDecoder(
            num_multimask_outputs=decoder.num_multimask_outputs,
            transformer_dim=decoder.embedding_dim,
            iou_head_depth=decoder.iou_head_depth,
            iou_head_hidden_dim=decoder.iou_head_hidden_dim,
            transformer=TwoWayTransformer(
                depth=decoder.num_layers,
                embedding_dim=decoder.hidden_size,
                mlp_dim=decoder.intermediate_dim,
                num_heads=decoder.num_heads,
            ),
        ),
        *normalization,
    )
    sam.load_state_dict(torch_state_dict(backbone))
    return sam.eval()


def _build_image_encoder(encoder: keras.Model) -> tuple[nn.Module, list[float], list[float]]:
    """The encoder, and the mean and the deviation of pixels from 0 to 255."""
    if not isinstance(encoder, keras_hub.models.ViTDetBackbone):
        return build_conv_encoder(encoder)
    vit = ImageEncoderViT(
        img_size=encoder.image_shape[0],
        patch_size=encoder.patch_size,
        embed_dim=encoder.hidden_size,
        depth=encoder.num_layers,
        num_heads=encoder.num_heads,
        mlp_ratio=encoder.intermediate_dim / encoder.hidden_size,
        out_chans=encoder.num_output_channels,
        qkv_bias=encoder.use_bias,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),  # as in build_sam.py; KerasHub has it built in
        use_abs_pos=encoder.use_abs_pos,
        use_rel_pos=encoder.use_rel_pos,
        window_size=encoder.window_size,
        global_attn_indexes=tuple(encoder.global_attention_layer_indices),
    )
    return vit, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # as in build_sam.py


def reference_generator(backbone: keras_hub.models.SAMBackbone, **settings: Any) -> SamAutomaticMaskGenerator:
    """The reference on a backbone's weights, with masks as COCO RLE; settings are its own arguments."""
    return SamAutomaticMaskGenerator(build_torch_sam(backbone), output_mode="coco_rle", **settings)


@torch.no_grad()
def randomize(sam: Sam, seed: int) -> None:
    """Random weights in which nothing is degenerate: no zero bias, no unit scale, no zero position embedding."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(sam.state_dict().items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if "gaussian_matrix" in name:
            tensor.copy_(noise)
        elif "rel_pos" in name:
            tensor.copy_(0.15 * noise)
        elif "pos_embed" in name:
            tensor.copy_(0.3 * noise)
        elif "point_embeddings" in name or name.endswith(("_embed.weight", "token.weight", "tokens.weight")):
            tensor.copy_(0.7 * noise)
        elif tensor.ndim == 1:
            tensor.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.2 * noise)
        elif "output_upscaling" in name:  # transposed: (in, out, h, w), each output has one tap
            tensor.copy_(noise / tensor.shape[0] ** 0.5)
        else:
            tensor.copy_(noise * (1.4 / tensor[0].numel()) ** 0.5)


@contextmanager
def count_dropped() -> Iterator[Counter[str]]:
    """Counts the candidates that each filter of the reference removes while the context is open.

    Keys are named as in maskbeam.transforms.records.Dropped; a filter that removes nothing has no key.
    """
    dropped: Counter[str] = Counter()
    original = MaskData.filter

    def counting_filter(data: MaskData, keep: torch.Tensor) -> None:
        stage = _stage(data)
        kept = int(keep.sum()) if keep.dtype == torch.bool else len(keep)
        dropped[stage] += len(data["points"]) - kept
        original(data, keep)

    MaskData.filter = counting_filter
    try:
        yield dropped
    finally:
        MaskData.filter = original
        for stage in [stage for stage, count in dropped.items() if not count]:
            del dropped[stage]


def _stage(data: MaskData) -> str:
    """Which of the reference's filters is at work: told by the fields that the data has by then."""
    fields = dict(data.items())
    if "stability_score" not in fields:
        return "predicted_iou"
    if "boxes" not in fields:
        return "stability"
    if "rles" not in fields:
        return "crop_edge"
    if "crop_boxes" not in fields:
        return "box_nms"
    return "crop_nms" if isinstance(fields["boxes"], torch.Tensor) else "small_region"
