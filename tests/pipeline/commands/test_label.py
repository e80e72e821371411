"""The program itself: `maskbeam label` on small inputs, and what lies in its output afterwards.

FakeSam labels wherever the model is not the point. That its masks are right is tested in test_amg and test_sam.
"""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskbeam.pipeline import cli
from maskbeam.pipeline.commands import label as label_command
from maskbeam.pipeline.commands.demo import PHOTOS
from maskbeam.pipeline.graph import build
from maskbeam.pipeline.launch.identity import claim_output, default_backend, describe_run
from maskbeam.pipeline.launch.local import run_label
from maskbeam.pipeline.launch.settle import settle
from maskbeam.pipeline.options import parse_label
from maskbeam.transforms.load_model import ModelConfig, load_model
from maskbeam.transforms.match_shards import match_shards
from tests.conftest import EVENT_SECONDS, SMALL_GRID, Labels, label, photo_bytes, read_labels, wait_until, write_photos
from tests.fakes import FakeSam, load_fake
from tests.transforms.readers.test_shard import images_parquet, images_tar, parquet_bytes, tar_bytes, tfrecord_bytes

ROOT = Path(__file__).parents[3]


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change and bytes of all files below a directory."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file()
    }


def summary_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "summary.json").read_text())


def masks_by_sha256(labels: Labels) -> dict[str, list[dict[str, Any]]]:
    """Annotations without the image ids, which depend on how the images were packed."""
    found: dict[str, list[dict[str, Any]]] = {row["sha256"]: [] for row in labels.images}
    sha256 = {row["image_id"]: row["sha256"] for row in labels.images}
    for row in labels.annotations:
        found[sha256[row["image_id"]]].append({**row, "image_id": None})
    return found


# Inputs.


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.tfrecord", tfrecord_bytes), ("a.tar", images_tar), ("a.parquet", images_parquet)],
)
def test_packed_photos_get_the_same_masks_as_loose_ones(
    photos: Path, output: Path, tmp_path: Path, name: str, pack: Callable[[list[bytes]], bytes]
) -> None:
    images = [path.read_bytes() for path in sorted(photos.iterdir())]
    (tmp_path / name).write_bytes(pack(images))
    assert label("--input", photos, "--output", output) == 0
    assert label("--input", tmp_path / name, "--output", tmp_path / "packed", "--chunk_size", "4") == 0
    packed, loose = read_labels(tmp_path / "packed"), read_labels(output)
    assert masks_by_sha256(packed) == masks_by_sha256(loose)
    assert len(loose.annotations) > len(images)
    assert [row["image_id"] for row in packed.images] == [f"{name}#{row}" for row in range(len(images))]


@pytest.mark.parametrize("limit", [1, 3, 8, 9, 20])
def test_limit_labels_the_first_images(photos: Path, output: Path, tmp_path: Path, limit: int) -> None:
    (tmp_path / "z.tar").write_bytes(images_tar([photo_bytes(7), photo_bytes(8), photo_bytes(9)]))
    flags = ("--input", photos, tmp_path / "z.tar", "--output", output, "--chunk_size", "2", "--limit", limit)
    assert label(*map(str, flags)) == 0
    everything = [f"photos/{number}.png" for number in range(6)] + [f"z.tar#{row}" for row in range(3)]
    assert [row["image_id"] for row in read_labels(output).images] == everything[:limit]


def claim_png(width: int, height: int) -> bytes:
    """A PNG that claims a size, and has no pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def damaged_tfrecord(images: list[bytes]) -> bytes:
    """The first record's last byte of data is wrong."""
    data = bytearray(tfrecord_bytes(images))
    data[11 + int.from_bytes(data[:8], "little")] ^= 1
    return bytes(data)


