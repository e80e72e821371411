"""maskbeam: label image datasets with SAM.

The public API is what __all__ lists. Each name is imported when it is first used (PEP 562), so that `import maskbeam`
costs nothing.

>>> sam = maskbeam.load_sam("sam_base_sa1b")  # doctest: +SKIP
>>> masks = maskbeam.label_image(sam, pixels).masks  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskbeam.transforms.labels.dataset import ImageLabels, decode_mask, open_labels
    from maskbeam.transforms.load_model import load_sam
    from maskbeam.transforms.masks.amg import AmgConfig, Sam, label_image
    from maskbeam.transforms.records import ImageMasks, Mask

__all__ = [
    "AmgConfig",
    "ImageLabels",
    "ImageMasks",
    "Mask",
    "Sam",
    "decode_mask",
    "label_image",
    "load_sam",
    "open_labels",
]

_MODULES = {
    "AmgConfig": "maskbeam.transforms.masks.amg",
    "ImageLabels": "maskbeam.transforms.labels.dataset",
    "ImageMasks": "maskbeam.transforms.records",
    "Mask": "maskbeam.transforms.records",
    "Sam": "maskbeam.transforms.masks.amg",
    "decode_mask": "maskbeam.transforms.labels.dataset",
    "label_image": "maskbeam.transforms.masks.amg",
    "load_sam": "maskbeam.transforms.load_model",
    "open_labels": "maskbeam.transforms.labels.dataset",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
