"""A folder of photos is alive: the same command labels what is new or changed, and ends with the rows of a fresh run.

What a killed or a second start leaves on the way is never more than a leftover.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from apache_beam.io.filesystems import FileSystems
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskbeam.pipeline.launch.identity import claim_output, describe_run
from maskbeam.pipeline.launch.settle import settle
from maskbeam.pipeline.options import parse_label
from maskbeam.transforms.labels.commit import RunReplaced
from maskbeam.transforms.labels.run_file import read_run
from maskbeam.transforms.labels.tables import list_chunks, read_chunk
from maskbeam.transforms.load_model import ModelConfig
from maskbeam.transforms.match_shards import match_shards
from tests.conftest import SMALL_GRID, label, photo_bytes, read_labels, write_photos
from tests.fakes import FakeSam
from tests.transforms.readers.test_shard import images_parquet, images_tar, tfrecord_bytes

LABELED: list[int] = []


class CountingSam(FakeSam):
    """Notes the numbers of the photos that it sees: their first pixel."""

    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> np.ndarray:
        LABELED.append(int(frame[0, 0, 0]))
        return super().embed(frame, resized_hw)


def load_counting(config: ModelConfig) -> Any:
    return CountingSam()


def start(data: Path | str, output: Path, *flags: str) -> tuple[int, list[int]]:
    """Labels; returns the exit code and the numbers of the photos that the model saw."""
    LABELED.clear()
    code = label("--input", data, "--output", output, "--chunk_size", "2", *flags, load=load_counting)
    return code, sorted(LABELED)


def fresh(data: Path, directory: Path) -> Any:
    """The rows of a run that finds the folder as it is now."""
    output = Path(tempfile.mkdtemp(dir=directory)) / "fresh"
    assert start(data, output)[0] in (0, 1)
    return read_labels(output)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Photos 0 to 4, and 10 to 12 in a folder below."""
    write_photos(tmp_path / "data" / "sub", 3, first=10)
    return write_photos(tmp_path / "data", 5)


def put(path: Path, number: int, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photo_bytes(number, **options))


def change_everything(data: Path) -> list[int]:
    """Adds, changes and removes photos; returns the numbers of those that are new or changed."""
    (data / "2.png").unlink()
    put(data / "0.png", 20)
    put(data / "00.png", 21)
    put(data / "sub" / "deeper" / "x.png", 22)
    return [20, 21, 22]


