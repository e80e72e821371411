"""Image bytes to pixels: whatever the file stores becomes (H, W, 3) uint8 RGB, or an ImageError.

JPEG, PNG, WebP, BMP, TIFF and GIF; of several frames or pages the first. The bytes tell the format, never the name.

| stored                                   | becomes RGB by                                                          |
| ---------------------------------------- | ----------------------------------------------------------------------- |
| 8-bit RGB, grey, palette, 1-bit          | the colours as stored; grey three times; 1-bit is 0 or 255              |
| with alpha or a transparent colour       | alpha dropped: the colours stored under it, never blended               |
| CMYK, YCCK, YCbCr, CIELAB                | Pillow's convert("RGB")                                                 |
| 16-bit (or 12-bit) grey or RGB, unsigned | the 8 high bits, v >> 8 (v >> 4)                                        |
| signed 16-bit, 32-bit and float (TIFF)   | no nominal range, so the image's own: its least finite value becomes 0, |
|                                          | its greatest 255, linear and rounded; NaN, and a flat image, become 0   |

Embedded colour profiles (ICC) are ignored. Where the stored samples are 8-bit, the result is exactly
`np.asarray(PIL.Image.open(file).convert("RGB"))`, turned as EXIF says, so masks compare with those of other tools.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile, DibImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

# What files of the formats below are called; an .mpo is a JPEG with more pictures behind the first.
IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"}
)


# A progressive JPEG is stored in scans, about ten. Ten bytes can make another one, as expensive as all the others.
MAX_JPEG_SCANS = 1000
_START_OF_SCAN = b"\xff\xda"  # never within a scan's data, where 0xff is followed by 0


def has_image_extension(name: str) -> bool:
    """True for names that end like an image file, in any case.

    >>> has_image_extension("gs://bucket/2024/IMG_0001.JPG"), has_image_extension("labels.json")
    (True, False)
    """
    return PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS


@dataclass(frozen=True)
class ImageConfig:
    """How image files become pixels.

    Attributes:
      exif: apply turns the image upright as its EXIF orientation says, as viewers and annotation tools show it, so
        masks fit what people see. ignore keeps the stored pixels, for labels that were drawn on those.
      max_pixels: largest width x height that is decoded; larger ones fail from their header alone. It guards against
        decompression bombs: a file of a few kilobytes may claim gigabytes of pixels. Decoding takes about 7 bytes of
        memory a pixel (16 for WebP and for an image of one long row), so the default is up to 1.75 GB for one image; it
        admits the largest cameras (150 million) and most scans. Lower it where workers have little memory, raise it for
        aerial or microscope images, up to 4294967295: COCO's RLE counts pixels in 32 bits.
    """

    exif: Literal["apply", "ignore"] = "apply"
    max_pixels: int = 250_000_000

    def __post_init__(self) -> None:
        if self.exif not in ("apply", "ignore"):
            raise ValueError(
                f"exif is {self.exif!r}, but must be 'apply' or 'ignore'. Use 'apply' to turn photos upright, "
                "'ignore' to keep the pixels as stored."
            )
        if self.max_pixels < 1:
            raise ValueError(
                f"max_pixels is {self.max_pixels}, but must be 1 or more: no image could be decoded. It counts "
                "width x height; leave it out for the default of 250 million."
            )
        if self.max_pixels >= 2**32:
            raise ValueError(
                f"max_pixels is {self.max_pixels}, but must be at most {2**32 - 1}: COCO's RLE counts the pixels of an "
                "image in 32 bits."
            )


class ImageError(ValueError):
    """The bytes are no image that can be decoded; the message says why and what to do, for people."""


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """One decoded image.

    Attributes:
      pixels: (H, W, 3) uint8 RGB, C-contiguous, upright where ImageConfig.exif is "apply".
      exif_orientation: 1..8 as stored in the file (EXIF, or XMP where EXIF has none), whether applied or not; 1 where
        the file says nothing valid.
    """

    pixels: np.ndarray
    exif_orientation: int


def decode_image(data: bytes, config: ImageConfig) -> DecodedImage:
    """Decodes an image file. Safe to call from several threads, and in a process that has its own Pillow limits.

    Args:
      data: the file's bytes.
      config: orientation and size limit.

    Raises:
      ImageError: for every fault of the bytes: empty, not an image, over `max_pixels`, truncated, damaged.
    """
    format_name = _identify(data)
    with _image_errors(format_name):
        image = _open(data, format_name, config)
        if format_name == "JPEG" and data.count(_START_OF_SCAN) > MAX_JPEG_SCANS:
            raise ImageError(
                f"the JPEG has more than {MAX_JPEG_SCANS} scans, each of which takes as long as a whole image: it "
                "would be decoded for hours. If it is genuine, save it anew with fewer."
            )
        image.load()
        orientation = _exif_orientation(image)
        return DecodedImage(_rgb_pixels(image, orientation if config.exif == "apply" else 1), orientation)


def read_size(data: bytes, config: ImageConfig) -> tuple[tuple[int, int], int]:
    """(H, W) in pixels after orientation, and the EXIF orientation, of an image file of which only the header is read.

    Raises:
      ImageError: as decode_image, as far as the header shows it.
    """
    format_name = _identify(data)
    with _image_errors(format_name):
        image = _open(data, format_name, config)
        width, height = image.size
        orientation = _exif_orientation(image)
        turned = config.exif == "apply" and orientation >= 5
        return ((width, height) if turned else (height, width)), orientation


def _open(data: bytes, format_name: str, config: ImageConfig) -> ImageFile:
    """Reads the header, and looks at the size that it says."""
    image = _READERS[format_name][1](io.BytesIO(data))
    width, height = image.size
    if width * height > config.max_pixels:
        raise ImageError(
            f"the image has {width} x {height} = {width * height} pixels, more than the limit of "
            f"{config.max_pixels} that guards against decompression bombs. If it is genuine, raise --max_pixels."
        )
    return image


@contextlib.contextmanager
def _image_errors(format_name: str) -> Iterator[None]:
    """Within this, whatever the format's reader raises becomes an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(
            f"not enough memory to decode this {format_name}. Lower --max_pixels to refuse such images early, or "
            "use workers with more memory."
        ) from error
    except Exception as error:  # Pillow's readers raise nearly anything on damaged bytes
        raise ImageError(
            f"cannot decode this {format_name}: {str(error) or type(error).__name__}. Expected a complete, undamaged "
            "file of a common kind; fetch it again, or save it anew as JPEG or PNG."
        ) from error


