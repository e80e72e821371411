"""The algorithm of prompted masks, on FakeSam. That its masks are the reference's is tested in test_prompted_golden."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskbeam.transforms.masks.amg import ModelOutputError
from maskbeam.transforms.masks.prompted import PromptedConfig, PromptedLabeler, label_prompts
from maskbeam.transforms.masks.rle import counts_to_mask
from maskbeam.transforms.records import Dropped, ImageMasks, Mask
from maskbeam.transforms.threads import call_now
from tests.fakes import FakeSam, FakeScored
from tests.transforms.masks.test_prompts import square, to_prompts

SIZE_HW = (48, 64)  # goes into FakeSam's frame as it is
PIXELS = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3), np.uint8)

CLICK: dict[str, Any] = {"points": [[20, 20]], "category": 7}
BOX: dict[str, Any] = {"box": [10, 8, 30, 40], "category": 3, "score": 0.25}
POINTS: dict[str, Any] = {"points": [[20, 20], [40, 24], [30, 30]], "labels": [1, 1, 0], "category": 5}
COARSE: dict[str, Any] = {"mask": square(30, 10, 50, 30, SIZE_HW), "category": 3}
OUTSIDE: dict[str, Any] = {"box": [64, 0, 70, 9]}


def label(*prompts: dict[str, Any], sam: FakeSam | None = None, **settings: Any) -> ImageMasks:
    return label_prompts(sam or FakeSam(), PIXELS, to_prompts(*prompts), PromptedConfig(**settings))


def tokens(result: ImageMasks) -> list[tuple[int | None, int | None]]:
    """Prompt and mask token of each mask."""
    return [(mask.prompt.index, mask.mask_token) for mask in result.masks]


def without_prompt(mask: Mask) -> tuple[Any, ...]:
    """What a mask is, whichever number its prompt has."""
    return mask.counts, mask.predicted_iou, mask.stability_score, mask.mask_token, mask.category_id


def test_each_prompt_gets_one_mask_in_order_with_its_class() -> None:
    result = label(BOX, CLICK, POINTS, COARSE, BOX)
    assert [mask.prompt.index for mask in result.masks] == [0, 1, 2, 3, 4]
    assert [mask.prompt.id for mask in result.masks] == ["p0", "p1", "p2", "p3", "p4"]
    assert [mask.category_id for mask in result.masks] == [3, 7, 5, 3, 3]
    assert [mask.prompt.score for mask in result.masks] == [0.25, None, None, None, 0.25]
    assert without_prompt(result.masks[0]) == without_prompt(result.masks[4])  # the same prompt twice is two rows
    assert result.masks[0].crop_box_xywh == (0, 0, 64, 48)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", [(0, 1), (1, 0), (2, 0)]),  # FakeSam is surest of mask 1
        ("single", [(0, 0), (1, 0), (2, 0)]),
        ("best", [(0, 1), (1, 1), (2, 1)]),
        ("stable", [(0, 0), (1, 0), (2, 0)]),
        ("all", [(prompt, token) for prompt in range(3) for token in range(4)]),
    ],
)
def test_which_mask_answers(choice: str, expected: list[tuple[int, int]]) -> None:
    assert tokens(label(CLICK, BOX, POINTS, mask=choice)) == expected


def test_an_unstable_mask_0_gives_way_to_the_best() -> None:
    class Flat(FakeSam):
        def mask_logits(self, scored: FakeScored, prompts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
            logits = super().mask_logits(scored, prompts, tokens)
            logits[tokens == 0] *= 0.001
            return logits

    assert tokens(label(CLICK, BOX, sam=Flat(), mask="stable")) == [(0, 1), (1, 1)]


def test_a_mask_0_without_a_pixel_is_stable_as_in_sam_2() -> None:
    class Nothing(FakeSam):
        def mask_logits(self, scored: FakeScored, prompts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
            return super().mask_logits(scored, prompts, tokens) - 1000

    result = label(BOX, sam=Nothing(), mask="stable")
    assert tokens(result) == [(0, 0)]
    assert result.masks[0].area == 0  # a row all the same


def test_refining_feeds_the_chosen_mask_back_and_answers_with_mask_0() -> None:
    fed: list[list[int]] = []

    class Watched(FakeSam):
        def refine_prompts(self, context: Any, coords_xy: Any, labels: Any, scored: Any, tokens: Any) -> FakeScored:
            fed.append(tokens.tolist())
            return super().refine_prompts(context, coords_xy, labels, scored, tokens)

    plain = label(CLICK, BOX, mask="single")
    refined = label(CLICK, BOX, sam=Watched(), refine_steps=2)
    assert fed == [[1, 0], [0, 0]]
    assert tokens(refined) == [(0, 0), (1, 0)]
    for before, after in zip(plain.masks, refined.masks, strict=True):
        assert after.predicted_iou == pytest.approx(before.predicted_iou + 0.02, abs=1e-6)
        assert after.area > before.area


def test_thresholds_drop_masks_and_count_them() -> None:
    everything = label(CLICK, BOX, mask="all")
    iou = sorted(mask.predicted_iou for mask in everything.masks)
    filtered = label(CLICK, BOX, OUTSIDE, mask="all", pred_iou_thresh=iou[2])
    assert len(filtered.masks) == sum(value > iou[2] for value in iou)
    assert filtered.dropped == Dropped(prompt=1, predicted_iou=8 - len(filtered.masks))
    stability = sorted(mask.stability_score for mask in everything.masks)
    stable = label(CLICK, BOX, mask="all", stability_score_thresh=stability[3])
    assert stable.dropped == Dropped(stability=sum(value < stability[3] for value in stability))
    assert 0 < stable.dropped.stability < 8


def test_a_mask_can_be_cut_off_at_its_box() -> None:
    box = [14.5, 20, 25, 28]
    (whole,) = label({"box": box}).masks
    (cut,) = label({"box": box}, clip_to_box=True).masks
    expected = counts_to_mask(whole.counts, SIZE_HW)
    inside = np.zeros(SIZE_HW, bool)
    inside[20:28, 14:25] = True
    np.testing.assert_array_equal(counts_to_mask(cut.counts, SIZE_HW), expected & inside)
    assert cut.area == (expected & inside).sum() < whole.area
    assert without_prompt(label(CLICK, clip_to_box=True).masks[0]) == without_prompt(label(CLICK).masks[0])


class NoEmbedding(FakeSam):
    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> np.ndarray:
        raise AssertionError("embedded")


@pytest.mark.parametrize("prompts", [[], [OUTSIDE, OUTSIDE]])
def test_an_image_without_a_good_prompt_is_not_embedded(prompts: list[dict[str, Any]]) -> None:
    result = label(*prompts, sam=NoEmbedding())
    assert result.masks == ()
    assert result.num_candidates == result.dropped.prompt == len(result.dropped_prompts) == len(prompts)


def test_a_bad_prompt_costs_only_itself() -> None:
    result = label(BOX, OUTSIDE, {"box": [-5, 8, 30, 40]})
    assert [mask.prompt.index for mask in result.masks] == [0, 2]
    assert [(prompt.index, prompt.id) for prompt in result.dropped_prompts] == [(1, "p1")]
    assert result.clipped_prompts == 1
    assert result.masks[1].prompt.box_xywh == (0, 8, 30, 32)


ANY_PROMPT = st.sampled_from([CLICK, BOX, POINTS, COARSE, OUTSIDE, {"points": [[1, 99]]}, {"box": [5, 5, 1, 1]}])


@given(
    st.lists(ANY_PROMPT, max_size=12),
    st.sampled_from(["auto", "all"]),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_every_prompt_is_accounted_for(
    prompts: list[dict[str, Any]], choice: str, pred_iou_thresh: float, stability_score_thresh: float
) -> None:
    result = label(
        *prompts, mask=choice, pred_iou_thresh=pred_iou_thresh, stability_score_thresh=stability_score_thresh
    )
    bad = result.dropped.prompt
    assert bad == len(result.dropped_prompts)
    assert result.num_prompts == len(prompts)
    assert len(result.masks) + result.dropped.total() == result.num_candidates
    assert result.num_candidates - bad == (len(prompts) - bad) * (4 if choice == "all" else 1)


@given(st.lists(ANY_PROMPT, max_size=20), st.integers(1, 64))
def test_no_mask_depends_on_the_other_prompts(prompts: list[dict[str, Any]], points_per_batch: int) -> None:
    together = label(*prompts, points_per_batch=points_per_batch).masks
    alone = [mask for prompt in prompts for mask in label(prompt).masks]
    assert [without_prompt(mask) for mask in together] == [without_prompt(mask) for mask in alone]


def test_threads_change_nothing() -> None:
    prompts = to_prompts(*[CLICK, BOX, POINTS, COARSE, OUTSIDE] * 6)
    with ThreadPoolExecutor(3) as threads:
        threaded = label_prompts(FakeSam(), PIXELS, prompts, submit=threads.submit)
    directly = label_prompts(FakeSam(), PIXELS, prompts)
    assert (threaded.masks, threaded.dropped) == (directly.masks, directly.dropped)


@pytest.mark.parametrize("method", ["score_prompts", "mask_logits"])
def test_what_is_not_finite_is_a_sick_device(method: str) -> None:
    class Sick(FakeSam):
        pass

    def ill(self: FakeSam, *args: Any) -> Any:
        result = getattr(FakeSam, method)(self, *args)
        (result.iou if isinstance(result, FakeScored) else result)[:] = nan
        return result

    setattr(Sick, method, ill)
    with pytest.raises(ModelOutputError, match="not finite"):
        label(BOX, sam=Sick())


def test_the_labeler_gives_what_label_prompts_gives() -> None:
    labeler, given = PromptedLabeler(FakeSam(), PromptedConfig()), [to_prompts(CLICK, OUTSIDE), to_prompts(BOX, BOX)]
    prepared = [labeler.prepare(PIXELS, prompts) for prompts in given]
    results = [future.result() for future in labeler.label(prepared, call_now)]
    for result, prompts in zip(results, given, strict=True):
        expected = label_prompts(FakeSam(), PIXELS, prompts)
        assert (result.masks, result.dropped_prompts) == (expected.masks, expected.dropped_prompts)


def test_the_labeler_embeds_nothing_where_nobody_asks() -> None:
    labeler = PromptedLabeler(NoEmbedding(), PromptedConfig())
    (future,) = labeler.label([labeler.prepare(PIXELS, None)], call_now)
    assert (future.result().masks, future.result().num_candidates) == ((), 0)


def test_the_probe_goes_through_all_of_the_model_with_a_full_batch() -> None:
    result = PromptedLabeler(FakeSam(), PromptedConfig(pred_iou_thresh=1)).probe(PIXELS, call_now).result()
    assert len(result.masks) == 8


def test_out_of_memory_halves_the_batch_once_and_no_mask_changes() -> None:
    sizes: list[int] = []

    class Watched(FakeSam):
        def score_prompts(self, context: Any, coords_xy: Any, labels: Any, masks: Any, batch_size: int) -> FakeScored:
            sizes.append(batch_size)
            return super().score_prompts(context, coords_xy, labels, masks, batch_size)

    labeler, prompts = PromptedLabeler(Watched(), PromptedConfig()), to_prompts(*[CLICK, BOX] * 3)
    results = []
    for changed in ("points_per_batch is 2 instead of 8", None):
        (future,) = labeler.label([labeler.prepare(PIXELS, prompts)], call_now)
        results.append(future.result().masks)
        assert labeler.halve_batch() == changed
    assert sizes == [8, 2, 2, 2]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": "first"}, 'mask must be one of auto, single, best, stable, all, got "first"'),
        ({"mask": "all", "refine_steps": 1}, "mask all has four answers, and refine_steps refines one"),
        ({"refine_steps": -1}, "refine_steps must be between 0 and 10, got -1"),
        ({"box_margin": nan}, "box_margin must be between 0 and 10, got nan"),
        ({"box_margin": -0.1}, "box_margin"),
        ({"pred_iou_thresh": 2}, "pred_iou_thresh must be a fraction of at most 1, got 2"),
        ({"stability_score_thresh": nan}, "stability_score_thresh"),
        ({"stability_score_offset": -1}, "stability_score_offset"),
        ({"mask_threshold": nan}, "mask_threshold must be a finite logit"),
        ({"points_per_batch": 0}, "points_per_batch"),
    ],
)
def test_bad_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptedConfig(**settings)