def test_only_new_and_changed_photos_are_labeled_and_the_rows_are_those_of_a_fresh_run(
    data: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(data, output) == (0, [0, 1, 2, 3, 4, 10, 11, 12])
    assert start(data, output) == (0, [])
    new = change_everything(data)
    capsys.readouterr()
    assert start(data, output) == (0, new)
    printed = capsys.readouterr().out
    assert "not in the input any more, rows deleted: 1, 2.png" in printed
    assert "changed, labeled again: 1, 0.png" in printed
    assert read_labels(output) == fresh(data, tmp_path)
    assert start(data, output) == (0, [])
    assert json.loads((output / "summary.json").read_text())["images"] == 9
    shutil.rmtree(data / "sub")
    assert start(data, output) == (0, [])
    assert read_labels(output) == fresh(data, tmp_path)


def test_a_chunk_whose_photos_are_all_gone_is_gone_too(data: Path, output: Path, tmp_path: Path) -> None:
    start(data, output)
    for name in ("0.png", "1.png"):
        (data / name).unlink()
    assert start(data, output) == (0, [])
    assert not (output / "images" / "@root-00000.parquet").exists()
    assert read_labels(output) == fresh(data, tmp_path)


def test_rows_of_loose_photos_have_no_row_number_and_those_of_shards_have(data: Path, output: Path) -> None:
    (data / "a.tar").write_bytes(images_tar([photo_bytes(30), photo_bytes(31)]))
    start(data, output)
    rows = {row["image_id"]: row["row"] for row in read_labels(output).images}
    assert rows["0.png"] is None and rows["a.tar#1"] == 1


def test_the_same_size_with_other_bytes_is_noticed_and_other_times_with_the_same_bytes_are_no_change(
    data: Path, output: Path, tmp_path: Path
) -> None:
    start(data, output)
    for path in data.rglob("*.png"):
        os.utime(path, (1, 1))
    assert start(data, output) == (0, [])
    old, new = photo_bytes(1), photo_bytes(40)
    padded = new.ljust(max(len(old), len(new)), b"\0")  # what follows a PNG's end is not looked at
    (data / "1.png").write_bytes(old.ljust(len(padded), b"\0"))
    assert start(data, output) == (0, [1])
    (data / "1.png").write_bytes(padded)
    os.utime(data / "1.png", (2, 2))
    assert start(data, output) == (0, [40])
    assert read_labels(output) == fresh(data, tmp_path)


def test_bytes_are_read_only_where_size_or_time_differ(
    data: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(data, output)
    os.utime(data / "3.png", (1, 1))
    opened: list[str] = []
    monkeypatch.setattr("maskbeam.transforms.labels.reconcile.read_loose", noting(opened))
    settle_only(data, output)
    assert opened == ["3.png"]
    settle_only(data, output)  # its time is known now
    assert opened == ["3.png"]


def noting(opened: list[str]) -> Callable[[Any], Any]:
    from maskbeam.transforms.readers.shard import read_loose

    def read(file: Any) -> Any:
        opened.append(Path(file.path).name)
        return read_loose(file)

    return read


def test_a_copy_of_the_data_elsewhere_goes_on(data: Path, output: Path, tmp_path: Path) -> None:
    (data / "a.tar").write_bytes(images_tar([photo_bytes(30), photo_bytes(31)]))
    start(data, output)
    copy = Path(shutil.copytree(data, tmp_path / "elsewhere", copy_function=shutil.copyfile))
    assert start(copy, output) == (0, [])
    put(copy / "new.png", 41)
    assert start(copy, output) == (0, [41])
    assert {row["image_id"] for row in read_labels(output).images} == {
        row["image_id"] for row in fresh(copy, tmp_path).images
    }


@pytest.mark.parametrize("other", ["another folder", "a narrower pattern"])
def test_rows_never_go_because_the_command_is_another_one(
    data: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    for path in (data / "sub").iterdir():
        path.unlink()
    start(data, output)
    before = read_labels(output)
    elsewhere = write_photos(tmp_path / "elsewhere", 2, first=50) if other == "another folder" else data / "[01].png"
    capsys.readouterr()
    assert start(str(elsewhere), output) == (1, [])
    told = capsys.readouterr().err
    assert "their rows would go" in told and "--accept_changed" in told
    assert read_labels(output) == before
    assert start(str(elsewhere), output, "--accept_changed")[0] == 0
    assert len(read_labels(output).images) == 2


def test_retry_failed_labels_the_failed_images_and_no_others(data: Path, output: Path, tmp_path: Path) -> None:
    (data / "3.png").write_bytes(b"x" * 100)
    (data / "sub" / "12.png").write_bytes(b"y" * 100)
    assert start(data, output) == (0, [0, 1, 2, 4, 10, 11])
    put(data / "3.png", 3)
    assert start(data, output, "--retry_failed") == (0, [3])
    assert Counter(row["status"] for row in read_labels(output).images) == {"labeled": 7, "failed": 1}
    put(data / "sub" / "12.png", 12)
    assert start(data, output) == (0, [12])  # a repaired file is a changed one
    assert read_labels(output) == fresh(data, tmp_path)


def test_thousands_of_photos_with_one_repaired_cost_one_image(tmp_path: Path, output: Path) -> None:
    data = tmp_path / "data"
    for number in range(3000):
        folder = data / f"{number % 30:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(b"%d" % number)  # no photos at all, which is quick
    put(data / "00" / "0.png", 7)
    flags = ("--chunk_size", "50", "--max_failed_fraction", "1")
    assert start(data, output, *flags) == (0, [7])
    put(data / "17" / "17.png", 8)
    assert start(data, output, *flags) == (0, [8])
    rows = read_labels(output).images
    assert len(rows) == 3000 and Counter(row["status"] for row in rows)["labeled"] == 2


def test_candidates_of_the_photos_that_stay_are_copied(data: Path, output: Path, tmp_path: Path) -> None:
    start(data, output, "--keep_candidates")
    before = read_candidates(output)
    (data / "0.png").unlink()
    assert start(data, output, "--keep_candidates") == (0, [])
    assert read_candidates(output) == [row for row in before if row["image_id"] != "0.png"]


def read_candidates(output: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(output / "candidates").to_pylist()
    return sorted(rows, key=lambda row: row["image_id"])


# Shards.

PACKS: dict[str, Callable[[list[bytes]], bytes]] = {
    "b.tar": images_tar,
    "b.tfrecord": tfrecord_bytes,
    "b.parquet": images_parquet,
}


@pytest.mark.parametrize("name", PACKS)
def test_a_changed_shard_is_named_and_done_again_alone_when_that_is_accepted(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.tar").write_bytes(images_tar([photo_bytes(number) for number in range(3)]))
    (data / name).write_bytes(PACKS[name]([photo_bytes(number) for number in (10, 11, 12)]))
    start(data, output)
    os.utime(data / name, (1, 1))
    assert start(data, output) == (0, [])
    (data / name).write_bytes(PACKS[name]([photo_bytes(number) for number in (10, 11, 13)]))
    os.utime(data / name, (2, 2))
    before = read_labels(output)
    capsys.readouterr()
    assert start(data, output) == (1, [])
    assert f"{data / name} changed since it was labeled: its image 2 is another one" in capsys.readouterr().err
    assert read_labels(output) == before
    assert start(data, output, "--accept_changed") == (0, [10, 11, 13])
    assert read_labels(output) == fresh(data, tmp_path)
    assert start(data, output) == (0, [])


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_a_shard_that_was_cut_or_grew_is_a_change(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.tar").write_bytes(images_tar([photo_bytes(number) for number in range(3)]))
    start(data, output)
    (data / "a.tar").write_bytes(images_tar([photo_bytes(number) for number in range(count)]))
    assert start(data, output) == (1, [])
    assert f"{data / 'a.tar'} changed" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["removed", "added"])
def test_with_a_limit_a_shard_that_came_or_went_is_an_error_that_names_it(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("b.tar", "c.tar"):
        (data / name).write_bytes(images_tar([photo_bytes(number) for number in range(3)]))
    assert start(data, output, "--limit", "4")[0] == 0
    if change == "removed":
        (data / "b.tar").unlink()
    else:
        (data / "a.tar").write_bytes(images_tar([photo_bytes(9)]))
    capsys.readouterr()
    assert start(data, output, "--limit", "4") == (1, [])
    told = capsys.readouterr().err
    assert "the first 4 images (--limit) are not those that were labeled" in told
    assert str(data / ("b.tar" if change == "removed" else "a.tar")) in told


def test_with_a_limit_loose_photos_are_the_first_of_the_folder_as_it_is_now(data: Path, output: Path) -> None:
    assert start(data, output, "--limit", "3") == (0, [0, 1, 2])
    put(data / "00.png", 21)
    assert start(data, output, "--limit", "3") == (0, [21])
    assert [row["image_id"] for row in read_labels(output).images] == ["0.png", "00.png", "1.png"]


# Damage by hand.


def damage(output: Path, kind: str, how: str) -> None:
    path, other = (output / kind / f"@root-0000{index}.parquet" for index in (0, 1))
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-20])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "gone":
        path.unlink()
    elif how == "swapped":
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif how == "replaced":
        shutil.copyfile(other, path)
    elif how == "stray":
        shutil.copyfile(path, output / kind / "@root-00007.parquet")
        shutil.copyfile(path, output / kind / "else-00000.3.parquet")
    elif how == "flipped":  # a bit in the middle of the data, which the footer knows nothing of
        start_of_footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        flipped = bytearray(content)
        flipped[start_of_footer // 2] ^= 4
        path.write_bytes(flipped)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *[("images", how) for how in ("truncated", "emptied", "gone", "swapped", "replaced", "stray", "flipped")],
        *[("annotations", how) for how in ("truncated", "emptied", "gone", "swapped", "replaced", "stray")],
        *[("candidates", how) for how in ("truncated", "gone", "replaced")],
    ],
)
def test_damage_is_noticed_by_the_next_start_and_mended(
    data: Path, output: Path, tmp_path: Path, kind: str, how: str
) -> None:
    (data / "sub" / "10.png").unlink()
    put(data / "2.png", 2, size_wh=(60, 40))  # so that no two files are of one size
    put(data / "1.png", 1, size_wh=(50, 45))
    flags = ("--keep_candidates",)
    start(data, output, *flags)
    before, candidates = read_labels(output), read_candidates(output)
    damage(output, kind, how)
    assert start(data, output, *flags)[0] == 0
    assert read_labels(output) == before and read_candidates(output) == candidates


def test_a_run_file_that_nests_without_end_is_one_sentence(data: Path, output: Path) -> None:
    start(data, output)
    (output / "run.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        start(data, output)


def test_a_lost_manifest_costs_reading_and_no_labeling(data: Path, output: Path, tmp_path: Path) -> None:
    (data / "a.tar").write_bytes(images_tar([photo_bytes(30)]))
    start(data, output)
    for path in output.glob("manifest-*.json"):
        path.write_text("{")
    assert start(data, output) == (0, [])
    new = change_everything(data)
    for path in output.glob("manifest-*.json"):
        path.unlink()
    assert start(data, output) == (0, new)
    assert read_labels(output) == fresh(data, tmp_path)


def test_chunks_that_vanish_after_the_end_are_made_again(data: Path, output: Path, tmp_path: Path) -> None:
    start(data, output)
    (output / "images" / "@root-00001.parquet").unlink()
    with pytest.raises(ValueError, match="1 of the 5 chunks"):
        list_chunks(str(output))
    assert start(data, output) == (0, [2, 3])
    assert read_labels(output) == fresh(data, tmp_path)


# Killed at any call, and two at once.


class Killed(BaseException):
    """kill -9: nothing cleans up."""


def settle_only(data: Path, output: Path, *flags: str) -> Any:
    """What a start does before it labels anything."""
    job, _ = parse_label([*SMALL_GRID, "--input", str(data), "--output", str(output), "--chunk_size", "2", *flags])
    matched = match_shards(job.input, job.read)
    run = claim_output(str(output), describe_run(job, matched.root), False)
    return settle(job, matched, run)


def images_read(output: Path) -> list[tuple[str, str]]:
    """Ids and sha256 as readers find them."""
    return [
        (row["image_id"], row["sha256"])
        for chunk in list_chunks(str(output))
        for row in read_chunk(str(output), chunk).images.to_pylist()
    ]


@contextlib.contextmanager
def killed_at(number: int, look: Callable[[], None]) -> Iterator[None]:
    """Kills at a call of a file system; looks before each."""
    calls, looking = 0, False

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls, looking
            if not looking:
                looking = True
                look()
                looking = False
                calls += 1
                if calls >= number:
                    raise Killed
            return call(*args, **kwargs)

        return watch

    with pytest.MonkeyPatch.context() as patch:
        for name in ("create", "rename", "delete"):
            patch.setattr(FileSystems, name, watched(getattr(FileSystems, name)))
        for name in ("remove", "link"):
            patch.setattr(os, name, watched(getattr(os, name)))
        yield


def test_a_start_killed_at_any_call_of_the_rewrite_loses_no_row_and_the_next_one_ends_well(
    data: Path, output: Path, tmp_path: Path
) -> None:
    start(data, output)
    before = {name for name, _ in images_read(output)}
    new = change_everything(data)
    expected = fresh(data, tmp_path)
    stay = before - {"2.png", "0.png"}
    kept = Path(shutil.copytree(output, tmp_path / "kept"))
    for number in range(1, 200):
        shutil.rmtree(output)
        shutil.copytree(kept, output)

        def look() -> None:
            found = [name for name, _ in images_read(output)]
            assert stay <= set(found) and len(found) == len(set(found))

        try:
            with killed_at(number, look):
                settle_only(data, output)
            break
        except Killed:
            pass
        settle_only(data, output)
        found = images_read(output)
        assert {name for name, _ in found} == stay and len(found) == len(stay)
        if number % 5 == 1:
            assert start(data, output) == (0, new)
            assert read_labels(output) == expected
    assert number > 15


def test_a_start_that_saw_other_files_stops_and_no_photo_is_in_two_chunks(
    data: Path, output: Path, tmp_path: Path
) -> None:
    """The first one settles; before it labels, a photo comes in front of all others, and another start."""
    LABELED.clear()
    settle_only(data, output)
    put(data / "-.png", 60)
    first = read_run(str(output))
    assert start(data, output)[0] == 0
    second = read_run(str(output))
    assert first.manifest != second.manifest
    with pytest.raises(RunReplaced, match="another start goes on with"):
        from maskbeam.transforms.labels.commit import check_run

        check_run(str(output), first)
    assert read_labels(output) == fresh(data, tmp_path)


def test_a_start_that_sees_the_same_files_goes_by_the_same_manifest(data: Path, output: Path) -> None:
    first = settle_only(data, output)
    assert settle_only(data, output).manifest == first.manifest


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "change", "touch", "remove", "break", "kill", "start", "retry"]),
        st.integers(0, 5),
        st.integers(100, 103),
    ),
    min_size=2,
    max_size=7,
)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_whatever_happens_to_a_folder_the_rows_end_as_those_of_a_fresh_run(steps: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        data, output = write_photos(Path(directory) / "data", 3), Path(directory) / "labels"
        for step, which, number in steps:
            path = data / f"{'sub/' * (which % 2)}{which}.png"
            if step in ("add", "change"):
                put(path, number)
            elif step == "break":
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(b"broken %d" % number)
            elif step == "touch" and path.exists():
                os.utime(path, (number, number))
            elif step == "remove" and path.exists() and sum(1 for _ in data.rglob("*.png")) > 1:
                path.unlink()
            elif step == "kill":
                with contextlib.suppress(Killed), killed_at(which * 4 + 1, lambda: None):
                    settle_only(data, output)
            elif step in ("start", "retry"):
                assert start(data, output, *["--retry_failed"][: step == "retry"])[0] in (0, 1)
        start(data, output, "--retry_failed")
        assert read_labels(output) == fresh(data, Path(directory))
        ids = [name for name, _ in images_read(output)]
        assert len(ids) == len(set(ids))