class _FirstGifFrame(GifImageFile):
    """Pillow's reader without what serves later frames only.

    Pillow makes the canvas that follows the first frame while it reads the header, as large as that claims, before
    anyone can look at the size.
    """

    @property
    def disposal_method(self) -> int:
        return 0

    @disposal_method.setter
    def disposal_method(self, value: int) -> None:
        pass


class _StoredTiff(TiffImageFile):
    """Pillow's reader without its own pixel limit, and with the pixels as stored: it would turn TIFFs on loading."""

    def load_prepare(self) -> None:
        size = (self.tag_v2[ExifTags.Base.ImageWidth], self.tag_v2[ExifTags.Base.ImageLength])
        self.im = Image.new(self.mode, size).im
        super().load_prepare()

    def load_end(self) -> None:
        self._size = self.im.size  # until here the size after turning
        _exif_orientation(self)  # the image keeps what is read here; the file is let go next


# Format: how such files begin, and the reader. The readers are called directly because PIL.Image.open has a pixel limit
# of its own, global to the process, and would try formats that run other programs (EPS).
_READERS: dict[str, tuple[bytes, type[ImageFile]]] = {
    "JPEG": (rb"\xff\xd8\xff", JpegImageFile),
    "PNG": (rb"\x89PNG\r\n\x1a\n", PngImageFile),
    "WebP": (rb"RIFF....WEBP", WebPImageFile),
    "GIF": (rb"GIF8[79]a", _FirstGifFrame),
    "TIFF": (rb"(II|MM)(\0[*+]|[*+]\0)", _StoredTiff),
    "BMP": (rb"BM", BmpImageFile),
    "DIB": (rb"[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", DibImageFile),  # a BMP without its file header
}


