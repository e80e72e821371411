"""The networks written out over KerasHub's weights, against KerasHub's own layers and the reference's numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keras import ops
from PIL import Image

from maskbeam.transforms.masks.frame import resized_hw, to_frame
from maskbeam.transforms.models.sam.encoder import encode_image, read_encoder
from maskbeam.transforms.models.sam.model import Sam, load_sam
from tests.transforms.models.conftest import PRESET

pytestmark = pytest.mark.model

FRAME_SIZE = 128


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.asarray(Image.open(PRESET.parent / "blobs_160x120.png").convert("RGB"))


@pytest.fixture(scope="module")
def embedding(backbone: Any, pixels: np.ndarray) -> np.ndarray:
    """KerasHub's own image embedding: its input is [0, 1], padded with the mean so that padding is normalised to 0."""
    height, width = resized_hw(pixels.shape[:2], FRAME_SIZE)
    image = np.broadcast_to(np.array([0.485, 0.456, 0.406], np.float32), (1, FRAME_SIZE, FRAME_SIZE, 3)).copy()
    image[0, :height, :width] = to_frame(pixels, FRAME_SIZE)[:height, :width] / np.float32(255)
    return np.asarray(ops.convert_to_numpy(backbone.image_encoder(image)))


def embed(sam: Sam, pixels: np.ndarray) -> Any:
    return sam.embed(to_frame(pixels, FRAME_SIZE), resized_hw(pixels.shape[:2], FRAME_SIZE))


def encode(backbone: Any, frame: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Our image embedding."""
    shape, weights = read_encoder(backbone.image_encoder)
    return np.asarray(ops.convert_to_numpy(encode_image(weights, shape, frame, np.array(size_hw), "float32")))


def points(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, FRAME_SIZE * 3 / 4, (count, 2))


def test_encoder_equals_keras_hub(backbone: Any, pixels: np.ndarray, embedding: np.ndarray) -> None:
    actual = encode(backbone, to_frame(pixels, FRAME_SIZE), resized_hw(pixels.shape[:2], FRAME_SIZE))
    np.testing.assert_allclose(actual, embedding[0], atol=3e-5)


def test_decoder_equals_keras_hub(sam: Sam, backbone: Any, pixels: np.ndarray, embedding: np.ndarray) -> None:
    prompts = points(5)
    sparse = backbone.prompt_encoder(
        points=np.concatenate([prompts[:, None], np.zeros((5, 1, 2))], axis=1).astype(np.float32),
        labels=np.tile(np.array([[1, -1]], np.float32), (5, 1)),
    )
    expected = backbone.mask_decoder(ops.convert_to_tensor(embedding), **sparse)
    scored = sam.score(embed(sam, pixels), prompts, points_per_batch=8)
    logits = sam.low_res_logits(scored, np.arange(5))
    np.testing.assert_allclose(scored.predicted_iou(), ops.convert_to_numpy(expected["iou_pred"])[:, 1:], atol=3e-5)
    np.testing.assert_allclose(logits, ops.convert_to_numpy(expected["masks"])[:, 1:], atol=3e-4)


def test_encoder_equals_the_reference(backbone: Any) -> None:
    image = np.asarray(Image.open(PRESET.parent / "blobs_128x128.png").convert("RGB"))
    with np.load(PRESET.parent / "blobs_128x128.logits.npz") as stored:
        expected = stored["image_embedding_0"]
    actual = encode(backbone, to_frame(image, FRAME_SIZE), (FRAME_SIZE, FRAME_SIZE))
    np.testing.assert_allclose(actual, expected.reshape(actual.shape), atol=3e-5)


def test_padding_of_a_batch_changes_nothing(sam: Sam, pixels: np.ndarray) -> None:
    context, prompts = embed(sam, pixels), points(3)
    alone = sam.score(context, prompts, points_per_batch=3).predicted_iou()
    padded = sam.score(context, prompts, points_per_batch=8).predicted_iou()
    assert padded.shape == (3, 3)
    np.testing.assert_allclose(padded, alone, atol=1e-5)


def test_logits_of_some_prompts_are_those_rows_of_all(sam: Sam, pixels: np.ndarray) -> None:
    scored = sam.score(embed(sam, pixels), points(20), points_per_batch=20)
    every = sam.low_res_logits(scored, np.arange(20))
    some = sam.low_res_logits(scored, np.array([19, 3, 7]))
    np.testing.assert_allclose(some, every[[19, 3, 7]], atol=1e-5)


def test_threads_may_use_it_at_once(sam: Sam, pixels: np.ndarray) -> None:
    context = embed(sam, pixels)
    prompts = [points(9) + shift for shift in range(12)]

    def logits(each: np.ndarray) -> np.ndarray:
        return sam.low_res_logits(sam.score(context, each, 16), np.arange(9))

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(logits, prompts))
    for each, expected in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(logits(each), expected)


def test_repeated_calls_are_bit_identical(sam: Sam, pixels: np.ndarray) -> None:
    first, second = (
        sam.low_res_logits(sam.score(embed(sam, pixels), points(9), 16), np.arange(9)).tobytes() for _ in range(2)
    )
    assert first == second


def test_content_of_the_padding_does_not_matter(backbone: Any, pixels: np.ndarray) -> None:
    height, width = resized_hw(pixels.shape[:2], FRAME_SIZE)
    frame = to_frame(pixels, FRAME_SIZE)
    dirty = np.full_like(frame, 200)
    dirty[:height, :width] = frame[:height, :width]
    clean, changed = (encode(backbone, each, (height, width)) for each in (frame, dirty))
    np.testing.assert_array_equal(clean, changed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_near(dtype: str, sam: Sam, pixels: np.ndarray) -> None:
    low = load_sam(str(PRESET), dtype)
    expected = sam.score(embed(sam, pixels), points(8), 8).predicted_iou()
    actual = low.score(embed(low, pixels), points(8), 8).predicted_iou()
    assert actual.dtype == np.float32
    assert 0 < np.abs(actual - expected).max() < 0.1


def test_unknown_model_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"there is no model no/such/preset.*sam_tiny"):
        load_sam("no/such/preset")


def test_unknown_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got int8"):
        load_sam(str(PRESET), "int8")


@pytest.mark.processes
def test_jax_programs_are_kept_for_the_next_process(tmp_path: Path) -> None:
    program = f"""
import numpy as np
from maskbeam.transforms.models.sam.model import load_sam
load_sam({str(PRESET)!r}).embed(np.zeros((128, 128, 3), np.uint8), (128, 128))
"""
    environment = {**os.environ, "KERAS_BACKEND": "jax", "HOME": str(tmp_path)}
    cache = tmp_path / ".cache" / "maskbeam" / "jax"
    written = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
        written.append({path.name for path in cache.glob("*-cache")})
    assert written[0]
    assert written[1] == written[0]
