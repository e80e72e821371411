"""Input made to do harm: it fills neither memory nor time, writes nowhere but into the output, and runs nothing."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from PIL import Image

from maskbeam.pipeline.exits import UsageError
from maskbeam.transforms import images as images_module
from maskbeam.transforms.files import streams as source
from maskbeam.transforms.files.parquet_footer import schema_depth
from maskbeam.transforms.images import ImageConfig, ImageError, decode_image
from maskbeam.transforms.load_model import load_model
from maskbeam.transforms.models.check_preset import check_preset
from maskbeam.transforms.presets.embedded import PresetError
from tests.conftest import label, photo_bytes, read_labels, write_photos
from tests.pipeline.commands.test_label import contents
from tests.transforms.readers.test_shard import (
    example_bytes,
    frame,
    images_tar,
    make_shard,
    parquet_bytes,
    read_all,
    read_bytes,
    reason,
    tar_bytes,
)

ROOT = Path(__file__).parents[1]
MB = 2**20


@contextmanager
def bounded(peak_bytes: int, seconds: float = 20) -> Iterator[None]:
    """Python's memory stays below peak_bytes, and it does not take long."""
    tracemalloc.start()
    began = time.process_time()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < peak_bytes
    assert time.process_time() - began < seconds


# Bombs.


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What inflates beyond a megabyte and twenty times its size is a bomb."""
    monkeypatch.setattr(source, "FREE_INFLATION", MB)
    monkeypatch.setattr(source, "MAX_INFLATION", 20)


def huge_tar(name: str = "0.jpg") -> bytes:
    return tar_bytes(("0.txt", bytes(16 * MB)), (name, b"x"))


def huge_tfrecord() -> bytes:
    return frame(bytes(16 * MB))


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(
    "compress",
    [
        gzip.compress,
        zlib.compress,
        zstandard.compress,
        lambda data: b"".join(map(zstandard.compress, [data[:9], data[9:]])),
    ],
    ids=["gzip", "zlib", "zstd", "zstd frames"],
)
@pytest.mark.parametrize(("shard_format", "make"), [("tar", huge_tar), ("tfrecord", huge_tfrecord)])
def test_a_stream_that_inflates_too_far_is_read_no_further(
    shard_format: str, make: Callable[[], bytes], compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    data = compress(make())
    assert len(data) < MB
    read_bytes(tmp_path, "tfrecord", frame(b""))  # imports TensorFlow
    shard = make_shard(tmp_path, shard_format, data)
    with bounded(8 * MB):
        (image,) = read_all(tmp_path, shard)
    assert "a decompression bomb" in reason(image)


@pytest.mark.usefixtures("small_limits")
def test_a_parquet_column_that_inflates_too_far_is_not_read(tmp_path: Path) -> None:
    data = parquet_bytes({"image": [bytes(16 * MB), b"x"]}, compression="zstd", use_dictionary=False)
    assert len(data) < MB
    with bounded(4 * MB):
        (image,) = read_bytes(tmp_path, "parquet", data)
    assert "a decompression bomb" in reason(image)


@pytest.mark.usefixtures("small_limits")
def test_what_compresses_well_but_no_more_than_images_do_is_read(tmp_path: Path) -> None:
    members = [(f"{number}.jpg", photo_bytes(number)) for number in range(40)]
    captions = [(f"{number}.txt", b"a" * 3000) for number in range(40)]
    data = gzip.compress(tar_bytes(*(member for pair in zip(members, captions, strict=True) for member in pair)))
    assert all(image.failure is None for image in read_bytes(tmp_path, "tar", data))


def tar_header(kind: bytes, size: int, name: str = "x.jpg") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


PAX_SPARSE = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"


@pytest.mark.parametrize(
    "archive",
    [
        tar_header(tarfile.GNUTYPE_LONGNAME, 2**34) + bytes(16 * MB),
        tar_header(tarfile.XHDTYPE, 2**34) + b"1" * (16 * MB),
        tar_header(tarfile.XGLTYPE, 2**34) + bytes(16 * MB),
        tar_header(tarfile.GNUTYPE_LONGNAME, 512).ljust(1024, b"a") * 30_000,
        tar_header(tarfile.XHDTYPE, len(PAX_SPARSE))
        + PAX_SPARSE.ljust(512, b"\0")
        + tar_header(tarfile.REGTYPE, 2**34)
        + b"9999999999\n".ljust(512, b"0")
        + b"0\n" * (8 * MB),
    ],
    ids=["long name", "pax", "global pax", "names of names", "map of a sparse file"],
)
def test_a_tar_header_without_end_is_read_no_further(archive: bytes, tmp_path: Path) -> None:
    shard = make_shard(tmp_path, "tar", images_tar([b"1"])[:1024] + archive)
    with bounded(8 * MB):
        *good, last = read_all(tmp_path, shard)
    assert [image.data for image in good] == [b"1"]
    assert "a member's header has more than" in reason(last) or "recursion" in reason(last)


def test_global_tar_headers_do_not_pile_up(tmp_path: Path) -> None:
    def global_header(number: int) -> bytes:
        record = b"1019 k%06d=" % number
        return tar_header(tarfile.XGLTYPE, 1019) + record.ljust(1018, b"v") + b"\n" + bytes(5)

    archive = b"".join(global_header(number) + tar_header(b"0", 0, f"{number}.txt") for number in range(200))
    *_, last = read_bytes(tmp_path, "tar", archive + bytes(1024))
    assert "more than 100 global headers" in reason(last)


@pytest.mark.parametrize("size", [2**33 - 1, 2**62, 2**87])
@pytest.mark.parametrize("name", ["a.jpg", "a.txt"])
def test_a_tar_member_that_claims_to_be_huge_ends_the_archive_at_once(size: int, name: str, tmp_path: Path) -> None:
    with bounded(8 * MB, seconds=2):
        *_, last = read_bytes(tmp_path, "tar", tar_header(b"0", size, name) + b"x" * 1000)
    assert "unexpected end of data" in reason(last)


def test_a_sparse_tar_member_takes_no_longer_than_it_is_large(tmp_path: Path) -> None:
    holes = "".join(f"{start * 8192},1," for start in range(2000)).encode()[:-1]
    size = 2000 * 8192
    records = [b"GNU.sparse.map=" + holes, b"GNU.sparse.size=%d" % size, b"GNU.sparse.numblocks=2000"]
    body = b"".join(pax_record(record) for record in records)
    archive = tar_header(tarfile.XHDTYPE, len(body)) + body.ljust(-(-len(body) // 512) * 512, b"\0")
    archive += tar_header(b"0", 2000) + b"y" * 2048 + bytes(1024)
    with bounded(3 * size, seconds=10):
        (image,) = read_bytes(tmp_path, "tar", archive)
    assert len(image.data) == size and image.data.count(b"y") == 2000


def pax_record(text: bytes) -> bytes:
    """A pax record is preceded by its length, which counts itself."""
    length = len(text) + 3
    while length != (length := len(b"%d %s\n" % (length, text))):
        pass
    return b"%d %s\n" % (length, text)


def test_a_loose_file_that_is_too_large_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_photos(tmp_path / "data", 2)
    with (data / "huge.png").open("wb") as file:
        file.truncate(2**40)  # a hole of a terabyte
    assert label("--input", data, "--output", tmp_path / "out") == 0
    rows = {row["image_id"]: row for row in read_labels(tmp_path / "out").images}
    assert rows["huge.png"]["error"] == f"the file is larger than {2**30} bytes"
    assert [row["status"] for row in rows.values()].count("labeled") == 2


def jpeg_with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there so many times."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    with pytest.raises(ImageError, match="more than 1000 scans"):
        decode_image(jpeg_with_scans(2000), ImageConfig())
    assert jpeg_with_scans(1).count(b"\xff\xda") < images_module.MAX_JPEG_SCANS / 50
    assert decode_image(jpeg_with_scans(3), ImageConfig()).pixels.shape == (64, 64, 3)


def parquet_footer(depth: int) -> bytes:
    """A Parquet file without rows whose column `image` lies in so many groups, the root among them."""

    def varint(number: int) -> bytes:
        return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)

    # SchemaElement: 3 repetition_type = optional, 4 name, 5 num_children = 1; of a column 1 type = BYTE_ARRAY.
    group = b"\x35\x02" + b"\x18\x01a" + b"\x15\x02" + b"\0"
    column = b"\x15\x0c" + b"\x25\x02" + b"\x18\x05image" + b"\0"
    schema = b"\xfc" + varint(depth + 1) + group * depth + column
    # FileMetaData: 1 version, 2 schema, 3 num_rows = 0, 4 row_groups, of which there are none.
    metadata = b"\x15\x02" + b"\x19" + schema + b"\x16\x00" + b"\x19\x0c" + b"\0"
    return b"PAR1" + metadata + struct.pack("<I", len(metadata)) + b"PAR1"


@pytest.mark.parametrize("depth", [1, 2, 100, 101, 60_000])
def test_parquet_schemas_that_nest_too_deep_for_arrow_are_not_given_to_it(depth: int, tmp_path: Path) -> None:
    data = parquet_footer(depth)
    assert schema_depth(data[4:-8]) == depth
    images = read_bytes(tmp_path, "parquet", data)  # beyond some thousands, Arrow would end this process
    if depth == 1:
        assert images == []
    else:
        expected = "no image column" if depth <= 100 else f"the schema nests {depth} levels deep; at most 100 are read"
        assert expected in reason(images[0])


@pytest.mark.parametrize(
    ("columns", "depth"),
    [
        ({"image": [b"x"]}, 1),
        ({"image": [{"bytes": b"x", "path": "p"}], "boxes": [[[1.0]]], "id": [1]}, 5),  # a list is two groups
        ({f"column {number}": [{"a": {"b": number}, "c": number}] for number in range(300)}, 3),
        ({"when": pa.array([0], pa.timestamp("us", "UTC")), "n": pa.array([1], pa.decimal128(5, 2))}, 1),
    ],
)
def test_depth_of_schemas_that_arrow_writes(columns: dict[str, Any], depth: int) -> None:
    data = parquet_bytes(columns)
    size = int.from_bytes(data[-8:-4], "little")
    assert schema_depth(data[-8 - size : -8]) == depth


# Names.

LONG_NAME = "n" * 100_000
NAMES = [
    "../../../up.png",
    "/abs.png",
    "a/../../b.png",
    "new\nline.png",
    "\x1b[2J\x07.png",
    "\u202eevil.png",
    LONG_NAME + ".png",
]


def hostile_shards(folder: Path) -> int:
    """A tar, a TFRecord and a Parquet file whose names lead elsewhere; returns the number of images."""
    folder.mkdir()
    png = photo_bytes(1)
    (folder / "a.tar").write_bytes(tar_bytes(*((name, png) for name in NAMES)))
    names = [name.encode() for name in NAMES] + [b"nul\0.png", b"\xff\xfe.png", b"\xed\xa0\x80.png"]
    records = [example_bytes(image_encoded=png, image_filename=name, image_id=name) for name in names]
    (folder / "b.tfrecord").write_bytes(b"".join(map(frame, records)))
    keys = pa.Array.from_buffers(
        pa.string(), len(names), pa.array(names, pa.binary()).buffers()
    )  # not checked to be UTF-8, as writers need not
    (folder / "c.parquet").write_bytes(parquet_bytes({"image": [png] * len(names), "key": keys}))
    return len(NAMES) + 2 * len(names)


def test_names_lead_nowhere_but_into_columns(tmp_path: Path, output: Path, capfd: pytest.CaptureFixture[str]) -> None:
    count = hostile_shards(tmp_path / "data")
    before = contents(tmp_path)
    assert label("--input", tmp_path / "data", "--output", output) == 0
    after = contents(tmp_path)
    assert {name: after[name] for name in after if not name.startswith("labels/")} == before
    names = {re.sub("^manifest-[0-9a-f]{32}", "manifest", path.name) for path in output.iterdir()}
    assert names == {"annotations", "images", "manifest.json", "run.json", "summary.json"}

    rows = read_labels(output).images
    assert len(rows) == count
    of_tar = [row for row in rows if row["image_id"].startswith("a.tar#")]
    assert [row["file_name"] for row in of_tar] == NAMES
    failed = [row for row in rows if row["status"] == "failed"]  # of a row whose text is no text, only that row
    assert [row["image_id"] for row in failed] == ["c.parquet#8", "c.parquet#9"]
    assert all("is no UTF-8" in row["error"] for row in failed)


def test_files_with_hostile_names_are_labeled_and_cannot_speak_to_the_terminal(
    tmp_path: Path, output: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    good = [b"new\nline.png", b"-rf.png", b"%2e%2e.png", b"\xff.png", b"\x1b[2J.png", b"#1.png", b"~.png", b" .png"]
    for name in [*good, b"\x1b[31mbad\xff.png", b"\x1b]0;title\x07\xff.txt"]:
        (Path(os.fsdecode(bytes(data) + b"/" + name))).write_bytes(photo_bytes(1) if name in good else b"bad")
    deep = data / "/".join(["d" * 200] * 5)
    deep.mkdir(parents=True)
    (deep / f"{'t' * 251}.tar").write_bytes(images_tar([photo_bytes(2)]))
    assert label("--input", data, "--output", output, "--chunk_size", "2") == 0
    rows = read_labels(output).images
    assert sorted(row["status"] for row in rows) == ["failed"] + ["labeled"] * (len(good) + 1)
    assert len({row["image_id"] for row in rows}) == len(rows)
    printed = "".join(capfd.readouterr())
    assert "\x1b" not in printed and "\x07" not in printed
    assert r"failed \x1b[31mbad" in printed and r"\x1b]0;title\x07" in printed


# Models.

PRESET = ROOT / "tests" / "golden" / "sam_128"


def lambda_layer(marker: Path) -> dict[str, Any]:
    """What Keras writes for a Lambda layer: a marshalled function."""
    import base64
    import marshal

    code = compile(f"open({str(marker)!r}, 'w')", "lambda", "eval")
    value = {"code": base64.b64encode(marshal.dumps(code)).decode(), "defaults": None, "closure": None}
    function = {"class_name": "__lambda__", "config": value}
    return {"module": "keras.layers", "class_name": "Lambda", "config": {"function": function}, "registered_name": None}


def other_module(marker: Path) -> dict[str, Any]:
    config = {"command": f"touch {marker}"}
    return {"module": "os", "class_name": "system", "config": config, "registered_name": None}


def pickled_torch(marker: Path) -> dict[str, Any]:
    layer = {"module": "keras.layers", "class_name": "TorchModuleWrapper", "config": {"module": ""}}
    return {**layer, "registered_name": None}


def saved_model(marker: Path) -> dict[str, Any]:
    """A layer that loads a TensorFlow graph from a path: graphs read and write files."""
    config = {"filepath": str(marker), "call_endpoint": "serve"}
    return {"module": "keras.layers", "class_name": "TFSMLayer", "config": config, "registered_name": None}


def custom_class(marker: Path) -> dict[str, Any]:
    return {"module": None, "class_name": "SAMMaskDecoder", "config": {}, "registered_name": "evil>Decoder"}


def hostile_preset(folder: Path, evil: dict[str, Any], file: str, place: str) -> Path:
    """The fixture model with something else in the place of a part of it."""
    shutil.copytree(PRESET, folder)
    config = json.loads((folder / file).read_text())
    part = config["config"]["backbone"] if file == "task.json" else config
    if place == "activation":
        part["config"]["mask_decoder"]["config"]["activation"] = evil
    else:
        part["config"][place] = evil
    (folder / file).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("file", ["config.json", "task.json"])
@pytest.mark.parametrize("place", ["mask_decoder", "activation"])
@pytest.mark.parametrize("evil", [lambda_layer, other_module, pickled_torch, saved_model, custom_class])
def test_a_preset_that_names_other_code_is_refused_and_nothing_runs(
    evil: Callable[[Path], dict[str, Any]], place: str, file: str, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    named = evil(marker)["class_name"]
    preset = hostile_preset(tmp_path / "preset", evil(marker), file, place)
    with pytest.raises(PresetError, match=rf"cannot load model .*its {file} names .*{named}.*Nothing of it was run"):
        check_preset(str(preset))
    assert not marker.exists()


@pytest.mark.processes
def test_a_preset_of_code_is_refused_even_where_keras_would_trust_it(tmp_path: Path) -> None:
    """Safe mode is a switch that other code in the process may have turned off."""
    program = f"""
