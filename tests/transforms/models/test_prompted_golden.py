"""What SamPredictor.predict answers to prompts of every kind (tests/golden/README.md) against ours.

The reference is asked one prompt at a time. We are asked all prompts of a case at once, of all kinds: so that the
masks are the same also says that none depends on the batch, on the program it ran in, or on the other prompts.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskbeam.transforms.masks import prompted
from maskbeam.transforms.masks.amg import Sam
from maskbeam.transforms.masks.candidates import Measured, measure_mask
from maskbeam.transforms.masks.prompted import PromptedConfig, label_prompts
from maskbeam.transforms.masks.rle import counts_to_mask
from maskbeam.transforms.models.sam.model import load_sam
from maskbeam.transforms.records import ImageMasks, Prompts
from tests.fakes import StoredPrompts

GOLDEN = Path(__file__).parents[2] / "golden"
IMAGES = ["blobs_160x120", "blobs_97x151"]
CASES = [(name, number) for name in IMAGES for number in range(7)]
BOUNDS = {"identical": 0.95, "predicted_iou": 1e-5, "refined_iou": 1e-4, "refined_logits": 1e-3}


@cache
def read_image(name: str) -> dict[str, Any]:
    golden: dict[str, Any] = json.loads((GOLDEN / "prompts" / f"{name}.json").read_text())
    return golden


def to_prompts(asked: list[dict[str, Any]]) -> Prompts:
    """Prompts as the fixture has them, in one record."""
    counts = [len(prompt["points"]) for prompt in asked]
    return Prompts(
        boxes_xyxy=np.array([prompt["box"] or [np.nan] * 4 for prompt in asked]),
        points_xy=np.array([point for prompt in asked for point in prompt["points"]]).reshape(-1, 2),
        point_labels=np.array([label for prompt in asked for label in prompt["labels"]], np.int8),
        first_point=np.concatenate([[0], np.cumsum(counts)]),
        masks=tuple(prompt["mask"] for prompt in asked),
        category_ids=np.arange(len(asked), dtype=np.int32),
        scores=np.full(len(asked), np.nan, np.float32),
        ids=tuple(f"p{index}" for index in range(len(asked))),
    )


@pytest.fixture(scope="module")
def sam() -> Sam:
    return load_sam(str(GOLDEN / "sam_128"))


@pytest.fixture(scope="module")
def answers(sam: Sam) -> dict[tuple[str, int], ImageMasks]:
    """Ours, of each case."""
    return {(name, number): answer(sam, name, number) for name, number in CASES}


def answer(sam: Sam, name: str, number: int) -> ImageMasks:
    golden = read_image(name)
    case = golden["cases"][number]
    pixels = np.asarray(Image.open(GOLDEN / golden["photo"]).convert("RGB"))
    return label_prompts(sam, pixels, to_prompts(case["prompts"]), PromptedConfig(**case["config"]))


def expected_of(name: str, number: int) -> list[tuple[int, dict[str, Any]]]:
    """The reference's records with the index of the prompt."""
    some = read_image(name)["cases"][number]["answers"]
    return [(index, record) for index, records in enumerate(some) for record in records]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_every_prompt_is_answered_in_order(name: str, number: int, answers: dict[tuple[str, int], ImageMasks]) -> None:
    expected, actual = expected_of(name, number), answers[name, number]
    assert [(mask.prompt.index, mask.mask_token) for mask in actual.masks] == [(i, r["token"]) for i, r in expected]
    assert [mask.category_id for mask in actual.masks] == [index for index, _ in expected]
    assert [mask.prompt.id for mask in actual.masks] == [f"p{index}" for index, _ in expected]
    assert not actual.dropped.total() and not actual.dropped_prompts


@pytest.mark.parametrize(("name", "number"), CASES)
def test_pixels_differ_only_where_the_reference_is_unsure(
    name: str, number: int, answers: dict[tuple[str, int], ImageMasks]
) -> None:
    for mask, (_, record) in zip(answers[name, number].masks, expected_of(name, number), strict=True):
        ours, theirs, near = (
            counts_to_mask(counts, mask.size_hw) for counts in (mask.counts, record["counts"], record["near"])
        )
        assert not ((ours ^ theirs) & ~near).any(), mask.prompt


@pytest.mark.parametrize(("name", "number"), CASES)
def test_predicted_iou_is_the_reference_s(name: str, number: int, answers: dict[tuple[str, int], ImageMasks]) -> None:
    refined = "refine_steps" in read_image(name)["cases"][number]["config"]
    actual = [mask.predicted_iou for mask in answers[name, number].masks]
    expected = [record["predicted_iou"] for _, record in expected_of(name, number)]
    bound = BOUNDS["refined_iou" if refined else "predicted_iou"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def test_nearly_all_masks_are_identical(answers: dict[tuple[str, int], ImageMasks]) -> None:
    identical = [
        mask.counts == record["counts"]
        for name, number in CASES
        for mask, (_, record) in zip(answers[name, number].masks, expected_of(name, number), strict=True)
    ]
    assert len(identical) == 318
    assert sum(identical) >= BOUNDS["identical"] * len(identical)


def refined_prompts(name: str) -> tuple[np.ndarray, list[tuple[Prompts, dict[str, Any], np.ndarray]]]:
    """The image's pixels, and its refined prompts, each alone: with the reference's record and low-res logits."""
    golden = read_image(name)
    (case,) = (case for case in golden["cases"] if "refine_steps" in case["config"])
    with np.load(GOLDEN / "prompts" / "refined_logits.npz") as stored:
        logits = stored[name]
    alone = [to_prompts([prompt]) for prompt in case["prompts"]]
    pixels = np.asarray(Image.open(GOLDEN / golden["photo"]).convert("RGB"))
    return pixels, list(zip(alone, (records[0] for records in case["answers"]), logits, strict=True))


@pytest.mark.parametrize("name", IMAGES)
def test_same_logits_give_identical_masks(name: str) -> None:
    pixels, refined = refined_prompts(name)
    for prompts, record, logits in refined:
        stored: Any = StoredPrompts(logits, frame_size=128)
        (mask,) = label_prompts(stored, pixels, prompts, PromptedConfig(mask="single")).masks
        assert mask.counts == record["counts"]


@pytest.mark.parametrize("name", IMAGES)
def test_refined_logits_are_the_reference_s(name: str, sam: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[np.ndarray] = []

    def keep(logits: np.ndarray, *args: Any) -> Measured:
        given.append(logits)
        return measure_mask(logits, *args)

    monkeypatch.setattr(prompted, "measure_mask", keep)
    pixels, refined = refined_prompts(name)
    for prompts, _, logits in refined:
        label_prompts(sam, pixels, prompts, PromptedConfig(refine_steps=1))
        np.testing.assert_allclose(given[-1], logits, rtol=0, atol=BOUNDS["refined_logits"])
