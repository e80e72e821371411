"""The small SAM of the golden files, as KerasHub loads it and as the product runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PRESET = Path(__file__).parents[2] / "golden" / "sam_128"


@pytest.fixture(scope="module")
def backbone() -> Any:
    import keras_hub  # only where a test of the model runs: collecting all tests should not cost it

    return keras_hub.models.SAMImageSegmenter.from_preset(str(PRESET), preprocessor=None).backbone


@pytest.fixture(scope="module")
def sam(backbone: Any) -> Any:
    from maskbeam.transforms.models.sam.model import Sam

    return Sam(backbone)