import keras, sys
from pathlib import Path
from tests import test_hostile
keras.config.enable_unsafe_deserialization()
marker = Path({str(tmp_path / "ran")!r})
preset = test_hostile.hostile_preset(
    Path({str(tmp_path / "preset")!r}), test_hostile.lambda_layer(marker), "task.json", "mask_decoder")
from maskbeam.transforms.models.sam.model import load_sam
try:
    load_sam(str(preset))
except ValueError as error:
    sys.exit(0 if "Lambda" in str(error) and not marker.exists() else 1)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", ['{"model_type": "sam"}', "[]", '{"class_name": "SAMBackbone"', "[" * 100_000])
def test_a_preset_that_describes_no_model_of_keras_is_refused(content: str, copied_preset: Path) -> None:
    (copied_preset / "config.json").write_text(content)
    with pytest.raises(
        PresetError, match=r"cannot load model .*: its config\.json (describes no Keras model|is no JSON)"
    ):
        check_preset(str(copied_preset))


@pytest.fixture
def copied_preset(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PRESET, tmp_path / "preset"))


PRESET_FILES = ["config.json", "task.json", "model.weights.h5", "task.weights.h5"]


@pytest.mark.parametrize("name", PRESET_FILES)
@pytest.mark.parametrize("kind", ["device", "pipe", "directory", "dangling link", "socket"])
def test_a_preset_is_made_of_regular_files(kind: str, name: str, copied_preset: Path) -> None:
    file = copied_preset / name
    file.unlink(missing_ok=True)
    if kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(file))  # their names must be short
    else:
        file.symlink_to("nowhere")
    with bounded(MB, seconds=2), pytest.raises(PresetError, match=rf"its {name} (is no regular file|cannot be read)"):
        check_preset(str(copied_preset))


