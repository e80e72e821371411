"""Whether images or the device are at fault when the model fails, and what the device can hold."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import numpy as np

from maskbeam.transforms.labeler import Labeler

# How XLA and CUDA say that the device's memory ran out.
_OUT_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED|CUDA_ERROR_OUT_OF_MEMORY")

_log = logging.getLogger(__name__)


class ModelBroken(RuntimeError):
    """The model fails on the built-in image, too: the accelerator, its memory or the installation, not the data."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if the device's memory ran out, on either backend. The host's MemoryError is something else.

    TensorFlow raises ResourceExhaustedError, or what XLA says as an InternalError; JAX raises XlaRuntimeError or
    JaxRuntimeError with the status in its text; Keras may wrap any of them.
    """
    cause: BaseException | None = error
    while cause is not None:
        names = {kind.__name__ for kind in type(cause).__mro__}
        if "ResourceExhaustedError" in names or _OUT_OF_MEMORY.search(str(cause)):
            return True
        cause = cause.__cause__
    return False


@dataclass
class ModelHealth:
    """What is known of the device's memory, over the chunks of one process.

    Attributes:
      out_of_memory: images that were tried again because memory ran out.
      halved: whether the labeler was told to give the device half as much. That happens once: a device that cannot
        hold half of what was asked for wants another setting, not slower and slower work.
    """

    out_of_memory: int = 0
    halved: bool = False

    def ran_out_of_memory(self, labeler: Labeler) -> None:
        """The device's memory ran out on an image, which is tried again next."""
        self.out_of_memory += 1
        if self.halved:
            return
        self.halved = True
        if change := labeler.halve_batch():
            _log.warning(
                "the device's memory ran out: %s from here on. Set --points_per_batch lower to begin with that", change
            )


def probe_pixels() -> np.ndarray:
    """The built-in test image, (96, 128, 3) uint8: a bright disc on a gradient."""
    y, x = np.mgrid[:96, :128]
    pixels = 255 - np.stack([x, y, x + y], axis=-1).astype(np.uint8)
    pixels[np.hypot(x - 64, y - 48) < 24] = (240, 200, 80)
    return pixels
