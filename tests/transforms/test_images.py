"""Expectations come from the arrays the files were made of, from the EXIF standard, or from plain Pillow."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from maskbeam.transforms.images import DecodedImage, ImageConfig, ImageError, decode_image, has_image_extension

HEIGHT, WIDTH = 5, 7
RGB = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
GREY = RGB[..., 0]
ALPHA = np.linspace(0, 255, HEIGHT * WIDTH).astype(np.uint8).reshape(HEIGHT, WIDTH)  # from invisible to opaque
PALETTE = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)
WORDS = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)  # 16-bit grey


def encode(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def decode(data: bytes, **settings: Any) -> np.ndarray:
    return decode_image(data, ImageConfig(**settings)).pixels


def plain_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, axis=-1).astype(np.uint8)


def png(bit_depth: int, color_type: int, rows: np.ndarray, size_wh: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    """A PNG as its specification says, for the sample sizes Pillow cannot write. Rows are (H, bytes) uint8."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", *size_wh, bit_depth, color_type, 0, 0, 0)
    scanlines = b"".join(b"\0" + row.tobytes() for row in rows)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")
    )


def tiff_12_bit(samples: np.ndarray) -> bytes:
    """An uncompressed 12-bit grey TIFF: two samples in three bytes, each row padded to whole bytes."""
    bits = samples[..., None] >> np.arange(11, -1, -1) & 1  # (H, W, 12), the highest first
    strip = np.packbits(bits.reshape(len(samples), -1).astype(np.uint8), axis=1).tobytes()
    tags = ImageFileDirectory_v2()
    tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength] = samples.shape[::-1]
    tags[ExifTags.Base.BitsPerSample], tags[ExifTags.Base.PhotometricInterpretation] = 12, 1
    tags[ExifTags.Base.StripOffsets], tags[ExifTags.Base.StripByteCounts] = 0, len(strip)  # the writer adds the offset
    buffer = io.BytesIO(b"II*\0\x08\0\0\0")
    buffer.seek(0, io.SEEK_END)
    tags.save(buffer)
    return buffer.getvalue() + strip


RGB_IMAGE = Image.fromarray(RGB)
RGBA_IMAGE = Image.fromarray(np.dstack([RGB, ALPHA]))
GREY_IMAGE = Image.fromarray(GREY)
GREY_ALPHA_IMAGE = Image.fromarray(np.dstack([GREY, ALPHA]))
ONE_BIT_IMAGE = Image.fromarray(GREY > 127)
PALETTE_IMAGE = Image.fromarray(GREY).copy()
PALETTE_IMAGE.putpalette(PALETTE.tobytes())
WORDS_IMAGE = Image.fromarray(WORDS)
BIG_ENDIAN_WORDS_IMAGE = Image.frombytes("I;16B", (WIDTH, HEIGHT), WORDS.astype(">u2").tobytes())
RGB_WORDS = np.stack([WORDS, WORDS[::-1], WORDS[:, ::-1]], axis=-1)  # 16-bit RGB

