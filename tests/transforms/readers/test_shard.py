"""Reading shards: good files of every format and compression, broken ones of every kind, and cutting into chunks."""

import bz2
import gc
import gzip
import io
import itertools
import lzma
import os
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from maskbeam.transforms import chunks as cutting
from maskbeam.transforms import read_chunks as reading
from maskbeam.transforms.files import streams as source
from maskbeam.transforms.read_chunks import read_chunks
from maskbeam.transforms.readers import parquet, shard, tar, tfrecord
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.readers.shard import read_images
from maskbeam.transforms.readers.tfrecord import _tensorflow
from maskbeam.transforms.records import Annotations, EncodedImage, Shard, SourceFile, escape_name, unescape_name
from tests.conftest import photo_bytes

# Bytes that no compression shortens, so that cuts fall where the tests expect them.
IMAGES = [np.random.default_rng(number).bytes(3000) for number in range(5)]

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "gzip": gzip.compress,
    "gzip members": lambda data: gzip.compress(data[:5000]) + gzip.compress(data[5000:]),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.compress,
    "zstd frames": lambda data: zstandard.compress(data[:5000]) + zstandard.compress(data[5000:]),
    "zlib": zlib.compress,
}


def example_bytes(**features: bytes | int | float | str) -> bytes:
    """A serialized tf.train.Example; the first `_` of a name stands for `/`."""
    import tensorflow as tf

    example = tf.train.Example()
    for name, value in features.items():
        feature = example.features.feature[name.replace("_", "/", 1)]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        elif isinstance(value, float):
            feature.float_list.value.append(value)
        else:
            feature.int64_list.value.append(int(value))
    return example.SerializeToString()


def frame(record: bytes) -> bytes:
    """TFRecord framing, written down from the format's description and not from our reader."""

    def masked_crc(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)

    length = struct.pack("<Q", len(record))
    return length + masked_crc(length) + record + masked_crc(record)


def tfrecord_bytes(images: list[bytes]) -> bytes:
    return b"".join(frame(example_bytes(image_encoded=image)) for image in images)


