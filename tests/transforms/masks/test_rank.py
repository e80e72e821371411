"""The rank column: a permutation by the product of the scores as they are stored, and in what label writes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskbeam.transforms.masks.rank import rank_masks
from tests.conftest import label, read_labels

SCORES = st.tuples(st.floats(-0.1, 1.1), st.one_of(st.floats(0, 1), st.just(math.nan)))


@pytest.mark.parametrize(
    ("predicted_iou", "stability_score", "expected"),
    [
        ([], [], []),
        ([0.9, 0.5], [0.5, 1.0], [1, 0]),
        ([0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [0, 1, 2]),  # equal ones keep their order
        ([0.5, 0.25, 1.0], [0.5, 1.0, 0.25], [0, 1, 2]),
        ([0.9, 0.1], [math.nan, 0.0], [1, 0]),
        ([-0.1, 0.0], [0.5, math.nan], [0, 1]),
        # Equal in float32, as they are stored.
        ([0.8, 0.8 + 1e-12], [0.9, 0.9], [0, 1]),
    ],
)
def test_ranks(predicted_iou: list[float], stability_score: list[float], expected: list[int]) -> None:
    """A stability of NaN is an empty mask's."""
    ranks = rank_masks(predicted_iou, stability_score, [0 if math.isnan(score) else 9 for score in stability_score])
    assert ranks.tolist() == expected and ranks.dtype == np.int32


NAN = math.nan


@pytest.mark.parametrize(
    ("predicted_iou", "stability_score", "areas", "expected"),
    [
        ([0.5, 0.7, 0.6], [NAN, NAN, NAN], [9, 9, 9], [2, 0, 1]),  # results: by score
        ([NAN, NAN, NAN], [NAN, NAN, NAN], [1, 3, 2], [0, 1, 2]),  # annotations: the order of the file
        ([0.5, NAN, 0.6], [NAN, NAN, NAN], [9, 9, 9], [1, 2, 0]),
        ([0.5, 0.9], [NAN, 0.5], [9, 9], [0, 1]),
        ([0.5, 0.9], [NAN, NAN], [9, 0], [0, 1]),  # an empty mask is not likelier than a known one
    ],
)
def test_what_an_imported_mask_does_not_tell(
    predicted_iou: list[float], stability_score: list[float], areas: list[int], expected: list[int]
) -> None:
    assert rank_masks(predicted_iou, stability_score, areas).tolist() == expected


@given(st.lists(SCORES, max_size=20))
def test_every_mask_has_a_rank_of_its_own_and_rounding_changes_none(scores: list[tuple[float, float]]) -> None:
    areas = [0] * len(scores)
    ranks = rank_masks([iou for iou, _ in scores], [stability for _, stability in scores], areas)
    assert sorted(ranks) == list(range(len(scores)))
    stored = np.array(scores, np.float32).reshape(-1, 2)
    assert (rank_masks(stored[:, 0].tolist(), stored[:, 1].tolist(), areas) == ranks).all()
    by_rank = stored.astype(float)[np.argsort(ranks)].prod(axis=1)
    numbers = by_rank[~np.isnan(by_rank)]
    assert np.isnan(by_rank[len(numbers) :]).all() and (np.diff(numbers) <= 0).all()


def test_label_ranks_the_masks_of_each_image(photos: Path, output: Path) -> None:
    assert label("--input", photos, "--output", output, "--crop_n_layers", "1") == 0
    labels = read_labels(output)
    for image in labels.images:
        rows = [row for row in labels.annotations if row["image_id"] == image["image_id"]]
        assert len(rows) > 5
        # Stable, so equal products are in the order of mask_index.
        expected = sorted(rows, key=lambda row: -row["predicted_iou"] * row["stability_score"])
        assert [row["rank"] for row in expected] == list(range(len(rows)))
        assert [row["mask_index"] for row in rows] == list(range(len(rows)))
    assert any(row["rank"] != row["mask_index"] for row in labels.annotations)