def broken_inputs() -> dict[str, tuple[bytes, int, str, str, str]]:
    """Name -> its bytes, how many good images are in it, and of the failed one the id, the stage and the reason."""
    good = [photo_bytes(1), photo_bytes(2)]
    return {
        "cut.jpg": (photo_bytes(3, format_name="JPEG")[:700], 0, "cut.jpg", "decode", "cannot decode this JPEG"),
        "cut.tar": (images_tar(good)[:-12000], 1, "cut.tar#1", "read", "the shard breaks off here"),
        "damaged.tfrecord": (damaged_tfrecord(good), 1, "damaged.tfrecord#0", "read", "its checksum is wrong"),
        "empty.png": (b"", 0, "empty.png", "read", "no bytes"),
        "empty.tfrecord": (b"", 0, "empty.tfrecord#0", "read", "the file is empty"),
        "huge.png": (claim_png(60000, 60000), 0, "huge.png", "decode", "raise --max_pixels"),
        "no_image.parquet": (
            parquet_bytes({"caption": ["a cat"]}),
            0,
            "no_image.parquet#0",
            "read",
            "caption (string)",
        ),
        "page.jpg": (b"<!DOCTYPE html><html>404</html>", 0, "page.jpg", "decode", "Expected"),
        "text.tar": (
            tar_bytes(("a.png", good[0]), ("b.txt", b"b"), ("c.png", good[1])),
            2,
            "text.tar#1",
            "read",
            "no image file. Members: 'b.txt'",
        ),
    }