def tar_bytes(*members: tuple[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def images_tar(images: list[bytes]) -> bytes:
    return tar_bytes(*((f"{number}.jpg", image) for number, image in enumerate(images)))


def parquet_bytes(columns: dict[str, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def images_parquet(images: list[bytes]) -> bytes:
    return parquet_bytes({"image": pa.array(images, pa.binary())})


MAKERS: dict[str, Callable[[list[bytes]], bytes]] = {
    "tfrecord": tfrecord_bytes,
    "tar": images_tar,
    "parquet": images_parquet,
}


def make_shard(root: Path, shard_format: str, data: bytes, name: str = "shard", **fields: Any) -> Shard:
    path = root / name
    path.write_bytes(data)
    return Shard(name, str(path), shard_format, (SourceFile(str(path), len(data)),), **fields)


def make_loose(root: Path, files: dict[str, bytes], **fields: Any) -> Shard:
    for name, data in files.items():
        (root / name).write_bytes(data)
    sources = tuple(SourceFile(str(root / name), len(data)) for name, data in files.items())
    return Shard("@root", str(root), "image", sources, **fields)


def read_all(root: Path, shard: Shard, config: ReadConfig | None = None) -> list[EncodedImage]:
    images = list(read_images(shard, config or ReadConfig(), str(root)))
    rows = [None] * len(images) if shard.format == "image" else [*range(len(images))]
    assert [image.row for image in images] == rows
    assert all((image.failure is None) == bool(image.data) for image in images)
    return images


def read_bytes(root: Path, shard_format: str, data: bytes, config: ReadConfig | None = None) -> list[EncodedImage]:
    return read_all(root, make_shard(root, shard_format, data), config)


def reason(image: EncodedImage) -> str:
    assert image.failure is not None and image.failure.stage == "read"
    return image.failure.reason


# Good files.


@pytest.mark.parametrize("compression", list(COMPRESSIONS))
@pytest.mark.parametrize("shard_format", ["tfrecord", "tar"])
def test_reads_every_compression_whatever_the_name(shard_format: str, compression: str, tmp_path: Path) -> None:
    images = read_bytes(tmp_path, shard_format, COMPRESSIONS[compression](MAKERS[shard_format](IMAGES)))
    assert [image.data for image in images] == IMAGES


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli"])
def test_reads_every_parquet_compression(compression: str, tmp_path: Path) -> None:
    data = parquet_bytes({"image": IMAGES}, compression=compression, row_group_size=2)
    assert [image.data for image in read_bytes(tmp_path, "parquet", data)] == IMAGES


@pytest.mark.parametrize("shard_format", list(MAKERS))
def test_image_ids_are_paths_and_rows(shard_format: str, tmp_path: Path) -> None:
    shard = make_shard(tmp_path, shard_format, MAKERS[shard_format](IMAGES[:2]))
    images = list(read_images(shard, ReadConfig(), str(tmp_path.parent)))
    assert [image.image_id for image in images] == [f"{tmp_path.name}/shard#0", f"{tmp_path.name}/shard#1"]


@pytest.mark.parametrize("shard_format", list(MAKERS))
def test_empty_but_valid_shard_has_no_images(shard_format: str, tmp_path: Path) -> None:
    data = gzip.compress(b"") if shard_format == "tfrecord" else MAKERS[shard_format]([])
    assert read_bytes(tmp_path, shard_format, data) == []


def test_record_that_looks_like_gzip_is_read(tmp_path: Path) -> None:
    # The length is the first thing in a file: 0x088b1f = 559903 is what gzip files begin with.
    overhead = len(example_bytes(image_encoded=bytes(559_000))) - 559_000
    data = frame(example_bytes(image_encoded=bytes(559_903 - overhead)))
    assert data[:3] == b"\x1f\x8b\x08"
    assert [len(image.data) for image in read_bytes(tmp_path, "tfrecord", data)] == [559_903 - overhead]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_every_tar_format(tar_format: int, tmp_path: Path) -> None:
    data = tar_bytes(("x^2.jpg", b"a"), ("d/" * 40 + "long" * 14 + ".jpg", b"b"), tar_format=tar_format)
    assert [image.data for image in read_bytes(tmp_path, "tar", data)] == [b"a", b"b"]


@pytest.mark.parametrize(
    ("features", "key", "file_name"),
    [
        ({"image_encoded": b"x", "image": b"no"}, None, None),
        ({"image": b"x", "image_source_id": b"7", "image_filename": b"a.jpg"}, "7", "a.jpg"),
        ({"image": b"x", "image_id": 7}, "7", None),
        ({"image": b"x", "image_source_id": b"", "image_id": 8}, "8", None),
        ({"image": b"x", "image_source_id": b"a\0\n\xff"}, "a\0\n\\xff", None),
        ({"image": 3, "jpeg": b"x"}, None, None),
    ],
)
def test_first_feature_present_wins(
    features: dict[str, Any], key: str | None, file_name: str | None, tmp_path: Path
) -> None:
    (image,) = read_bytes(tmp_path, "tfrecord", frame(example_bytes(**features)))
    assert (image.data, image.key, image.file_name) == (b"x", key, file_name)


def test_feature_names_can_be_chosen(tmp_path: Path) -> None:
    config = ReadConfig(tfrecord_image=("pixels",), tfrecord_key=("who",))
    data = frame(example_bytes(image=b"no", pixels=b"x", who=b"me"))
    (image,) = read_bytes(tmp_path, "tfrecord", data, config)
    assert (image.data, image.key) == (b"x", "me")


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.mark.parametrize(
    ("columns", "key", "file_name"),
    [
        ({"image": pa.array([{"bytes": b"x", "path": "a.jpg"}], STRUCT)}, None, "a.jpg"),
        ({"image": pa.array([{"bytes": b"x", "path": "a.jpg"}], STRUCT), "file_name": ["b.jpg"]}, None, "b.jpg"),
        ({"image": pa.array([b"x"], pa.large_binary()), "image_id": [7]}, "7", None),
        ({"jpg": [b"x"], "key": ["000"], "url": ["u"]}, "000", None),
        ({"image": ["http://x"], "bytes": [b"x"]}, None, None),
        ({"bytes": [b"x"], "id": pa.array([None], pa.string())}, None, None),
    ],
)
def test_first_column_of_bytes_wins(columns: dict[str, Any], key: str | None, file_name: str, tmp_path: Path) -> None:
    (image,) = read_bytes(tmp_path, "parquet", parquet_bytes(columns))
    assert (image.data, image.key, image.file_name) == (b"x", key, file_name)


def test_webdataset_sample_is_its_photo(tmp_path: Path) -> None:
    data = tar_bytes(
        ("d.1/a.json", b"{}"), ("d.1/a.jpg", b"1"), ("d.1/a.seg.png", b"no"), ("d.1/b.PNG", b"2"), ("c.cls", b"3")
    )
    images = read_bytes(tmp_path, "tar", data)
    assert [(image.key, image.file_name, image.data) for image in images] == [
        ("d.1/a", "d.1/a.jpg", b"1"),
        ("d.1/b", "d.1/b.PNG", b"2"),
        ("c", None, b""),
    ]
    assert reason(images[2]) == "the sample has no image file. Members: 'c.cls'"


def names_of(*members: str) -> list[str | None]:
    """The members of a tar that images are made of."""
    reading = tar.read_tar(io.BufferedReader(io.BytesIO(tar_bytes(*((name, b"x") for name in members)))), ReadConfig())
    return [sample.file_name for sample in reading]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["0.jpg", "0.json", "0.seg.png"], ["0.jpg"]),
        (["0.depth.png", "0.edges.png", "0.jpg", "0.seg.png"], ["0.jpg"]),
        (["0.jpg", "0.png"], ["0.jpg", "0.png"]),
        (["0.jpg", "0.jpg", "0.jpg"], ["0.jpg", "0.jpg", "0.jpg"]),
        (["0.a.png", "0.jpg", "0.b.png", "0.jpg", "0.c.png"], ["0.jpg", "0.jpg"]),
        (["0.a.png", "0.a.png"], ["0.a.png", "0.a.png"]),
        (["0.jpg", "1.jpg", "0.jpg"], ["0.jpg", "1.jpg", "0.jpg"]),
        (["0.0.png", "0.1.png", "0.jpg"], ["0.jpg"]),  # masks of instances
        (["d.1/0.seg.png", "d.1/0.jpg"], ["d.1/0.jpg"]),
        # Without a photo of the key's name nothing says which one is meant.
        (["2024.01.01.jpg", "2024.01.02.jpg"], ["2024.01.01.jpg", "2024.01.02.jpg"]),
        (["0.left.jpg", "0.json", "0.right.jpg", "1.left.jpg"], ["0.left.jpg", "0.right.jpg", "1.left.jpg"]),
        (["a.v1.jpg", "a.v2.jpg", "b.jpg", "b.v2.jpg"], ["a.v1.jpg", "a.v2.jpg", "b.jpg"]),
        ([".hidden.jpg", ".other.jpg"], [".hidden.jpg", ".other.jpg"]),
        (["0.json", "1.seg.png"], [None, "1.seg.png"]),
    ],
)
def test_no_image_of_a_tar_is_lost(members: list[str], expected: list[str | None]) -> None:
    assert names_of(*members) == expected


IMAGE_NAMES = ["0.jpg", "0.png", "0.seg.png", "0.depth.png", "1.jpg", "1.left.jpg", "1.right.jpg"]


@settings(deadline=None)
@given(members=st.lists(st.sampled_from([*IMAGE_NAMES, "0.json"]), max_size=30), held=st.integers(0, 5))
def test_every_image_of_a_tar_is_a_row_or_a_counted_annotation(members: list[str], held: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar, "HELD_IMAGES", held)
        source: Any = io.BufferedReader(io.BytesIO(tar_bytes(*((name, b"x") for name in members))))
        samples = [sample for sample in tar.read_tar(source, ReadConfig()) if sample.reason is None]
    rows = [sample.file_name for sample in samples]
    counted = sum((sample.annotations for sample in samples), Annotations())
    assert len(rows) + counted.images == sum(name != "0.json" for name in members)
    for name in ("0.jpg", "0.png", "1.jpg"):
        assert rows.count(name) == members.count(name)
    given = {f"{number}.{name}" for number in "01" for name in counted.names}
    assert all(members.count(name) == rows.count(name) for name in IMAGE_NAMES if name not in given)


def test_annotations_of_a_photo_are_counted_and_named(tmp_path: Path) -> None:
    names = ["a.mask.png", "a.jpg", "a.seg.png", "a.json", "a.seg.png", "b.jpg", "c.left.jpg"]
    images = read_bytes(tmp_path, "tar", tar_bytes(*((name, b"x") for name in names)))
    assert [(image.file_name, image.annotations) for image in images] == [
        ("a.jpg", Annotations(3, ("mask.png", "seg.png"))),
        ("b.jpg", Annotations()),
        ("c.left.jpg", Annotations()),
    ]


def test_names_of_annotations_are_few() -> None:
    many = sum((Annotations(1, (f"{number:02}.png",)) for number in range(40)), Annotations())
    assert many == Annotations(40, tuple(f"{number:02}.png" for number in range(10)))


def test_images_of_one_key_are_rows_of_their_own(tmp_path: Path) -> None:
    images = read_bytes(tmp_path, "tar", tar_bytes(("d/2024.01.01.jpg", b"1"), ("d/2024.01.02.jpg", b"2")))
    assert [(image.image_id, image.key, image.file_name, image.data) for image in images] == [
        ("shard#0", "d/2024", "d/2024.01.01.jpg", b"1"),
        ("shard#1", "d/2024", "d/2024.01.02.jpg", b"2"),
    ]


@pytest.mark.parametrize(("limit", "value"), [("HELD_IMAGES", 3), ("HELD_BYTES", 3)])
def test_images_that_wait_for_a_photo_are_few(limit: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the fourth nothing is taken for an annotation any more, so nothing is lost, and nothing waits."""
    monkeypatch.setattr(tar, limit, value)
    names = [f"2024.{number}.jpg" for number in range(8)]
    assert names_of(*names[:3], "2024.jpg", *names[3:]) == ["2024.jpg"]
    assert names_of(*names[:4], "2024.jpg", *names[4:]) == [*names[:4], "2024.jpg", *names[4:]]


def test_cut_tar_gives_the_images_that_waited(tmp_path: Path) -> None:
    data = tar_bytes(("0.left.jpg", b"1"), ("0.right.jpg", b"2"), ("0.up.jpg", b"3" * 1000))
    *good, last = read_bytes(tmp_path, "tar", data[: 2048 + 512 + 100])
    assert [image.data for image in good] == [b"1", b"2"]
    assert "after member '0.up.jpg'" in reason(last)


def test_tar_links_are_not_followed_and_directories_skipped(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        device = tarfile.TarInfo("c.jpg")
        device.type = tarfile.CHRTYPE
        tar.addfile(device)
    images = read_bytes(tmp_path, "tar", buffer.getvalue())
    assert [reason(image).partition("Members: ")[2] for image in images] == ["'a.jpg'", "'b.jpg'", "'c.jpg'"]


def test_metadata_files_of_macos_do_not_tear_samples_apart(tmp_path: Path) -> None:
    data = tar_bytes(("d/._a.jpg", b"no"), ("d/a.jpg", b"1"), ("d/._a.json", b"no"), ("d/a.json", b"{}"))
    assert [image.key for image in read_bytes(tmp_path, "tar", data)] == ["d/a"]


@pytest.mark.parametrize("name", ["../../up.jpg", "/abs.jpg", "new\nline.jpg", "\u202eevil.jpg", "a" * 300 + ".jpg"])
def test_hostile_member_names_are_only_text(name: str, tmp_path: Path) -> None:
    (image,) = read_bytes(tmp_path, "tar", tar_bytes((name, b"x")))
    assert (image.file_name, image.data) == (name, b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["shard"]


def test_tar_names_that_are_no_utf8_can_be_stored(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        info = tarfile.TarInfo("\xff.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    (image,) = read_bytes(tmp_path, "tar", buffer.getvalue())
    assert (image.key, image.file_name) == ("\\xff", "\\xff.jpg")


def test_tar_members_whose_names_differ_stay_apart(tmp_path: Path) -> None:
    """One has a byte that is not UTF-8, the other one spells out how that is written."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("\xff.jpg", "\\xff.jpg", "\\xff.seg.png"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    images = read_bytes(tmp_path, "tar", buffer.getvalue())
    assert [(image.key, image.file_name) for image in images] == [
        ("\\xff", "\\xff.jpg"),
        ("\\x5cxff", "\\x5cxff.jpg"),
    ]


# What file systems allow in a name, with what escapes are made of more often than by chance.
file_names = st.lists(
    st.sampled_from([b"\\", b"x", b"5", b"c", b"e", b"9", b"\\x", b"\\x5c", b"\\xe9", b"\xe9", b"\xc3", b"\xa9"])
    | st.binary(min_size=1, max_size=3).filter(lambda name: not {0, ord("/")} & set(name)),
    min_size=1,
    max_size=6,
).map(b"".join)


@settings(max_examples=500)
@given(file_names)
def test_escaped_names_are_text_that_leads_back_to_the_name(name: bytes) -> None:
    """So different names stay different."""
    text = os.fsdecode(name)
    escaped = escape_name(text)
    escaped.encode()  # raises if UTF-8 cannot store it
    assert unescape_name(escaped) == text


@pytest.mark.parametrize("name", ["a.jpg", "caf\xe9 \u732b.png", "a\\b.jpg", "\\", "\\x41", "100%", "\\xE9", "\\u1234"])
def test_ordinary_names_are_not_escaped(name: str) -> None:
    assert escape_name(name) == name


@given(names=st.sets(file_names, min_size=1, max_size=3), shard_format=st.sampled_from(["image", "tar"]))
def test_different_files_have_different_ids(names: set[bytes], shard_format: str) -> None:
    ids = []
    for name in sorted(names):
        path = "/data/" + os.fsdecode(name)  # is not there: a failed row
        shard = Shard("s", path, shard_format, (SourceFile(path, 1),))
        (image,) = read_images(shard, ReadConfig(), "/data")
        ids.append(image.image_id)
    assert len(set(ids)) == len(names)


def test_loose_files(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    shard = make_loose(tmp_path / "d", {"a.jpg": b"1", "b\n.jpg": b"2", "\udcff.jpg": b"3"})
    images = read_all(tmp_path, shard)
    assert [(image.image_id, image.row, image.file_name, image.data) for image in images] == [
        ("d/a.jpg", None, "a.jpg", b"1"),
        ("d/b\n.jpg", None, "b\n.jpg", b"2"),
        ("d/\\xff.jpg", None, "\\xff.jpg", b"3"),
    ]


@pytest.mark.parametrize("shard_format", list(MAKERS))
@pytest.mark.parametrize("limit", [1, 3, 5, 9])
def test_max_images_stops_early(shard_format: str, limit: int, tmp_path: Path) -> None:
    shard = make_shard(tmp_path, shard_format, MAKERS[shard_format](IMAGES), max_images=limit)
    assert [image.data for image in read_all(tmp_path, shard)] == IMAGES[:limit]


# Broken files.


@pytest.mark.parametrize("shard_format", list(MAKERS))
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (b"x", "the file begins with b'x'"),
        (b"<!DOCTYPE html><html>" * 100, "the file begins with b'<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\n" * 20, "the file begins with b'version https://'"),
        (np.random.default_rng(0).bytes(5000), "breaks off here"),
        (gzip.compress(b"<html>" * 900, mtime=0)[:-9], "the file begins with"),
    ],
)
def test_file_of_another_format_is_one_failed_row(shard_format: str, data: bytes, message: str, tmp_path: Path) -> None:
    (image,) = read_bytes(tmp_path, shard_format, data)
    assert image.image_id == "shard#0"
    assert message.replace("\\", "") in reason(image)


@pytest.mark.parametrize("compression", list(COMPRESSIONS))
@pytest.mark.parametrize("percent", [1, 30, 50, 70, 85])  # the last 12 % of the tar are padding
@pytest.mark.parametrize("shard_format", ["tfrecord", "tar"])
def test_cut_file_gives_its_good_images_and_one_failed_row(
    shard_format: str, percent: int, compression: str, tmp_path: Path
) -> None:
    whole = COMPRESSIONS[compression](MAKERS[shard_format](IMAGES))
    *good, last = read_bytes(tmp_path, shard_format, whole[: len(whole) * percent // 100])
    assert [image.data for image in good] == IMAGES[: len(good)]
    assert "breaks off here" in reason(last)


@pytest.mark.parametrize("compress", [bytes, lambda data: gzip.compress(data, compresslevel=0)], ids=["none", "gzip"])
@pytest.mark.parametrize("images", [0, 1, 2, 4])
@pytest.mark.parametrize("spare_bytes", [600, 3000])
def test_cut_tar_gives_all_its_whole_images(
    images: int, spare_bytes: int, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    kept = images * (512 + 3072) + spare_bytes  # of an archive that gzip makes 23 bytes longer
    *good, last = read_bytes(tmp_path, "tar", compress(images_tar(IMAGES))[:kept])
    assert [image.data for image in good] == IMAGES[:images]
    assert f"after member '{images}.jpg'" in reason(last)


@pytest.mark.parametrize(("cut", "good"), [(2999, 0), (13, 0), (3100, 1), (9000, 2)])
def test_cut_tfrecord_names_the_byte(cut: int, good: int, tmp_path: Path) -> None:
    size = len(tfrecord_bytes(IMAGES[:1]))
    images = read_bytes(tmp_path, "tfrecord", tfrecord_bytes(IMAGES)[:cut])
    assert len(images) == good + 1
    assert f"cut within the record at byte {good * size}" in reason(images[-1])


@pytest.mark.parametrize("spare_bytes", [1, 8, 11])
def test_cut_header_of_a_tfrecord_is_reported(spare_bytes: int, tmp_path: Path) -> None:
    size = len(tfrecord_bytes(IMAGES[:1]))
    *good, last = read_bytes(tmp_path, "tfrecord", tfrecord_bytes(IMAGES)[: 2 * size + spare_bytes])
    assert [image.data for image in good] == IMAGES[:2]
    assert f"cut within the header at byte {2 * size}" in reason(last)


def test_cut_between_tfrecords_cannot_be_seen(tmp_path: Path) -> None:
    data = tfrecord_bytes(IMAGES)[: 2 * len(tfrecord_bytes(IMAGES[:1]))]
    assert [image.data for image in read_bytes(tmp_path, "tfrecord", data)] == IMAGES[:2]


@pytest.mark.parametrize("members", [1, 3, 5])
def test_tar_without_its_end_is_reported(members: int, tmp_path: Path) -> None:
    *good, last = read_bytes(tmp_path, "tar", images_tar(IMAGES)[: members * 3584])
    assert [image.data for image in good] == IMAGES[:members]
    assert f"after member '{members - 1}.jpg', at byte {members * 3584}" in reason(last)


def test_damaged_tar_header_is_reported(tmp_path: Path) -> None:
    data = bytearray(images_tar(IMAGES))
    data[2 * 3584 + 150] ^= 0xFF  # in the checksum of the third header
    *good, last = read_bytes(tmp_path, "tar", bytes(data))
    assert [image.data for image in good] == IMAGES[:2]
    assert "after member '1.jpg'" in reason(last)


def test_tar_cut_after_a_samples_image_gives_the_image(tmp_path: Path) -> None:
    data = tar_bytes(("a.jpg", b"1"), ("a.json", b"{}" * 500))
    *good, last = read_bytes(tmp_path, "tar", data[: 1024 + 512 + 100])
    assert [image.data for image in good] == [b"1"]
    assert "after member 'a.json'" in reason(last)


def test_joined_tars_are_reported(tmp_path: Path) -> None:
    *good, last = read_bytes(tmp_path, "tar", images_tar(IMAGES[:2]) + images_tar(IMAGES[2:]))
    assert [image.data for image in good] == IMAGES[:2]
    assert "more data follows" in reason(last)


def test_damaged_checksum_of_gzip_is_reported(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(images_tar(IMAGES)))
    data[-6] ^= 0xFF
    *good, last = read_bytes(tmp_path, "tar", bytes(data))
    assert [image.data for image in good] == IMAGES
    assert "CRC check failed" in reason(last)


def test_damaged_tfrecord_is_a_failed_row_and_reading_goes_on(tmp_path: Path) -> None:
    size = len(tfrecord_bytes(IMAGES[:1]))
    data = bytearray(tfrecord_bytes(IMAGES))
    data[size + 1000] ^= 0xFF
    images = read_bytes(tmp_path, "tfrecord", bytes(data))
    assert [image.data for image in images] == [IMAGES[0], b"", *IMAGES[2:]]
    assert reason(images[1]) == f"the record at byte {size} is damaged: its checksum is wrong"


def test_damaged_tfrecord_length_ends_the_shard(tmp_path: Path) -> None:
    size = len(tfrecord_bytes(IMAGES[:1]))
    data = bytearray(tfrecord_bytes(IMAGES))
    data[size] ^= 0xFF
    images = read_bytes(tmp_path, "tfrecord", bytes(data))
    assert [image.data for image in images] == [IMAGES[0], b""]
    assert f"at byte {size} there is no TFRecord header" in reason(images[1])


@pytest.mark.parametrize(("length", "message"), [(2**29, "is cut within"), (2**62, f"has {2**62} bytes; at most")])
def test_absurd_length_allocates_nothing(length: int, message: str, tmp_path: Path) -> None:
    import tracemalloc

    header = struct.pack("<Q", length)
    crc = google_crc32c.value(header)
    masked = struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)
    data = tfrecord_bytes(IMAGES[:1]) + header + masked + b"x" * 100
    read_bytes(tmp_path, "tfrecord", data)  # imports tensorflow
    tracemalloc.start()
    try:
        images = read_bytes(tmp_path, "tfrecord", data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message in reason(images[1])
    assert peak < 8 * 2**20


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\xff\xfe not a message", "no tf.train.Example; it begins with"),
        (b"", "no image feature. Features: none"),
        ({"label": 1, "height": 2.0, "image": 3}, "height (float_list), image (int64_list), label (int64_list)"),
        ({"image": b""}, "the image has no bytes"),
    ],
)
def test_record_without_an_image_is_a_failed_row(record: Any, message: str, tmp_path: Path) -> None:
    data = record if isinstance(record, bytes) else example_bytes(**record)
    images = read_bytes(tmp_path, "tfrecord", frame(data) + tfrecord_bytes(IMAGES[:1]))
    assert message in reason(images[0])
    assert images[1].data == IMAGES[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"bytes": None, "path": "a.jpg"}, "image has no bytes, only the path 'a.jpg'"),
        ({"bytes": None, "path": None}, "image is null"),
        (None, "image is null"),
        ({"bytes": b"", "path": None}, "the image has no bytes"),
    ],
)
def test_parquet_row_without_bytes_is_a_failed_row(value: Any, message: str, tmp_path: Path) -> None:
    data = parquet_bytes({"image": pa.array([value, {"bytes": b"x", "path": None}], STRUCT)})
    images = read_bytes(tmp_path, "parquet", data)
    assert message in reason(images[0])
    assert images[1].data == b"x"