def test_a_preset_of_links_to_regular_files_is_taken(copied_preset: Path, tmp_path: Path) -> None:
    """As in the caches of hubs."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in copied_preset.iterdir():
        (linked / file.name).symlink_to(file)
    assert check_preset(str(linked)) == [str(linked / "config.json"), str(linked / "model.weights.h5")]


@pytest.mark.parametrize(("name", "size"), [("config.json", 2**30), ("task.json", 2**23), ("model.weights.h5", 2**40)])
def test_a_file_of_a_preset_that_is_too_large_is_not_read(name: str, size: int, copied_preset: Path) -> None:
    with open(copied_preset / name, "ab") as file:
        file.truncate(size)
    with bounded(MB, seconds=2), pytest.raises(PresetError, match=f"its {name} has {size} bytes, more than"):
        check_preset(str(copied_preset))


@pytest.mark.parametrize("file", ["config.json", "task.json"])
@pytest.mark.parametrize(
    "change", [{"hidden_size": 10**6}, {"num_layers": 10**9}, {"intermediate_dim": 10**9}, {"image_shape": [10**6] * 3}]
)
def test_a_model_larger_than_its_weights_is_not_built(change: dict[str, Any], file: str, copied_preset: Path) -> None:
    config = json.loads((copied_preset / file).read_text())
    part = config["config"]["backbone"] if file == "task.json" else config
    part["config"]["image_encoder"]["config"].update(change)
    (copied_preset / file).write_text(json.dumps(config))
    with pytest.raises(PresetError, match=f"its {file} describes a larger model than its weights are of"):
        check_preset(str(copied_preset))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04"])
def test_weights_that_are_no_hdf5_are_refused(content: bytes, copied_preset: Path) -> None:
    (copied_preset / "model.weights.h5").write_bytes(content)
    with pytest.raises(PresetError, match=r"its model\.weights\.h5 is no HDF5 file"):
        check_preset(str(copied_preset))


def test_a_preset_without_weights_is_refused(copied_preset: Path) -> None:
    (copied_preset / "model.weights.h5").unlink()
    with pytest.raises(PresetError, match=r"its weights .* are missing"):
        check_preset(str(copied_preset))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"a": "../elsewhere.h5"}, "a file elsewhere"),
        ({"a": ["/dev/zero"]}, "a file elsewhere"),
        ({"a": 7}, "a file elsewhere"),
        ({"a": "none.h5"}, "missing or not complete"),
        ({}, "missing or not complete"),
        ([], "lists no files"),
    ],
)
def test_an_index_of_weights_names_only_files_of_the_preset(index: Any, words: str, copied_preset: Path) -> None:
    (copied_preset / "model.weights.h5").rename(copied_preset.parent / "elsewhere.h5")
    (copied_preset / "model.weights.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(PresetError, match=words):
        check_preset(str(copied_preset))


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5"])
def test_a_hostile_preset_ends_label_in_a_sentence_before_anything_is_written(
    name: str, copied_preset: Path, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied_preset / name).unlink()
    (copied_preset / name).symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=f"its {name} is no regular file"):
        label("--input", write_photos(tmp_path / "data", 1), "--output", output, "--model", copied_preset)
    assert not output.exists()


def test_weights_of_another_model_end_label_in_a_sentence(
    copied_preset: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only Keras can see that, when it builds the model."""
    shutil.copy(ROOT / "transforms" / "presets" / "sam_tiny" / "model.weights.h5", copied_preset)
    data = write_photos(tmp_path / "data", 1)
    assert label("--input", data, "--output", output, "--model", copied_preset, load=load_model) == 1
    printed = capsys.readouterr().err
    assert f"maskbeam: cannot load model {copied_preset}: " in printed and "Traceback" not in printed
