"""Prompts of any kind through the written-out decoder, against KerasHub's own layers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from keras import ops

from maskbeam.transforms.models.backend import Programs
from maskbeam.transforms.models.sam.model import Sam, load_sam
from tests.transforms.models.conftest import PRESET

pytestmark = pytest.mark.model

FRAME_SIZE = 128
LOW_SIZE = 64
COUNT = 3  # prompts of each kind

# points, whether a box, whether a mask, sparse tokens. What has more than 16 has its image tokens written out.
KINDS = {
    "point": (1, False, False, 2),
    "3 points": (3, False, False, 4),
    "box": (0, True, False, 2),
    "box and 2 points": (2, True, False, 4),
    "box and 14 points": (14, True, False, 16),
    "mask and box": (0, True, True, 2),
    "mask, box and 2 points": (2, True, True, 4),
    "mask, box and 20 points": (20, True, True, 22),
}


@dataclass(frozen=True)
class Some:
    """Random prompts of one kind: arguments of score_prompts and of KerasHub's prompt encoder."""

    coords_xy: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None
    keras: dict[str, Any]

    def filled(self, sparse: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The arguments of score_prompts with absent tokens up to so many; where those are is of no account."""
        more = sparse - self.labels.shape[1]
        coords = np.concatenate([self.coords_xy, np.full((COUNT, more, 2), 77.0)], axis=1)
        return coords, np.concatenate([self.labels, np.full((COUNT, more), -2)], axis=1), self.masks


def some(kind: str) -> Some:
    num_points, has_box, has_mask, _ = KINDS[kind]
    rng = np.random.default_rng(num_points)
    points, labels = rng.uniform(0, FRAME_SIZE, (COUNT, num_points, 2)), rng.integers(0, 2, (COUNT, num_points))
    given: dict[str, Any] = {}
    if num_points and not has_box:  # the padding point, which KerasHub leaves to its user
        points = np.concatenate([points, np.zeros((COUNT, 1, 2))], axis=1)
        labels = np.concatenate([labels, np.full((COUNT, 1), -1)], axis=1)
    if num_points:
        given |= {"points": points.astype(np.float32), "labels": labels.astype(np.float32)}
    if has_box:
        corners = np.sort(rng.uniform(0, FRAME_SIZE, (COUNT, 2, 2)), axis=1)
        given["boxes"] = corners[:, None].astype(np.float32)
        points = np.concatenate([points, corners], axis=1)
        labels = np.concatenate([labels, np.tile([2, 3], (COUNT, 1))], axis=1)
    masks = None
    if has_mask:
        waves = np.sin(np.arange(LOW_SIZE) / rng.uniform(5, 15, (COUNT, 1)))
        masks = np.where(waves[:, :, None] * waves[:, None] > 0.2, 6.9, -6.9).astype(np.float32)
        given["masks"] = masks[:, None, :, :, None]
    return Some(points, labels, masks, given)


@pytest.fixture(scope="module")
def frame() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (FRAME_SIZE, FRAME_SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def context(sam: Sam, frame: np.ndarray) -> Any:
    return sam.embed(frame, (FRAME_SIZE, FRAME_SIZE))


def keras_hub_outputs(backbone: Any, frame: np.ndarray, given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mask logits (COUNT, 4, 64, 64) and predicted IoU (COUNT, 4)."""
    embedding = backbone.image_encoder(frame[None] / np.float32(255))
    encoded = backbone.prompt_encoder(**{name: ops.convert_to_tensor(value) for name, value in given.items()})
    outputs = backbone.mask_decoder(image_embeddings=embedding, **encoded)
    return np.asarray(ops.convert_to_numpy(outputs["masks"])), np.asarray(ops.convert_to_numpy(outputs["iou_pred"]))


def all_logits(sam: Sam, scored: Any, count: int = COUNT) -> np.ndarray:
    """(count, 4, 64, 64)"""
    logits = sam.mask_logits(scored, np.repeat(np.arange(count), 4), np.tile(np.arange(4), count))
    return logits.reshape(count, 4, *logits.shape[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_keras_hub(kind: str, sam: Sam, backbone: Any, context: Any, frame: np.ndarray) -> None:
    prompts = some(kind)
    logits, predicted_iou = keras_hub_outputs(backbone, frame, prompts.keras)
    scored = sam.score_prompts(context, *prompts.filled(KINDS[kind][3]), batch_size=8)
    np.testing.assert_allclose(scored.predicted_iou(), predicted_iou, atol=5e-5)
    np.testing.assert_allclose(all_logits(sam, scored), logits, atol=1e-3)


@pytest.mark.parametrize("kind", ["box", "mask, box and 20 points"])
def test_absent_tokens_change_nothing(kind: str, sam: Sam, context: Any) -> None:
    prompts, sparse = some(kind), KINDS[kind][3]
    exact = sam.score_prompts(context, *prompts.filled(sparse), batch_size=8)
    filled = sam.score_prompts(context, *prompts.filled(2 * sparse), batch_size=8)
    np.testing.assert_allclose(filled.predicted_iou(), exact.predicted_iou(), atol=5e-5)
    np.testing.assert_allclose(all_logits(sam, filled), all_logits(sam, exact), atol=1e-3)


def test_a_mask_alone_equals_keras_hub(sam: Sam, backbone: Any, context: Any, frame: np.ndarray) -> None:
    """It has no token of its own, and shares the program of boxes with masks."""
    masks = some("mask and box").masks
    assert masks is not None
    logits, predicted_iou = keras_hub_outputs(backbone, frame, {"masks": masks[:, None, :, :, None]})
    scored = sam.score_prompts(context, np.zeros((COUNT, 2, 2)), np.full((COUNT, 2), -2), masks, batch_size=8)
    np.testing.assert_allclose(scored.predicted_iou(), predicted_iou, atol=5e-5)
    np.testing.assert_allclose(all_logits(sam, scored), logits, atol=1e-3)


def test_the_padding_point_is_a_real_token(sam: Sam, context: Any) -> None:
    point = some("point")
    absent = np.where(point.labels == -1, -2, point.labels)
    with_padding = all_logits(sam, sam.score_prompts(context, point.coords_xy, point.labels, None, 8))
    without = all_logits(sam, sam.score_prompts(context, point.coords_xy, absent, None, 8))
    assert np.abs(with_padding - without).max() > 0.1


def test_a_foreground_point_is_what_the_grid_has(sam: Sam, context: Any) -> None:
    points = some("point")
    labels = np.where(points.labels == 0, 1, points.labels)
    scored = sam.score_prompts(context, points.coords_xy, labels, None, batch_size=8)
    grid = sam.score(context, points.coords_xy[:, 0], points_per_batch=8)
    np.testing.assert_allclose(scored.predicted_iou()[:, 1:], grid.predicted_iou(), atol=1e-5)
    expected = sam.low_res_logits(grid, np.arange(COUNT))
    np.testing.assert_allclose(all_logits(sam, scored)[:, 1:], expected, atol=3e-4)


@pytest.mark.parametrize("kind", ["box", "mask, box and 2 points"])
def test_nothing_depends_on_the_batch(kind: str, sam: Sam, context: Any) -> None:
    coords, labels, masks = some(kind).filled(KINDS[kind][3])
    together = sam.score_prompts(context, coords, labels, masks, batch_size=8)
    logits = all_logits(sam, together)
    for i in range(COUNT):
        one = slice(i, i + 1)
        alone = sam.score_prompts(context, coords[one], labels[one], None if masks is None else masks[one], 2)
        np.testing.assert_allclose(alone.predicted_iou(), together.predicted_iou()[one], atol=5e-5)
        np.testing.assert_allclose(all_logits(sam, alone, 1), logits[one], atol=1e-3)


@pytest.mark.parametrize("kind", ["point", "box and 2 points"])
def test_a_refinement_is_a_prompt_with_the_logits_as_its_mask(kind: str, sam: Sam, context: Any) -> None:
    coords, labels, _ = some(kind).filled(KINDS[kind][3])
    tokens = np.array([0, 3, 1])
    scored = sam.score_prompts(context, coords, labels, None, batch_size=8)
    refined = sam.refine_prompts(context, coords, labels, scored, tokens)
    fed_back = sam.mask_logits(scored, np.arange(COUNT), tokens)
    expected = sam.score_prompts(context, coords, labels, fed_back, batch_size=8)
    np.testing.assert_allclose(refined.predicted_iou(), expected.predicted_iou(), atol=1e-4)
    np.testing.assert_allclose(all_logits(sam, refined), all_logits(sam, expected), atol=1e-3)


def test_any_masks_of_a_batch_in_any_order(sam: Sam, context: Any) -> None:
    coords, labels, _ = some("box").filled(2)
    scored = sam.score_prompts(context, coords, labels, None, batch_size=8)
    prompts, tokens = np.array([2, 0, 2, 1] * 10), np.array([3, 0, 0, 2] * 10)
    expected = all_logits(sam, scored)[prompts, tokens]
    np.testing.assert_allclose(sam.mask_logits(scored, prompts, tokens), expected, atol=1e-5)
    assert sam.mask_logits(scored, prompts[:0], tokens[:0]).shape == (0, 64, 64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_near_where_tokens_are_absent(dtype: str, sam: Sam, frame: np.ndarray) -> None:
    prompts = some("mask and box").filled(4)
    low = load_sam(str(PRESET), dtype)
    both = [
        model.score_prompts(model.embed(frame, (FRAME_SIZE, FRAME_SIZE)), *prompts, batch_size=8).predicted_iou()
        for model in (sam, low)
    ]
    assert 0 < np.abs(both[1] - both[0]).max() < 0.3


def test_each_shape_has_one_program_for_all_threads() -> None:
    programs = Programs(lambda weights, x: x + weights, np.float32(1))
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: programs.of(2, 3), range(8)))
    assert len({id(program) for program in made}) == 1
    assert programs.of(2, 4) is not made[0]
    assert float(np.asarray(made[0](np.float32(2)))) == 3