@pytest.mark.clients
def test_what_is_said_of_parquet_that_holds_only_paths_works(tmp_path: Path) -> None:
    import datasets

    photo = tmp_path / "a.png"
    photo.write_bytes(photo_bytes(1))
    dataset = datasets.Dataset.from_dict({"image": [str(photo)]}).cast_column("image", datasets.Image())
    stored = tmp_path / "stored.parquet"
    dataset.to_parquet(str(stored))
    (image,) = read_bytes(tmp_path, "parquet", stored.read_bytes())
    said = reason(image).partition("before to_parquet: ")[2]
    names = {"datasets": datasets, "dataset": dataset}
    exec(said, names)
    names["dataset"].to_parquet(str(stored))
    (image,) = read_bytes(tmp_path, "parquet", stored.read_bytes())
    assert image.failure is None and image.data == photo_bytes(1)


def test_parquet_without_an_image_column_names_its_columns(tmp_path: Path) -> None:
    (image,) = read_bytes(tmp_path, "parquet", parquet_bytes({"url": ["u", "v"], "image": ["a", "b"]}))
    assert "no image column. Columns: url (string), image (string)" in reason(image)


def test_missing_package_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    _tensorflow.cache_clear()  # earlier tests loaded it
    with pytest.raises(ImportError):
        read_bytes(tmp_path, "tfrecord", frame(b""))


