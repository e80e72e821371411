"""The HTML report of `maskbeam view`: a directory whose index.html is opened without a server.

The report is pipeline/report/ (HTML, CSS, JavaScript) beside what is made here:

  data/index.js                statistics of all images, and a line for each image of the report
  data/images/<n / 1000>/<n>.js   masks of image n, as COCO RLE; loaded when the image is opened
  thumbnails/<n / 1000>/<n>.jpg   photo n with its masks, small
  photos/<n / 1000>/<n>.jpg       photo n; missing where the photo was not found

Data are scripts because a page opened from a file may load scripts, but not fetch files.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from maskbeam.transforms.draw import draw_masks
from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.labels.schema import row_to_mask
from maskbeam.transforms.photos import PhotoMissing, open_photo
from maskbeam.transforms.records import EncodedImage
from maskbeam.transforms.threads import host_threads

_PAGE = Path(__file__).parent / "page"
# What a report consists of; an earlier one is replaced, anything else in the directory is not touched.
_MADE = ("data", "thumbnails", "photos")
_MADE_FILE = re.compile(r"\d+\.(jpg|js)|index\.js")
_MARK = '<meta name="generator" content="maskbeam view">'

_PER_DIRECTORY = 1000  # file managers grow slow with directories of ten thousands
_THUMBNAIL_SIDE = 400  # pixels: 200 in the gallery, on screens with two pixels to one of CSS
_JPEG_QUALITY = 85
_AHEAD = 8  # photos in memory at once, beside the threads'
_GREY = 72  # of the canvas where there is no photo

# Columns that later steps add to the masks, shown where they are.
_LATER_COLUMNS = ("rank", "parent_id")

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ShownImage:
    """An image to show: its rows of both tables, its masks in their order, and its photo's bytes or their failure."""

    row: dict[str, Any]
    masks: list[dict[str, Any]]
    photo: EncodedImage

    @property
    def image_id(self) -> str:
        return str(self.row["image_id"])

    @property
    def size_hw(self) -> tuple[int, int] | None:
        """None where the image could not be decoded when it was labeled."""
        return (self.row["height"], self.row["width"]) if self.row["height"] else None


def begin_report(output: Path) -> None:
    """Makes the directory, with a page that is replaced when the report is done: one that was cut off says so."""
    output.mkdir(parents=True, exist_ok=True)
    page = f"<!doctype html>\n{_MARK}\n<title>maskbeam</title>\n<p>This report is not finished. Make it again.</p>\n"
    (output / "index.html").write_text(page, "utf-8")


def holds_report(output: Path) -> bool:
    """Whether a directory is a report of ours, finished or not."""
    page = output / "index.html"
    return page.exists() and _MARK in page.read_text("utf-8", "replace")


def delete_report(output: Path) -> None:
    """Deletes what makes a report large, and nothing else; the rest is replaced when the new one is written."""
    for name in _MADE:
        # A folder comes after what is in it.
        for path in sorted([output / name, *(output / name).rglob("*")], reverse=True):
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # others' files are in it
                    path.rmdir()
            elif _MADE_FILE.fullmatch(path.name):
                path.unlink(missing_ok=True)


def write_images(
    images: Iterable[ShownImage], photo_side: int, config: ImageConfig, output: Path
) -> list[dict[str, Any]]:
    """Writes the files of all images; a few are decoded and drawn at a time, beside the reading of the next.

    Args:
      photo_side: longest side of the photos, in pixels.
      config: how the photos were decoded when they were labeled.

    Returns:
      their lines in the index.
    """
    with host_threads() as threads:
        written = (
            threads.submit(_write_image, number, shown, photo_side, config, output)
            for number, shown in enumerate(images)
        )
        return list(_in_order(written))


def write_page(index: dict[str, Any], output: Path) -> None:
    """Writes the index and the page itself, index.html last."""
    _write_script(output / "data" / "index.js", f"window.maskbeamIndex = {_to_javascript(index)};\n")
    for file in sorted(_PAGE.iterdir(), key=lambda file: file.name == "index.html"):
        shutil.copyfile(file, output / file.name)


def _in_order(futures: Iterator[Future[T]]) -> Iterator[T]:
    """The results in order, with at most _AHEAD of them under way."""
    waiting: deque[Future[T]] = deque()
    for future in futures:
        waiting.append(future)
        if len(waiting) > _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write_image(number: int, shown: ShownImage, photo_side: int, config: ImageConfig, output: Path) -> dict[str, Any]:
    """Writes the files of one image. Their names come from its number: an id may hold anything.

    Returns:
      its line in the index.
    """
    row, size_hw = shown.row, shown.size_hw
    problem = None
    if size_hw is not None:
        try:
            pixels = _fit(open_photo(shown.photo, row["sha256"], size_hw, config), photo_side)
            _write_jpeg(_path(output, "photos", number, "jpg"), pixels)
        except PhotoMissing as error:
            problem = str(error)
            pixels = grey_canvas(size_hw)
        pixels = draw_masks(_fit(pixels, _THUMBNAIL_SIDE), [row_to_mask(mask) for mask in shown.masks])
        _write_jpeg(_path(output, "thumbnails", number, "jpg"), pixels)
    details = {
        **{name: row[name] for name in ("shard", "row", "key", "file_name", "sha256", "error_stage", "error")},
        "problem": problem,
        "masks": _mask_columns(shown.masks),
    }
    script = f"window.maskbeamImages[{number}] = {_to_javascript(details)};\n"
    _write_script(_path(output, "data/images", number, "js"), script)
    return {
        "id": shown.image_id,
        "file_name": row["file_name"],
        "width": row["width"],
        "height": row["height"],
        "status": row["status"],
        "masks": len(shown.masks),
        "problem": problem is not None,
    }


def _mask_columns(masks: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The masks by column, so that a name is not repeated with every mask."""
    columns = {"counts": [mask["segmentation"]["counts"] for mask in masks]}
    for name in ("mask_index", "area", "predicted_iou", "stability_score", *_LATER_COLUMNS):
        if masks and name in masks[0]:
            columns[name] = [_short(mask[name]) for mask in masks]
    return columns


def _short(value: Any) -> Any:
    """float32 has seven digits; the double it becomes would be written with seventeen."""
    return round(value, 6) if isinstance(value, float) else value


def _fit(pixels: np.ndarray, side: int) -> np.ndarray:
    """The picture with its longest side no longer than `side`, (h, w, 3) uint8."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return pixels
    size_wh = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(Image.fromarray(pixels).resize(size_wh, Image.Resampling.LANCZOS, reducing_gap=3))


def grey_canvas(size_hw: tuple[int, int]) -> np.ndarray:
    """In place of a photo that is missing, (H, W, 3) uint8."""
    return np.full((*size_hw, 3), _GREY, np.uint8)


def _path(output: Path, kind: str, number: int, extension: str) -> Path:
    path = output / kind / str(number // _PER_DIRECTORY) / f"{number}.{extension}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_jpeg(path: Path, pixels: np.ndarray) -> None:
    # Colours at full resolution: thin outlines would lose theirs.
    Image.fromarray(pixels).save(path, "JPEG", quality=_JPEG_QUALITY, subsampling=0)


def _write_script(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, "utf-8")


def _to_javascript(value: Any) -> str:
    """A JavaScript literal: ASCII, and without a character that could end a script. NaN is one in JavaScript, too."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
