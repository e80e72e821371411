"""maskbeam demo: labels the shipped photos with the embedded model and draws the masks over them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from maskbeam.pipeline.commands import label
from maskbeam.pipeline.exits import EXIT_DONE, UsageError
from maskbeam.pipeline.options import parse_job
from maskbeam.transforms.draw import contact_sheet, draw_masks
from maskbeam.transforms.images import ImageConfig, decode_image
from maskbeam.transforms.labels.layout import RUN_FILE
from maskbeam.transforms.labels.schema import row_to_mask
from maskbeam.transforms.labels.tables import read_chunks

PHOTOS = Path(__file__).parents[1] / "demo_photos"

_FLAGS = ["--model", "sam_tiny"]

_DESCRIPTION = "Labels a few photos with the small embedded model, offline, and draws the masks over them."

_SHEET_COLUMNS = 3
_SHEET_ROW_HEIGHT = 400


@dataclass(frozen=True)
class DemoConfig:
    """Where the demo goes.

    Attributes:
      output: local directory of the labels and the picture. An earlier demo in it is replaced.
    """

    output: str = "demo"


@dataclass(frozen=True)
class DemoJob:
    """Everything `maskbeam demo` was asked to do."""

    demo: DemoConfig


def main(argv: list[str]) -> int:
    """Labels, draws, and says where the results are."""
    output = parse_job("demo", DemoJob, argv, _DESCRIPTION).demo.output
    # Again and again into the same place, but not over somebody's labels.
    run_file = Path(output) / RUN_FILE
    again = run_file.exists() and json.loads(run_file.read_text()).get("root") == str(PHOTOS)
    picture = Path(output) / "masks.png"
    if picture.exists() and not again:
        raise UsageError(f"{picture} was not made by a demo. Choose another --output, or move it away.")
    overwrite = ["--overwrite"] if again else []
    code = label.main(["--input", str(PHOTOS / "*.jpg"), "--output", output, *overwrite, *_FLAGS])
    if code == EXIT_DONE:
        Image.fromarray(draw_photos(output)).save(picture)
        print(f"picture: {picture}")
    return code


def draw_photos(labels: str) -> np.ndarray:
    """The shipped photos with the masks of the labels drawn over them, on one sheet: (H, W, 3) uint8."""
    rows = [row for chunk in read_chunks(labels) for row in chunk.annotations.to_pylist()]
    pictures = []
    for path in sorted(PHOTOS.glob("*.jpg")):
        masks = [row_to_mask(row) for row in rows if row["image_id"] == path.name]
        pictures.append(draw_masks(decode_image(path.read_bytes(), ImageConfig()).pixels, masks))
    return contact_sheet(pictures, _SHEET_COLUMNS, _SHEET_ROW_HEIGHT)