def test_reason_is_of_bounded_length(tmp_path: Path) -> None:
    (image,) = read_bytes(tmp_path, "parquet", parquet_bytes({f"column {number}": [1] for number in range(500)}))
    assert len(reason(image)) == 1000


def test_cut_parquet_is_one_failed_row(tmp_path: Path) -> None:
    (image,) = read_bytes(tmp_path, "parquet", images_parquet(IMAGES)[:-100])
    assert "it is no Parquet file, or its end is missing" in reason(image)


def test_damaged_parquet_page_gives_the_rows_before_it(tmp_path: Path) -> None:
    data = bytearray(parquet_bytes({"image": IMAGES}, row_group_size=2, use_dictionary=False, compression="zstd"))
    start = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 40] = bytes(40)
    *good, last = read_bytes(tmp_path, "parquet", bytes(data))
    assert [image.data for image in good] == IMAGES[:2]
    assert "at row 2 of 5" in reason(last)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(MAKERS)),
    st.sampled_from(["none", "gzip", "xz", "zstd"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    st.floats(0, 1),
)
def test_no_damage_raises(
    tmp_path_factory: pytest.TempPathFactory,
    shard_format: str,
    compression: str,
    changes: list[tuple[float, int]],
    kept: float,
) -> None:
    data = bytearray(COMPRESSIONS[compression](MAKERS[shard_format]([b"abc" * 50] * 4)))
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    read_bytes(tmp_path_factory.mktemp("damaged"), shard_format, bytes(data[: int(kept * len(data))]))


def test_large_file_fails_without_being_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (shard, tar, tfrecord, parquet):
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 1000)
    assert (
        reason(read_all(tmp_path, make_loose(tmp_path, {"a.jpg": b"x" * 1001}))[0])
        == "the file is larger than 1000 bytes"
    )
    images = read_bytes(tmp_path, "tar", tar_bytes(("a.jpg", b"x" * 1001), ("b.jpg", b"x" * 1000)))
    assert "member 'a.jpg' has 1001 bytes" in reason(images[0])
    assert images[1].failure is None