def _identify(data: bytes) -> str:
    """The format by the first bytes, a key of _READERS."""
    if not data:
        raise ImageError("the file is empty (0 bytes). Expected an image; fetch it again.")
    for format_name, (magic, _) in _READERS.items():
        if re.match(magic, data, re.DOTALL):
            return format_name
    raise ImageError(
        f"not an image, or of an unknown format: it begins with {data[:16]!r}. Expected JPEG, PNG, WebP, BMP, TIFF or "
        "GIF; fetch it again if it should be one, or convert it."
    )


def _exif_orientation(image: ImageFile) -> int:
    """The loaded image's EXIF orientation, 1..8; 1 where there is none or it is invalid."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _rgb_pixels(image: ImageFile, orientation: int) -> np.ndarray:
    """The loaded image as (H, W, 3) uint8 RGB, turned by `orientation`.

    Tile by tile, straight into the turned result: nothing of the image's size is made but that result, and turning
    stays in the cache.
    """
    width, height = image.size
    pixels = np.empty((width, height, 3) if orientation >= 5 else (height, width, 3), np.uint8)
    as_stored = _orient(pixels, {6: 8, 8: 6}.get(orientation, orientation))  # the others undo themselves
    image.info.pop("transparency", None)  # alpha is dropped; Pillow would convert the transparent colour too, and warn
    if image.mode.startswith("I;16"):
        bits = image.tag_v2[ExifTags.Base.BitsPerSample][0] if isinstance(image, TiffImageFile) else 16
        for window, tile in _tiles(image):
            as_stored[window] = (np.asarray(tile) >> (bits - 8))[..., None]
    elif image.mode in ("I", "F"):
        low, high = _finite_range(image)
        for window, tile in _tiles(image):
            as_stored[window] = _stretch(np.asarray(tile), low, high)[..., None]
    else:
        for window, tile in _tiles(image):
            as_stored[window] = np.asarray(tile.convert("RGB"))
    return pixels


def _orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of (H, W, 3) `pixels` turned by an EXIF orientation, 1..8: (W, H, 3) from 5 on.

    How a stored F comes out:
      1 F as is   2 mirrored left-right   3 by 180 degrees   4 mirrored top-bottom
      5 transposed   6 by 90 degrees clockwise   7 transposed along the other diagonal   8 by 90 counterclockwise
    """
    rows = slice(None, None, -1 if orientation in (3, 4, 6, 7) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 7, 8) else 1)
    turned = pixels[rows, columns]
    return turned.swapaxes(0, 1) if orientation >= 5 else turned


def _tiles(image: Image.Image, side: int = 256) -> Iterator[tuple[tuple[slice, slice], Image.Image]]:
    """The image in tiles of at most side x side pixels, each with its window (rows, columns).

    256 was the fastest of 16..1024 for a turned 12-megapixel photo: a tile and its target fit the cache.
    """
    width, height = image.size
    for top in range(0, height, side):
        for left in range(0, width, side):
            bottom, right = min(top + side, height), min(left + side, width)
            yield (slice(top, bottom), slice(left, right)), image.crop((left, top, right, bottom))


def _finite_range(image: Image.Image) -> tuple[float, float]:
    """The least and the greatest finite sample; (inf, -inf) where there is none."""
    low, high = np.inf, -np.inf
    for _, tile in _tiles(image):
        samples = np.asarray(tile)
        finite = samples[np.isfinite(samples)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return low, high


def _stretch(samples: np.ndarray, low: float, high: float) -> np.ndarray:
    """Maps [low, high] to [0, 255], uint8; infinities to the nearer end, NaN to 0, everything to 0 if high <= low."""
    if high <= low:
        return np.zeros(samples.shape, np.uint8)
    stretched = (samples.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.nan_to_num(np.clip(stretched, 0, 255), nan=0)).astype(np.uint8)