def test_broken_inputs_cost_only_themselves_and_each_has_a_row_and_a_reason(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_photos(tmp_path / "data", 2)
    (data / "notes.txt").write_text("not an image")
    broken = broken_inputs()
    for name, (content, *_) in broken.items():
        (data / name).write_bytes(content)
    assert label("--input", data, "--output", output) == 0

    rows = {row["image_id"]: row for row in read_labels(output).images}
    failed = {image_id: row for image_id, row in rows.items() if row["status"] == "failed"}
    assert {image_id: row["error_stage"] for image_id, row in failed.items()} == {
        image_id: stage for _, _, image_id, stage, _ in broken.values()
    }
    for _, _, image_id, _, reason in broken.values():
        assert reason in failed[image_id]["error"]
    num_good = 2 + sum(good for _, good, *_ in broken.values())
    assert Counter(row["status"] for row in rows.values()) == {"labeled": num_good, "failed": len(broken)}

    printed = capsys.readouterr().out
    assert f"{len(rows)} images: {num_good} labeled, 0 empty, {len(broken)} failed" in printed
    assert "  failed cut.jpg: decode: cannot decode this JPEG" in printed
    assert "1 files ignored, not images by their names: notes.txt" in printed


# Ends.


def test_a_run_in_which_every_image_failed_fails_and_its_rows_stay(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However few they are; once one is repaired, the run is done."""
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "photos" / name).write_bytes(photo_bytes(1)[:100])
    for _ in range(2):  # a second start has nothing to do, and nothing has become better
        assert label("--input", tmp_path / "photos", "--output", output) == 1
        told = capsys.readouterr()
        assert "2 images: 0 labeled, 0 empty, 2 failed\n  failed a.png: decode: " in told.out
        assert told.err.startswith("maskbeam: nothing was labeled: all 2 images failed for the reasons above.")
        assert [row["status"] for row in read_labels(output).images] == ["failed", "failed"]
        assert summary_of(output)["failed"] == 2


def test_an_empty_image_is_no_failure(tmp_path: Path, output: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "black.png")
    assert label("--input", tmp_path / "black.png", "--output", output) == 0
    assert [row["status"] for row in read_labels(output).images] == ["empty"]


def test_a_run_without_an_image_fails(tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.parquet").write_bytes(images_parquet([]))
    assert label("--input", tmp_path / "none.parquet", "--output", output) == 1
    assert capsys.readouterr().err == "maskbeam: nothing was labeled: the input has no images. Check --input.\n"


class BrokenSam(FakeSam):
    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> np.ndarray:
        raise RuntimeError("out of memory")


def load_broken(config: ModelConfig) -> BrokenSam:
    return BrokenSam()


@pytest.mark.parametrize("count", [1, 6])
def test_a_model_that_always_fails_ends_the_run_and_commits_nothing(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    data = write_photos(tmp_path / "data", count)
    assert label("--input", data, "--output", output, load=load_broken) == 1
    assert not list(output.rglob("*.parquet"))
    error = capsys.readouterr().err
    assert "the model failed on" in error and "RuntimeError: out of memory" in error
    assert "Traceback" not in error and "while running" not in error


def test_a_run_that_failed_goes_on_with_a_model_that_works(photos: Path, output: Path, tmp_path: Path) -> None:
    assert label("--input", photos, "--output", output, load=load_broken) == 1
    assert label("--input", photos, "--output", output) == 0
    assert label("--input", photos, "--output", tmp_path / "clean") == 0
    assert read_labels(output) == read_labels(tmp_path / "clean")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "{tmp}/none", "--output", "{tmp}/out"], "matches no file"),
        (["--input", "{tmp}/*.jpg", "--output", "{tmp}/out"], "matches no file"),
        (["--input", "{photos}", "--output", "{photos}/out"], "lies inside the input"),
        (["--input", "{photos}", "--output", "{tmp}/file/out"], "cannot write to --output"),
        (["--input", "{photos}", "--output", "{tmp}/file"], "cannot write to --output"),
        (["--input", "{photos}", "--output", "nowhere://out"], "cannot write to --output nowhere://out"),
        (["--input", "nowhere://in", "--output", "{tmp}/out"], "nowhere://in"),
        (["--input", "{photos}", "--output", "{tmp}/out", "--model", "{tmp}/none"], "there is no model"),
        (["--input", "{photos}", "--output", "{tmp}/out", "--points_per_side", "0"], "points_per_side must be"),
        (["--input", "{photos}"], "--output"),
        ([], "--input"),
    ],
)
def test_what_cannot_be_done_as_asked_is_told_before_anything_is_written(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    before = contents(tmp_path)
    assert cli.main(["label", *(flag.format(tmp=tmp_path, photos=photos) for flag in flags)]) == 2
    assert contents(tmp_path) == before
    error = capsys.readouterr().err
    assert error.startswith("maskbeam label: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["-h"], 0), (["lable"], 2)])
def test_the_command_without_a_subcommand_explains_itself(
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int
) -> None:
    assert cli.main(argv) == code
    assert "label" in "".join(capsys.readouterr())


# Starting again.


def test_a_finished_run_changes_nothing_when_started_again(photos: Path, output: Path) -> None:
    assert label("--input", photos, "--output", output, "--chunk_size", "4") == 0
    before, totals = contents(output), summary_of(output)
    assert label("--input", photos, "--output", output, "--chunk_size", "4") == 0
    after, totals_after = contents(output), summary_of(output)
    del before["summary.json"], after["summary.json"]  # it is written anew
    assert after == before
    del totals["seconds"]["write"], totals_after["seconds"]["write"]  # only known to the start that wrote
    assert totals_after == totals


def test_a_shard_that_was_added_is_labeled_and_the_summary_covers_both(tmp_path: Path, output: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "b.tar").write_bytes(images_tar([photo_bytes(number) for number in range(3)]))
    assert label("--input", data, "--output", output) == 0
    before = contents(output / "images")
    (data / "a.tar").write_bytes(images_tar([photo_bytes(number) for number in range(3, 5)]))
    assert label("--input", data, "--output", output) == 0
    after = contents(output / "images")
    assert {name: after[name] for name in before} == before
    assert len(read_labels(output).images) == summary_of(output)["images"] == summary_of(output)["labeled"] == 5


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--points_per_side", "3", "points_per_side was 4, now 3"),
        ("--chunk_size", "7", "chunk_size was 32, now 7"),
        ("--exif", "ignore", "exif was apply, now ignore"),
    ],
)
def test_other_settings_are_refused_by_name(
    photos: Path, output: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, message: str
) -> None:
    assert label("--input", photos, "--output", output) == 0
    before = contents(output)
    assert cli.main(["label", *SMALL_GRID, "--input", str(photos), "--output", str(output), flag, value]) == 2
    assert message in capsys.readouterr().err
    assert contents(output) == before


def test_overwrite_starts_anew_with_other_settings(photos: Path, output: Path, tmp_path: Path) -> None:
    assert label("--input", photos, "--output", output, "--chunk_size", "2") == 0
    assert label("--input", photos, "--output", output, "--points_per_side", "3", "--overwrite") == 0
    assert label("--input", photos, "--output", tmp_path / "clean", "--points_per_side", "3") == 0
    assert read_labels(output) == read_labels(tmp_path / "clean")


# Workers, and processes that are killed.


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["multi_threading", "multi_processing"])
def test_two_workers_give_the_rows_of_one(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    data = write_photos(tmp_path / "data", 3)
    for name in ("a.tar", "b.tar", "c.tar"):
        (data / name).write_bytes(images_tar([photo_bytes(ord(name[0]) + number) for number in range(4)]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the workers import FakeSam
    flags = ("--input", data, "--chunk_size", "2", "--output")
    assert label(*flags, output) == 0
    workers = ("--direct_num_workers", "2", "--direct_running_mode", mode)
    assert label(*flags, tmp_path / "two", *workers) == 0
    assert read_labels(tmp_path / "two") == read_labels(output)


def stop_after_a_chunk(model: Any, output: Path, stop: Callable[[], None]) -> Any:
    """A model that calls stop before it embeds anything more once a chunk is committed."""
    embed = model.embed

    def embed_or_stop(*arguments: Any) -> Any:
        if has_committed(output):
            stop()
        return embed(*arguments)

    model.embed = embed_or_stop
    return model


def wait_for_a_signal() -> None:
    """The run does not end by itself, however long the test takes to send the signal."""
    time.sleep(EVENT_SECONDS)


def waiting_main() -> int:
    """The command with a fake model that waits for a signal after the first chunk, for a process of its own."""
    output = Path(sys.argv[sys.argv.index("--output") + 1])
    load = partial(load_waiting, output)
    label_command.run_label = partial(run_label, load=load)
    # As from a terminal: a shell that runs the tests in the background has its children ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


def load_waiting(output: Path, config: ModelConfig) -> Any:
    return stop_after_a_chunk(FakeSam(), output, wait_for_a_signal)


def start_waiting(tmp_path: Path, *flags: str | Path) -> subprocess.Popen[str]:
    """waiting_main on twelve photos in a process group of its own, as a shell starts it."""
    command = [
        sys.executable,
        "-c",
        "import sys; from tests.pipeline.commands import test_label; sys.exit(test_label.waiting_main())",
    ]
    data = write_photos(tmp_path / "data", 12)
    return subprocess.Popen(
        [*command, "label", *SMALL_GRID, "--input", str(data), "--chunk_size", "2", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def has_committed(output: Path) -> bool:
    return any((output / "images").glob("*.parquet"))


def worker_pids(tmp_path: Path) -> list[int]:
    """The processes that label, of a command that has its temporary files in tmp_path."""
    return [int(file.name) for file in tmp_path.glob("maskbeam-*/progress/*")]


def is_alive(pid: int) -> bool:
    """False also for a process that is dead and not yet taken note of."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


TWO_PROCESSES = ("--direct_num_workers", "2", "--direct_running_mode", "multi_processing")


@pytest.mark.processes
@pytest.mark.parametrize("workers", [(), TWO_PROCESSES], ids=["one worker", "two processes"])
def test_ctrl_c_ends_with_one_line_and_keeps_what_is_committed(
    tmp_path: Path, output: Path, workers: tuple[str, ...]
) -> None:
    process = start_waiting(tmp_path, "--output", output, *workers)
    wait_until(lambda: has_committed(output) and len(worker_pids(tmp_path)) == (2 if workers else 1), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=EVENT_SECONDS)
    assert process.returncode == 130
    assert error.rstrip().splitlines()[-1].startswith("maskbeam: interrupted. What is committed")
    assert "Traceback" not in error and "KeyboardInterrupt" not in error and "Killed" not in error
    assert not list(tmp_path.glob("maskbeam-*"))
    committed = contents(output / "images")
    assert committed and not (output / "summary.json").exists()
    assert label("--input", tmp_path / "data", "--output", output, "--chunk_size", "2") == 0
    after = contents(output / "images")
    assert len(after) == 6 and {name: after[name] for name in committed} == committed


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc").exists(), reason="tells living processes from dead ones by /proc")
def test_a_dead_worker_ends_the_run(tmp_path: Path, output: Path) -> None:
    process = start_waiting(tmp_path, "--output", output, *TWO_PROCESSES)
    wait_until(lambda: has_committed(output) and len(worker_pids(tmp_path)) == 2, process)
    workers = worker_pids(tmp_path)
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=EVENT_SECONDS)
    assert process.returncode == 1
    assert error.rstrip().splitlines()[-1].startswith("maskbeam: a worker process died")
    wait_until(lambda: not any(is_alive(pid) for pid in workers))  # they are killed, but may not be dead yet
    assert has_committed(output)
    flags = ("--input", tmp_path / "data", "--chunk_size", "2", "--output")
    assert label(*flags, output) == 0
    assert label(*flags, tmp_path / "undisturbed") == 0
    assert read_labels(output) == read_labels(tmp_path / "undisturbed")
    assert not (output / "_tmp").exists()


# The embedded model, on photos that are small enough.

REAL = ["--points_per_side", "6", "--pred_iou_thresh", "0", "--stability_score_thresh", "0.5"]


@pytest.fixture(scope="module")
def real_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("real") / "photos"
    directory.mkdir()
    for path in sorted(PHOTOS.glob("*.jpg"))[:4]:
        photo = Image.open(path)
        photo.thumbnail((160, 160))
        photo.save(directory / f"{path.stem}.png")
    return directory


@lru_cache(maxsize=1)
def load_once(config: ModelConfig) -> Any:
    return load_model(config)


def label_really(photos: Path, output: Path, *flags: str) -> Labels:
    job, options = parse_label([*REAL, "--input", str(photos), "--output", str(output), *flags])
    assert run_label(job, options, load_once) == 0
    return read_labels(output)


def killed_main() -> int:
    """The command, killed with kill -9 while it labels what follows the first chunk."""
    output = Path(sys.argv[sys.argv.index("--output") + 1])
    die = partial(os.kill, os.getpid(), signal.SIGKILL)
    label_command.run_label = partial(
        run_label, load=lambda config: stop_after_a_chunk(load_model(config), output, die)
    )
    return cli.main()


REAL_PROGRAM = (sys.executable, "-m", "pipeline")
KILLED_PROGRAM = (sys.executable, "-c", "from tests.pipeline.commands import test_label; test_label.killed_main()")


def start_really(
    program: tuple[str, ...], photos: Path, output: Path, *flags: str, **environment: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*program, "label", *REAL, "--input", str(photos), "--output", str(output), *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def real_labels(real_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Labels:
    """What one undisturbed run gives."""
    labels = label_really(real_photos, tmp_path_factory.mktemp("undisturbed"))
    assert len(labels.annotations) > 100
    return labels


def identical_fraction(labels: Labels, others: Labels) -> float:
    """How many of the masks are the same to the last pixel in both."""
    one, other = (
        Counter((row["image_id"], row["segmentation"]["counts"]) for row in some.annotations)
        for some in (labels, others)
    )
    return (one & other).total() / max(one.total(), other.total())


def test_two_runs_are_bit_identical(real_photos: Path, real_labels: Labels, output: Path) -> None:
    assert label_really(real_photos, output) == real_labels


@pytest.mark.processes
def test_a_killed_run_started_again_gives_the_rows_of_an_undisturbed_one(
    real_photos: Path, real_labels: Labels, output: Path
) -> None:
    process = start_really(KILLED_PROGRAM, real_photos, output, "--chunk_size", "1")
    told = process.communicate(timeout=EVENT_SECONDS)
    assert process.returncode == -signal.SIGKILL, told
    num_committed = len(list((output / "images").iterdir()))
    assert not (output / "summary.json").exists() and 1 <= num_committed < len(list(real_photos.iterdir()))
    assert label_really(real_photos, output, "--chunk_size", "1") == real_labels
    assert not (output / "_tmp").exists()


def test_points_per_batch_moves_masks_by_no_more_than_rounding(
    real_photos: Path, real_labels: Labels, output: Path
) -> None:
    labels = label_really(real_photos, output, "--points_per_batch", "10")
    assert identical_fraction(labels, real_labels) >= 0.97


@pytest.mark.processes
def test_the_other_backend_moves_masks_by_no_more_than_rounding(
    real_photos: Path, real_labels: Labels, output: Path
) -> None:
    pytest.importorskip("jax")
    other = "tensorflow" if default_backend() == "jax" else "jax"
    process = start_really(REAL_PROGRAM, real_photos, output, KERAS_BACKEND=other)
    _, error = process.communicate(timeout=EVENT_SECONDS)
    assert process.returncode == 0, error
    assert json.loads((output / "run.json").read_text())["backend"] == other
    assert identical_fraction(read_labels(output), real_labels) >= 0.97


# Reading the output, without our code.


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run over six photos and a broken one, in four chunks."""
    directory = tmp_path_factory.mktemp("readers")
    data = write_photos(directory / "data", 6)
    (data / "broken.png").write_bytes(b"x")
    assert label("--input", data, "--output", directory / "out", "--chunk_size", "2") == 0
    return directory / "out"


def check_masks(rows: list[dict[str, Any]], labeled: Path) -> None:
    """As many rows as there are masks, and every segmentation decodes as it is to a mask with its area."""
    assert len(rows) == summary_of(labeled)["masks"] > 0
    for row in rows:
        mask = coco_mask.decode(row["segmentation"])
        assert mask.shape == (48, 64) and mask.sum() == row["area"]


@pytest.mark.clients
def test_pandas_reads_it(labeled: Path) -> None:
    pandas = pytest.importorskip("pandas")
    check_masks(pandas.read_parquet(labeled / "annotations").to_dict("records"), labeled)
    images = pandas.read_parquet(labeled / "images")
    assert images["status"].value_counts().to_dict() == {"labeled": 6, "failed": 1}


@pytest.mark.clients
def test_duckdb_reads_it(labeled: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    joined = duckdb.sql(
        f"select a.* from '{labeled}/annotations/*.parquet' a join '{labeled}/images/*.parquet' using (image_id)"
    )
    names = joined.columns
    check_masks([dict(zip(names, row, strict=True)) for row in joined.fetchall()], labeled)


@pytest.mark.clients
@pytest.mark.parametrize(("name", "num_rows"), [("images", 7), ("annotations", None)])
def test_hugging_face_datasets_reads_it(labeled: Path, tmp_path: Path, name: str, num_rows: int | None) -> None:
    datasets = pytest.importorskip("datasets")
    files = sorted(str(path) for path in (labeled / name).glob("*.parquet"))
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    if num_rows is None:
        check_masks(dataset.to_list(), labeled)
    else:
        assert dataset.num_rows == num_rows


# What a run tells.


def test_beam_counters_are_the_summary(photos: Path, output: Path) -> None:
    (photos / "broken.png").write_bytes(b"x")
    job, options = parse_label(
        [*SMALL_GRID, "--input", str(photos), "--output", str(output), "--chunk_size", "3", "--max_masks", "5"]
    )
    matched = match_shards(job.input)
    run = settle(job, matched, claim_output(str(output), describe_run(job, matched.root), overwrite=False)).run
    root = beam.Pipeline(options=options)
    build(root, job, run, load_fake)
    result = root.run()
    result.wait_until_finish()
    metrics = result.metrics().query(beam.metrics.MetricsFilter().with_namespace("maskbeam"))
    counters = {metric.key.metric.name: metric.committed for metric in metrics["counters"]}
    summary = summary_of(output)
    names = ("images", "labeled", "empty", "failed", "masks", "candidates")
    dropped = {f"dropped_{name}": count for name, count in summary["dropped"].items()}
    assert counters == {**{name: summary[name] for name in names}, **dropped}
    assert summary["images"] == 7 and summary["failed"] == 1 and summary["dropped"]["max_masks"] > 0
    seconds = {metric.key.metric.name: metric.committed for metric in metrics["distributions"]}
    assert {name: distribution.count for name, distribution in seconds.items()} == {
        f"{name}_msec_per_chunk": 3 for name in summary["seconds"]
    }


def test_every_image_has_one_row_that_adds_up(labeled: Path) -> None:
    labels = read_labels(labeled)
    per_image = Counter(row["image_id"] for row in labels.annotations)
    for row in labels.images:
        assert row["num_masks"] == per_image[row["image_id"]]
        dropped = sum(count for name, count in row.items() if name.startswith("dropped_"))
        assert row["num_candidates"] == row["num_masks"] + dropped
    assert len({row["image_id"] for row in labels.images}) == len(labels.images) == 7


def test_schema_descriptions_reach_the_files(labeled: Path) -> None:
    for path in labeled.rglob("*.parquet"):
        schema = pq.read_schema(path)
        assert all(field.metadata[b"description"] for field in schema)


def test_the_summary_tells_what_was_dropped_and_where_the_labels_are(
    photos: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label("--input", photos, "--output", output) == 0
    lines = capsys.readouterr().out.splitlines()
    totals = summary_of(output)
    assert lines[0] == "6 images: 6 labeled, 0 empty, 0 failed"
    assert lines[1].startswith(f"{totals['masks']} masks of {totals['candidates']} candidates (dropped: stability ")
    assert re.match(r"[0-9.]+ images/s \(5 in [0-9.]+ s\), after [0-9.]+ s of start-up \(", lines[2])
    assert lines[3].startswith("seconds in decode ") and " write " in lines[3]
    assert lines[4] == "model: sam_tiny"
    assert lines[5] == f"labels: {output}/annotations/*.parquet, {output}/images/*.parquet"
