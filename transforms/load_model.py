"""Which model runs, and loading it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

from maskbeam.transforms.masks.amg import DTYPES, Sam
from maskbeam.transforms.presets.embedded import DEMO_MODEL
from maskbeam.transforms.presets.remote import local_preset

# The device's memory is taken as it is needed: by default each backend takes (nearly) all of it as it starts, so that a
# second process on the device, or the other backend, would find none.
_MEMORY_GROWTH = {"TF_FORCE_GPU_ALLOW_GROWTH": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclass(frozen=True)
class ModelConfig:
    """Which model runs, and how.

    Attributes:
      model: an embedded model (sam_tiny), a KerasHub SAM preset by name (sam_base_sa1b, sam_large_sa1b,
        sam_huge_sa1b), or the directory or URI of one.
      dtype: float32 gives the reference's masks; bfloat16 and float16 are faster on accelerators and change some masks.
    """

    model: str = DEMO_MODEL
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")


LoadSam = Callable[[ModelConfig], Sam]


def load_model(config: ModelConfig) -> Sam:
    """Loads the model. Keras is imported here, so that launching a job does not need it."""
    from maskbeam.transforms.models.sam.model import load_sam

    return load_sam(local_preset(config.model), config.dtype)


def load_sam(model: str = DEMO_MODEL, dtype: str = "float32") -> Sam:
    """Loads a model, to be given to label_image.

    Args:
      model: "sam_tiny", which comes with the package; "sam_base_sa1b", "sam_large_sa1b" or "sam_huge_sa1b", which
        KerasHub downloads; or the directory or URI of a KerasHub SAM preset.
      dtype: "float32", "bfloat16" or "float16"; only float32 gives the reference's masks.

    Raises:
      PresetError: the name means no model, or the directory holds none.
      ValueError: there is no such dtype.
    """
    return load_model(ModelConfig(model, dtype))


def use_backend(backend: str) -> None:
    """Sets the Keras backend of this process, before Keras is imported, and lets it grow on the device.

    Raises:
      RuntimeError: there is no such backend here, or Keras already runs another one.
    """
    if backend not in ("tensorflow", "jax"):
        raise RuntimeError(f"KERAS_BACKEND must be tensorflow or jax, got {backend}")
    if importlib.util.find_spec(backend) is None:
        raise RuntimeError(f"KERAS_BACKEND is {backend}, but {backend} is not installed: pip install {backend}")
    os.environ.setdefault("KERAS_BACKEND", backend)
    if os.environ["KERAS_BACKEND"] != backend:
        raise RuntimeError(
            f"this job was made for KERAS_BACKEND={backend}, but a worker runs {os.environ['KERAS_BACKEND']}. "
            "Set the variable to the same value where the job is launched and in the worker's image."
        )
    for name, value in _MEMORY_GROWTH.items():
        os.environ.setdefault(name, value)