# File systems that fail.


class Flaky:
    """Stands in for FileSystems: some of its opens and reads fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int, int], bool]) -> None:
        self.reads = 0
        self.waits: list[float] = []
        self._fails = fails
        monkeypatch.setattr(source.FileSystems, "open", self.open)
        monkeypatch.setattr(source.time, "sleep", self.waits.append)

    def open(self, path: str, compression_type: str) -> "FlakyFile":
        return FlakyFile(self, open(path, "rb"))

    def check(self, position: int) -> None:
        self.reads += 1
        if self._fails(self.reads, position):
            raise RuntimeError("503 Service Unavailable")  # Beam's file systems do not only raise OSError


class FlakyFile:
    def __init__(self, system: Flaky, file: io.BufferedReader) -> None:
        self._system, self._file = system, file
        self.tell, self.seek, self.close = file.tell, file.seek, file.close

    def read(self, num_bytes: int) -> bytes:
        self._system.check(self._file.tell())
        return self._file.read(min(num_bytes, 1000))


@pytest.mark.parametrize("shard_format", list(MAKERS))
def test_failing_reads_are_tried_again(shard_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = make_shard(tmp_path, shard_format, MAKERS[shard_format](IMAGES))
    system = Flaky(monkeypatch, lambda reads, position: reads % 3 != 0)
    assert [image.data for image in read_all(tmp_path, shard)] == IMAGES
    assert system.waits[:4] == [0.2, 1.0, 0.2, 1.0]


def test_container_that_cannot_be_read_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = make_shard(tmp_path, "tar", images_tar(IMAGES))
    monkeypatch.setattr(source, "BUFFER_BYTES", 512)
    Flaky(monkeypatch, lambda reads, position: position >= 8000)
    *good, last = read_all(tmp_path, shard)
    assert [image.data for image in good] == IMAGES[:2]
    assert "reading failed 3 times: RuntimeError: 503 Service Unavailable" in reason(last)


def test_loose_file_that_cannot_be_read_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = make_loose(tmp_path, {"a.jpg": b"1", "b.jpg": b"2"})
    system = Flaky(monkeypatch, lambda reads, position: reads <= 3)
    images = read_all(tmp_path, shard)
    assert "reading failed 3 times" in reason(images[0])
    assert (images[1].data, len(system.waits)) == (b"2", 2)


def test_missing_files_are_failed_rows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source.time, "sleep", lambda seconds: pytest.fail("waited"))
    loose = make_loose(tmp_path, {"a.jpg": b"1", "b.jpg": b"2"})
    tar = make_shard(tmp_path, "tar", images_tar(IMAGES))
    (tmp_path / "a.jpg").unlink()
    Path(tar.path).unlink()
    images = read_all(tmp_path, loose)
    assert "No such file" in reason(images[0])
    assert images[1].data == b"2"
    assert "FileNotFoundError" in reason(read_all(tmp_path, tar)[0])


# Chunks.


def chunks_of(shard: Shard, chunk_size: int, finished: set[int] = frozenset()) -> list[Any]:  # type: ignore[assignment]
    return list(read_chunks(shard, ReadConfig(), str(Path(shard.path).parent), chunk_size, finished))


@pytest.fixture(scope="module")
def tar_shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """Nine images of 1, 2, ... 9 bytes."""
    members = [(f"{number}.jpg", b"x" * number) for number in range(1, 10)]
    return make_shard(tmp_path_factory.mktemp("chunks"), "tar", tar_bytes(*members))


@settings(deadline=None)
@given(chunk_size=st.integers(1, 12), chunk_bytes=st.integers(1, 50), finished=st.sets(st.integers(0, 10)))
def test_chunks_are_consecutive_bounded_and_resumable(
    tar_shard: Shard, chunk_size: int, chunk_bytes: int, finished: set[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "CHUNK_BYTES", chunk_bytes)
        chunks = chunks_of(tar_shard, chunk_size)
        resumed = chunks_of(tar_shard, chunk_size, finished)
    images = list(itertools.chain.from_iterable(chunk.images for chunk in chunks))
    assert images == list(read_images(tar_shard, ReadConfig(), str(Path(tar_shard.path).parent)))
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.final for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    for chunk, following in itertools.zip_longest(chunks, chunks[1:]):
        size = sum(len(image.data) for image in chunk.images)
        assert len(chunk.images) == 1 or (len(chunk.images) <= chunk_size and size <= chunk_bytes)
        # No chunk is smaller than it need be.
        if following and len(chunk.images) < chunk_size:
            assert size + len(following.images[0].data) > chunk_bytes
    assert resumed == [chunk for chunk in chunks if chunk.index not in finished]


@pytest.mark.parametrize("shard_format", list(MAKERS))
def test_empty_shard_is_one_final_chunk(shard_format: str, tmp_path: Path) -> None:
    data = gzip.compress(b"") if shard_format == "tfrecord" else MAKERS[shard_format]([])
    (chunk,) = chunks_of(make_shard(tmp_path, shard_format, data), 4)
    assert (chunk.index, chunk.images, chunk.final) == (0, (), True)


def test_at_most_one_chunk_and_one_image_are_in_memory(tar_shard: Shard) -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(item, EncodedImage) for item in gc.get_objects())

    peak = 0

    def watched(images: Iterator[EncodedImage]) -> Iterator[EncodedImage]:
        nonlocal peak
        for image in images:
            peak = max(peak, alive() - before)
            yield image

    before = alive()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "read_images", lambda *arguments: watched(read_images(*arguments)))
        for chunk in read_chunks(tar_shard, ReadConfig(), "/", 3, set()):
            del chunk
    assert peak == 4


def test_chunk_is_given_before_the_one_after_next_image_is_read(tmp_path: Path) -> None:
    shard = make_shard(tmp_path, "tar", images_tar(IMAGES))
    given_images = []

    def counted(*arguments: Any) -> Iterator[EncodedImage]:
        for image in read_images(*arguments):
            given_images.append(image.row)
            yield image

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "read_images", counted)
        next(read_chunks(shard, ReadConfig(), "/", 2, set()))
    assert given_images == [0, 1, 2]


def test_loose_shard_is_one_chunk_with_its_own_index(tmp_path: Path) -> None:
    shard = make_loose(tmp_path, {"a.jpg": b"1", "b.jpg": b"2"}, first_chunk=3, digest="d")
    (chunk,) = chunks_of(shard, 1)
    assert (chunk.index, chunk.final, chunk.digest, len(chunk.images)) == (3, True, "d", 2)


def test_finished_loose_files_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = make_loose(tmp_path, {"a.jpg": b"1"}, first_chunk=3)
    monkeypatch.setattr(source.FileSystems, "open", lambda *arguments, **options: pytest.fail("opened"))
    assert chunks_of(shard, 1, {3}) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tfrecord_image": ()}, "tfrecord_image"),
        ({"parquet_image": "image"}, "parquet_image is 'image'"),
        ({"parquet_key": ("id", "")}, "parquet_key"),
    ],
)
def test_bad_config_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReadConfig(**fields)