GREY_RGB = grey_to_rgb(GREY)
ONE_BIT_RGB = grey_to_rgb((GREY > 127) * 255)
PALETTE_RGB = PALETTE[GREY]
WORDS_RGB = grey_to_rgb(WORDS // 256)

LOSSLESS: dict[str, tuple[bytes, np.ndarray]] = {
    "png-rgb": (encode(RGB_IMAGE, "PNG"), RGB),
    "png-rgb-transparent-colour": (encode(RGB_IMAGE, "PNG", transparency=tuple(RGB[0, 0].tolist())), RGB),
    "png-rgb-alpha": (encode(RGBA_IMAGE, "PNG"), RGB),
    "png-rgb-16-bit": (png(16, 2, RGB_WORDS.astype(">u2").reshape(HEIGHT, -1)), (RGB_WORDS // 256).astype(np.uint8)),
    "png-grey": (encode(GREY_IMAGE, "PNG"), GREY_RGB),
    "png-grey-transparent-colour": (encode(GREY_IMAGE, "PNG", transparency=3), GREY_RGB),
    "png-grey-alpha": (encode(GREY_ALPHA_IMAGE, "PNG"), GREY_RGB),
    "png-grey-16-bit": (encode(WORDS_IMAGE, "PNG"), WORDS_RGB),
    "png-grey-2-bit": (
        png(2, 0, np.array([[0b00011011]], np.uint8), (4, 1)),
        grey_to_rgb(np.array([[0, 85, 170, 255]])),
    ),
    "png-1-bit": (encode(ONE_BIT_IMAGE, "PNG"), ONE_BIT_RGB),
    "png-palette": (encode(PALETTE_IMAGE, "PNG"), PALETTE_RGB),
    "png-palette-transparent-colour": (encode(PALETTE_IMAGE, "PNG", transparency=3), PALETTE_RGB),
    "png-palette-alpha": (encode(PALETTE_IMAGE, "PNG", transparency=bytes(range(256))), PALETTE_RGB),
    "webp-rgb": (encode(RGB_IMAGE, "WEBP", lossless=True), RGB),
    "webp-rgb-alpha": (encode(RGBA_IMAGE, "WEBP", lossless=True, exact=True), RGB),
    "bmp-rgb": (encode(RGB_IMAGE, "BMP"), RGB),
    "bmp-grey": (encode(GREY_IMAGE, "BMP"), GREY_RGB),
    "bmp-1-bit": (encode(ONE_BIT_IMAGE, "BMP"), ONE_BIT_RGB),
    "bmp-palette": (encode(PALETTE_IMAGE, "BMP"), PALETTE_RGB),
    "dib-rgb": (encode(RGB_IMAGE, "DIB"), RGB),
    "gif-grey": (encode(GREY_IMAGE, "GIF"), GREY_RGB),
    "gif-palette": (encode(PALETTE_IMAGE, "GIF", optimize=False), PALETTE_RGB),
    "gif-palette-transparent-colour": (encode(PALETTE_IMAGE, "GIF", optimize=False, transparency=3), PALETTE_RGB),
    "tiff-rgb": (encode(RGB_IMAGE, "TIFF"), RGB),
    "tiff-rgb-lzw": (encode(RGB_IMAGE, "TIFF", compression="tiff_lzw"), RGB),
    "tiff-rgb-deflate": (encode(RGB_IMAGE, "TIFF", compression="tiff_adobe_deflate"), RGB),
    "tiff-rgb-big-tiff": (encode(RGB_IMAGE, "TIFF", big_tiff=True), RGB),
    "tiff-rgb-alpha": (encode(RGBA_IMAGE, "TIFF"), RGB),
    "tiff-grey": (encode(GREY_IMAGE, "TIFF"), GREY_RGB),
    "tiff-grey-alpha": (encode(GREY_ALPHA_IMAGE, "TIFF"), GREY_RGB),
    "tiff-grey-12-bit": (tiff_12_bit(WORDS // 16), WORDS_RGB),
    "tiff-grey-16-bit": (encode(WORDS_IMAGE, "TIFF"), WORDS_RGB),
    "tiff-grey-16-bit-lzw": (encode(WORDS_IMAGE, "TIFF", compression="tiff_lzw"), WORDS_RGB),
    "tiff-grey-16-bit-big-endian": (encode(BIG_ENDIAN_WORDS_IMAGE, "TIFF"), WORDS_RGB),
    "tiff-1-bit": (encode(ONE_BIT_IMAGE, "TIFF"), ONE_BIT_RGB),
    "tiff-palette": (encode(PALETTE_IMAGE, "TIFF"), PALETTE_RGB),
    "tiff-palette-alpha": (encode(PALETTE_IMAGE.convert("PA"), "TIFF"), PALETTE_RGB),
}


@pytest.mark.parametrize(("data", "expected"), LOSSLESS.values(), ids=LOSSLESS)
@pytest.mark.filterwarnings("error")
def test_lossless_files_give_the_stored_colours(data: bytes, expected: np.ndarray) -> None:
    actual = decode(data)
    assert actual.dtype == np.uint8
    assert actual.flags.c_contiguous
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("samples", "dtype", "expected"),
    [
        ([-1.0, 0.0, 1.0], np.float32, [0, 128, 255]),  # 127.5 rounds to even
        ([0.0, np.nan, 5.0], np.float32, [0, 0, 255]),
        ([0.0, -np.inf, np.inf, 2.0], np.float32, [0, 0, 255, 255]),
        ([np.nan, np.inf], np.float32, [0, 0]),
        ([7.0, 7.0], np.float32, [0, 0]),
        ([-3.4e38, 3.4e38], np.float32, [0, 255]),
        ([-100_000, 0, 155_000], np.int32, [0, 100, 255]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_samples_without_a_nominal_range_are_stretched(samples: list[float], dtype: type, expected: list[int]) -> None:
    actual = decode(encode(Image.fromarray(np.array([samples], dtype)), "TIFF"))
    np.testing.assert_array_equal(actual, grey_to_rgb(np.array([expected])))


def test_stretching_uses_the_range_of_the_whole_image() -> None:
    ramp = np.arange(700, dtype=np.float32)[None, :]  # wider than the pieces that are converted at a time
    expected = grey_to_rgb(np.rint(np.arange(700)[None, :] * 255 / 699))
    np.testing.assert_array_equal(decode(encode(Image.fromarray(ramp), "TIFF")), expected)


PHOTO = Image.fromarray(np.random.default_rng(2).integers(0, 256, (9, 12, 3), np.uint8)).resize((600, 300))


@pytest.mark.parametrize(
    ("mode", "format_name", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("L", "PNG", {}),
        ("P", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("RGB", "WEBP", {}),
        ("P", "GIF", {}),
        ("RGB", "TIFF", {"compression": "jpeg"}),
        ("CMYK", "TIFF", {}),
        ("LAB", "TIFF", {}),
    ],
)
def test_eight_bit_files_equal_plain_pillow(mode: str, format_name: str, options: dict[str, Any]) -> None:
    data = encode(PHOTO.convert(mode), format_name, **options)
    np.testing.assert_array_equal(decode(data), plain_pillow(data))


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "GIF", "TIFF", "MPO"])
def test_first_of_several_frames(format_name: str) -> None:
    data = encode(PHOTO, format_name, save_all=True, append_images=[PHOTO.rotate(90)])
    np.testing.assert_array_equal(decode(data), plain_pillow(data))


@pytest.mark.parametrize("size_wh", [(1, 1), (1, 20000), (20000, 1), (256, 257)])
@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "BMP", "GIF", "JPEG"])
def test_unusual_sizes(format_name: str, size_wh: tuple[int, int]) -> None:
    data = encode(PHOTO.resize(size_wh), format_name)
    np.testing.assert_array_equal(decode(data), plain_pillow(data))


# EXIF 2.3, table of the tag Orientation: the visual side of the stored row 0, and that of the stored column 0.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """Puts every stored pixel where the standard says."""
    height, width = stored.shape[:2]
    seen = np.zeros((width, height, 3) if orientation >= 5 else (height, width, 3), np.uint8)
    row_0_side, column_0_side = SIDES[orientation]
    for row in range(height):
        for column in range(width):
            distance = {row_0_side: row, column_0_side: column}  # of the pixel from those two sides
            y = distance["top"] if "top" in distance else seen.shape[0] - 1 - distance["bottom"]
            x = distance["left"] if "left" in distance else seen.shape[1] - 1 - distance["right"]
            seen[y, x] = stored[row, column]
    return seen


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


ORIENTED: dict[str, dict[str, Any]] = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "TIFF-LZW": {"compression": "tiff_lzw"},
    "JPEG": {"quality": 95},
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ORIENTED)
def test_orientation_applied(format_name: str, orientation: int) -> None:
    name, options = format_name.split("-")[0], ORIENTED[format_name]
    stored = plain_pillow(encode(RGB_IMAGE, name, **options))
    actual = decode_image(encode(RGB_IMAGE, name, exif=exif(orientation), **options), ImageConfig(exif="apply"))
    assert actual.exif_orientation == orientation
    assert actual.pixels.flags.c_contiguous
    np.testing.assert_array_equal(actual.pixels, upright(stored, orientation))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ORIENTED)
def test_orientation_ignored_but_recorded(format_name: str, orientation: int) -> None:
    name, options = format_name.split("-")[0], ORIENTED[format_name]
    stored = plain_pillow(encode(RGB_IMAGE, name, **options))
    actual = decode_image(encode(RGB_IMAGE, name, exif=exif(orientation), **options), ImageConfig(exif="ignore"))
    assert actual.exif_orientation == orientation
    np.testing.assert_array_equal(actual.pixels, stored)


def test_orientation_of_an_image_larger_than_one_tile() -> None:
    stored = np.random.default_rng(3).integers(0, 256, (300, 520, 3), np.uint8)
    actual = decode(encode(Image.fromarray(stored), "PNG", exif=exif(6)))
    np.testing.assert_array_equal(actual, np.rot90(stored, k=-1))


def test_orientation_from_xmp() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert decode_image(encode(RGB_IMAGE, "JPEG", xmp=xmp), ImageConfig()).exif_orientation == 6


@pytest.mark.parametrize("tags", [exif(0), exif(9), b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", None])
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damaged EXIF
def test_no_valid_orientation_is_1(format_name: str, tags: Image.Exif | bytes | None) -> None:
    data = encode(RGB_IMAGE, format_name, **({"exif": tags} if tags else {}))
    actual = decode_image(data, ImageConfig())
    assert actual.exif_orientation == 1
    np.testing.assert_array_equal(actual.pixels, plain_pillow(data))


# One small file of each format, with what real ones have: EXIF, an animation's disposal, compression.
SMALL = PHOTO.resize((40, 30))
FILES: dict[str, bytes] = {
    "jpeg": encode(SMALL, "JPEG", exif=exif(6)),
    "jpeg-progressive": encode(SMALL, "JPEG", progressive=True),
    "png": encode(SMALL, "PNG", exif=exif(6)),
    "png-palette": encode(SMALL.convert("P"), "PNG", transparency=3),
    "gif": encode(SMALL.convert("P"), "GIF", disposal=2, duration=100),
    "tiff": encode(SMALL, "TIFF", exif=exif(6)),
    "tiff-lzw": encode(SMALL, "TIFF", compression="tiff_lzw"),
    "webp": encode(SMALL, "WEBP", exif=exif(6)),
    "webp-lossless": encode(SMALL, "WEBP", lossless=True),
    "bmp": encode(SMALL, "BMP"),
    "dib": encode(SMALL, "DIB"),
}


@pytest.mark.parametrize("name", FILES)
def test_pixel_limit_admits_its_own_number(name: str) -> None:
    assert decode(FILES[name], max_pixels=1200).size == 1200 * 3


@pytest.mark.parametrize("name", FILES)
def test_pixel_limit_refuses_one_more(name: str) -> None:
    with pytest.raises(ImageError, match=r"1200 pixels, more than the limit of 1199 .* raise --max_pixels"):
        decode(FILES[name], max_pixels=1199)


def test_pixel_limit_is_checked_before_the_pixels() -> None:
    claims_much_holds_nothing = png(8, 2, np.zeros((0, 0), np.uint8), size_wh=(60000, 50000))
    with pytest.raises(ImageError, match="60000 x 50000 = 3000000000 pixels"):
        decode(claims_much_holds_nothing)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF"])
def test_pillows_own_limit_does_not_apply(format_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(PHOTO, format_name, **({"disposal": 2, "duration": 100} if format_name == "GIF" else {}))
    expected = plain_pillow(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PHOTO.width * PHOTO.height // 2 - 1)  # it raises above twice this
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode(data), expected)


def test_pillows_own_limit_is_left_as_it_was() -> None:
    before = Image.MAX_IMAGE_PIXELS
    decode(FILES["tiff"])
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the cut EXIF
def test_truncated_files_fail(name: str) -> None:
    with pytest.raises(
        ImageError, match=r"(?s)^cannot decode this (JPEG|PNG|GIF|TIFF|WebP|BMP|DIB): .* fetch it again"
    ):
        decode(FILES[name][: len(FILES[name]) // 2])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cut_files_decode_in_full_or_not_at_all(name: str) -> None:
    expected = decode(FILES[name])
    for num_bytes in range(0, len(FILES[name]), 7):
        try:
            actual = decode(FILES[name][:num_bytes])
        except ImageError:
            continue
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"\0", "not an image"),
        (b"<!DOCTYPE html><html>", r"it begins with b'<!DOCTYPE html>.*Expected JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # Pillow would call Ghostscript
        (b"P6 1 1 255 abc", "not an image"),
        (b"\xff\xd8\xff", "cannot decode this JPEG"),
        (b"\x89PNG\r\n\x1a\n", "cannot decode this PNG"),
        (b"GIF89a", "cannot decode this GIF"),
        (b"II*\0", "cannot decode this TIFF"),
        (b"RIFF\0\0\0\0WEBP", "cannot decode this WebP"),
        (b"BM", "cannot decode this BMP"),
        (png(8, 2, np.zeros((0, 0), np.uint8), size_wh=(0, 5)), "cannot decode this PNG"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bytes_that_are_no_image(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data)


def changed_bytes(data: bytes, generator: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(generator.randint(1, 8)):
        damaged[generator.randrange(len(data))] = generator.randrange(256)
    return bytes(damaged)


def changed_header(data: bytes, generator: random.Random) -> bytes:
    damaged = bytearray(data)
    damaged[generator.randrange(min(64, len(data)))] = generator.randrange(256)
    return bytes(damaged)


@pytest.mark.parametrize("damage", [changed_bytes, changed_header])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_decode_or_raise_image_error(name: str, damage: Callable[[bytes, random.Random], bytes]) -> None:
    generator = random.Random(name)
    for _ in range(100):
        try:
            actual = decode_image(damage(FILES[name], generator), ImageConfig(max_pixels=100_000))
        except ImageError as error:
            assert str(error)
        else:
            assert isinstance(actual, DecodedImage)
            assert actual.pixels.shape[2:] == (3,)
            assert actual.exif_orientation in range(1, 9)


def test_threads_decode_independently() -> None:
    files = list(FILES.values()) * 8
    with ThreadPoolExecutor(8) as executor:
        for actual, data in zip(executor.map(decode, files), files, strict=True):
            np.testing.assert_array_equal(actual, decode(data))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exif": "rotate"}, "exif is 'rotate', but must be 'apply' or 'ignore'"),
        ({"max_pixels": 0}, "max_pixels is 0, but must be 1 or more"),
        ({"max_pixels": 2**32}, "max_pixels is 4294967296, but must be at most 4294967295"),
    ],
)
def test_bad_settings_say_what_to_use(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageConfig(**settings)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", True),
        ("gs://bucket/a.b/IMG_1.JPEG", True),
        ("a.tif", True),
        ("a.webp", True),
        ("a.jpg.txt", False),
        ("a.heic", False),
        ("jpg", False),
        ("a.jpg/readme", False),
        ("", False),
    ],
)
def test_has_image_extension(name: str, expected: bool) -> None:
    assert has_image_extension(name) is expected
