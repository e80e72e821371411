"""numpy's BLAS: one thread while images are labeled, and afterwards what the caller had."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from maskbeam.transforms.masks.amg import AmgConfig, label_image
from maskbeam.transforms.threads import host_threads, one_blas_thread
from tests.fakes import FakeSam

PIXELS = np.zeros((48, 64, 3), np.uint8)


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def set_blas_threads(number: int) -> None:
    """In a thread that ends: while the one that set the number lives, threadpoolctl obeys no other."""
    setting = threading.Thread(target=threadpool_limits, kwargs={"limits": number, "user_api": "blas"})
    setting.start()
    setting.join()
    assert blas_threads() == {number}


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    """The caller's own number, whatever machine this is."""
    (before,) = blas_threads()
    set_blas_threads(3)
    yield
    set_blas_threads(before)


class WatchingSam(FakeSam):
    """Notes BLAS's threads whenever it is asked."""

    def __init__(self) -> None:
        self.seen: list[set[int]] = []

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> np.ndarray:
        self.seen.append(blas_threads())
        return super().embed(frame, resized_hw)

    def low_res_logits(self, scored: Any, prompts: np.ndarray) -> np.ndarray:
        self.seen.append(blas_threads())
        return super().low_res_logits(scored, prompts)


def test_an_image_is_labeled_with_one_blas_thread_and_the_callers_number_comes_back() -> None:
    sam = WatchingSam()
    label_image(sam, PIXELS, AmgConfig(points_per_side=4, pred_iou_thresh=0.0))
    assert len(sam.seen) > 1 and all(seen == {1} for seen in sam.seen)
    assert blas_threads() == {3}


def test_the_callers_number_comes_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="mine"), one_blas_thread():
        raise ValueError("mine")
    assert blas_threads() == {3}


def test_a_pool_of_host_threads_holds_the_limit_until_it_is_shut_down() -> None:
    with host_threads() as threads:
        assert threads.submit(blas_threads).result() == {1}
        label_image(FakeSam(), PIXELS, AmgConfig(points_per_side=4), threads.submit)
        assert blas_threads() == {1}
    threads.shutdown()  # again
    assert blas_threads() == {3}


@pytest.mark.processes
def test_the_callers_number_comes_back_after_images_that_were_labeled_side_by_side() -> None:
    inside = threading.Barrier(2)

    class MeetingSam(WatchingSam):
        def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> np.ndarray:
            inside.wait(60)
            return super().embed(frame, resized_hw)

    sam = MeetingSam()
    with ThreadPoolExecutor(2) as threads:
        for _ in range(5):
            ended = [threads.submit(label_image, sam, PIXELS, AmgConfig(points_per_side=2)) for _ in range(2)]
            assert all(future.result() for future in ended)
            assert blas_threads() == {3}
    assert all(seen == {1} for seen in sam.seen)
