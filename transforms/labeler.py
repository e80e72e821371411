"""The seam between images and what makes their masks.

transforms/generate_masks.py owns a chunk: its threads, the order of its images, failures, retries and the health of the
device. A Labeler owns an image: what is asked of the model, and what becomes of the answers. It knows no Beam, no files
and no encoded bytes. transforms/masks/automatic.py is the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

import numpy as np

from maskbeam.transforms.masks.amg import Sam
from maskbeam.transforms.records import ImageMasks, Prompts
from maskbeam.transforms.threads import Submit

PreparedT = TypeVar("PreparedT")


class PromptError(ValueError):
    """An image cannot be labeled because of its prompts: they are for one of another size, say. The message is a
    sentence for people; the image fails at the stage "prompt"."""


class Labeler(Protocol[PreparedT]):
    """Makes masks of images. A process has one, around the one model that it has loaded.

    The life of an image: `prepare` on one of several decoding threads, then `label` on the thread that feeds the
    device, then whatever `label` has submitted. An image whose future fails goes through `label` once more, alone.

    Attributes:
      images_per_batch: images that `label` gets at once, at least 1; fixed, since another shape of a batch gives other
        last bits, and rows must not depend on the batch that an image was in.
      keep_candidates: whether ImageMasks.candidates are filled, and to be stored.
    """

    images_per_batch: int
    keep_candidates: bool

    def prepare(self, pixels: np.ndarray, prompts: Prompts | None) -> PreparedT:
        """All that can be done without the device, such as resizing. Called by several threads at once.

        Few prepared images are held at a time, but the decoded image should not be part of what is returned.

        Args:
          pixels: (H, W, 3) uint8 RGB, after orientation; never written to.
          prompts: of this image, in its pixels; None = none are known. A labeler that needs none ignores them.

        Raises:
          PromptError: the prompts are not for this image.
          Exception: anything else means that the image itself cannot be labeled; it fails at the stage "decode".
        """

    def label(self, batch: Sequence[PreparedT], submit: Submit) -> list[Future[ImageMasks]]:
        """Starts on a batch and returns one future for each image, in their order.

        Called by one thread only, the one that feeds the device: while it waits for the device here, other threads work
        on the images before. So it should return as soon as the device has what it needs, and leave measuring and
        encoding to functions that it submits. What is submitted may wait for what was submitted before it, never for
        what comes later: the pool may have two threads.

        Args:
          batch: 1 to images_per_batch images, in the order of their chunk; all of one chunk. There are fewer at the end
            of a chunk, and one alone when it is tried again: pad them to images_per_batch, so that the device always
            sees the same shapes and an image always gets the same masks.
          submit: runs work on the host's threads.

        Raises:
          Exception: whatever the device raises counts as a failure of every image of the batch; each is tried again
            alone. An error in one image's future is a failure of that image only.
        """

    def probe(self, pixels: np.ndarray, submit: Submit) -> Future[ImageMasks]:
        """Labels a built-in image, which shows whether images or the device are at fault.

        It must go all the way through the network, whatever the thresholds and the prompts of the run are, with one
        batch of prompts of the size that the run has.

        Args:
          pixels: (H, W, 3) uint8 RGB, of a few thousand pixels.

        Raises:
          Exception: the device is at fault, as if the future had failed.
        """

    def halve_batch(self) -> str | None:
        """The device's memory ran out: from the next call of `label` on, give it half as much at once.

        Masks must stay the same. Called at most once in the life of a labeler.

        Returns:
          what has changed, for people, such as "points_per_batch is 32 instead of 64"; None if nothing can be halved.
        """


MakeLabeler = Callable[[Sam], Labeler]
