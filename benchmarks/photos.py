"""The photos that benchmarks run on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from maskbeam.transforms.images import IMAGE_EXTENSIONS
from maskbeam.transforms.records import Chunk, EncodedImage, Shard

REPOSITORY = Path(__file__).parent.parent
SHIPPED_PHOTOS = REPOSITORY / "pipeline" / "photos"


def find_photos(paths: Sequence[Path]) -> list[Path]:
    """Files as given, and the image files of directories by name."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found += [file for file in inside if not path.is_dir() or file.suffix.lower() in IMAGE_EXTENSIONS]
    return found


def chunk_of(images: Sequence[bytes]) -> Chunk:
    """Encoded images as label_chunk takes them."""
    encoded = tuple(EncodedImage(f"image {row}", row, None, None, data) for row, data in enumerate(images))
    return Chunk(Shard("benchmark", "benchmark", "image", ()), 0, encoded, final=True, digest="")
