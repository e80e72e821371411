"""Disks that fill up, permissions that are lost, shards that go away: told in one line, and the next start goes on."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from apache_beam.io.filesystems import FileSystems
from apache_beam.io.localfilesystem import LocalFileSystem

from maskbeam.pipeline import cli
from maskbeam.pipeline.exits import UsageError
from maskbeam.transforms.labels.layout import committed_chunks
from maskbeam.transforms.load_model import ModelConfig
from tests.conftest import label, photo_bytes, read_labels, write_photos
from tests.fakes import FakeSam
from tests.transforms.readers.test_shard import images_tar


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskbeam.transforms.labels.commit.RETRY_SECONDS", (0, 0))
    monkeypatch.setattr("maskbeam.transforms.files.streams.RETRY_SECONDS", (0, 0))


def start(data: Path, output: Path, *flags: str, **options: Any) -> int:
    return label("--input", data, "--output", output, "--chunk_size", "2", *flags, **options)


def one_line(told: str, *parts: str) -> None:
    """What failed is said in one line, without a stack trace, and followed by what to do."""
    assert "Traceback" not in told
    lines = [line for line in told.splitlines() if line.startswith("maskbeam: ")]
    assert len(lines) == 1 and all(part in lines[0] for part in parts), told


@pytest.fixture
def undisturbed(photos: Path, tmp_path: Path) -> Any:
    assert start(photos, tmp_path / "undisturbed") == 0
    return read_labels(tmp_path / "undisturbed")


def interfere(do: Callable[[], Any], at: int) -> Callable[[ModelConfig], Any]:
    """A model during whose at-th image something happens to the input."""

    class Interferes(FakeSam):
        embedded = 0

        def embed(self, *arguments: Any) -> Any:
            self.embedded += 1
            if self.embedded == at:
                do()
            return super().embed(*arguments)

    return lambda config: Interferes()


# The output.


def fill(disk: Path, leave: int = 0) -> None:
    with (disk / "ballast").open("wb") as file, pytest.raises(OSError, match="No space left"):
        while True:
            os.write(file.fileno(), bytes(4096))
    os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - leave)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.processes
def test_a_full_disk_is_told_and_what_is_committed_stays(
    small_disk: Path, photos: Path, undisturbed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    output = small_disk / "labels"
    assert start(photos, output, load=interfere(lambda: fill(small_disk), 3)) == 1
    one_line(capsys.readouterr().err, "cannot write the chunk @root-0000", str(output), "No space left on device")
    assert sum(map(len, committed_chunks(str(output)).values())) < 3
    (small_disk / "ballast").unlink()
    assert start(photos, output) == 0
    assert read_labels(output) == undisturbed
    assert not (output / "_tmp").exists()


def run_on_a_full_disk(small_disk: Path, command: Callable[[], int], step: int) -> Iterator[int]:
    """Runs a command with no space, then with a little more each time, until it passes; each time again with space.

    Gives how much space there was, after the second run.
    """
    for leave in range(0, 2**18, step):
        fill(small_disk, leave)
        try:
            code = command()
        except UsageError:
            code = 2
        (small_disk / "ballast").unlink()
        assert command() == 0 if code else True
        yield leave
        if code == 0:
            return


@pytest.mark.processes
def test_label_goes_on_once_there_is_space(small_disk: Path, photos: Path, undisturbed: Any) -> None:
    output = small_disk / "labels"
    for _ in run_on_a_full_disk(small_disk, lambda: start(photos, output), 2**14):
        assert read_labels(output) == undisturbed
        shutil.rmtree(output)


@pytest.mark.processes
@pytest.mark.parametrize("form", ["coco", "sa1b", "yolo", "png"])
def test_export_goes_on_once_there_is_space(small_disk: Path, photos: Path, tmp_path: Path, form: str) -> None:
    assert start(photos, tmp_path / "labels", "--max_masks", "3") == 0  # twice the export must fit
    command = ["export", "--labels", str(tmp_path / "labels"), "--format", form, "--output"]
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    whole, output = content_of(tmp_path / "whole"), small_disk / "out"
    for leave in run_on_a_full_disk(small_disk, lambda: cli.main([*command, str(output)]), 2**12):
        assert content_of(output) == whole, leave
        output.unlink() if output.is_file() else shutil.rmtree(output)


def content_of(path: Path) -> dict[str, bytes]:
    """Of a file, or of all files below a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


@pytest.mark.processes
@pytest.mark.parametrize("command", ["refine", "import"])
def test_refine_and_import_go_on_once_there_is_space(
    small_disk: Path, photos: Path, tmp_path: Path, command: str
) -> None:
    kept, coco, output = tmp_path / "kept", tmp_path / "kept.json", small_disk / "out"
    assert start(photos, kept, "--keep_candidates") == 0
    assert cli.main(["export", "--labels", str(kept), "--format", "coco", "--output", str(coco)]) == 0
    source = {"refine": ["--labels", str(kept)], "import": ["--annotations", str(coco)]}[command]
    assert cli.main([command, *source, "--output", str(tmp_path / "whole")]) == 0
    for _ in run_on_a_full_disk(small_disk, lambda: cli.main([command, *source, "--output", str(output)]), 2**14):
        assert read_labels(output) == read_labels(tmp_path / "whole")
        shutil.rmtree(output)


@pytest.mark.processes
@pytest.mark.processes
def test_a_full_disk_is_one_line_from_worker_processes_too(
    small_disk: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(small_disk, leave=2**15)  # room for run.json and the manifest, and for no chunk
    flags = ("--direct_num_workers", "2", "--direct_running_mode", "multi_processing")
    assert start(photos, small_disk / "labels", *flags) == 1
    one_line(capsys.readouterr().err, "cannot write the chunk", "No space left on device")


@pytest.mark.processes
def test_a_disk_that_is_full_from_the_start_is_a_usage_error(small_disk: Path, photos: Path) -> None:
    fill(small_disk)
    with pytest.raises(UsageError, match=r"cannot write to --output .*run\.json.*No space left on device"):
        start(photos, small_disk / "labels")


def fail_creating(monkeypatch: pytest.MonkeyPatch, error: OSError, where: str, after: int) -> list[str]:
    """Creating files of that name fails after a few; emptying the returned list ends it. Root obeys no permissions."""
    broken = ["yes"]
    created = 0
    create = LocalFileSystem.create

    def fails(self: LocalFileSystem, path: str, *arguments: Any) -> Any:
        nonlocal created
        created += where in path
        if broken and where in path and created > after:
            raise OSError(error.errno, os.strerror(error.errno or 0), path)
        return create(self, path, *arguments)

    monkeypatch.setattr(LocalFileSystem, "create", fails)
    return broken


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_is_told_and_the_next_start_goes_on(
    code: int,
    photos: Path,
    output: Path,
    undisturbed: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = fail_creating(monkeypatch, OSError(code, ""), "-images-", 2)
    assert start(photos, output) == 1
    one_line(capsys.readouterr().err, "cannot write the chunk @root-0000", str(output), "3 times", os.strerror(code))
    assert sum(map(len, committed_chunks(str(output)).values())) == 2
    assert not [path for path in (output / "_tmp").iterdir() if "images" in path.name or "annotations" in path.name]
    broken.clear()
    assert start(photos, output) == 0
    assert read_labels(output) == undisturbed
    assert not (output / "_tmp").exists()


def test_an_error_that_passes_is_no_error(
    photos: Path, output: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = fail_creating(monkeypatch, OSError(errno.EIO, ""), "-images-", 1)
    monkeypatch.setattr("maskbeam.transforms.labels.commit.time.sleep", lambda seconds: broken.clear())
    assert start(photos, output) == 0
    assert not broken and read_labels(output) == undisturbed


@pytest.mark.parametrize("name", ["summary.json", ".start.json"])
def test_other_files_that_cannot_be_written_are_told(
    name: str, photos: Path, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = fail_creating(monkeypatch, OSError(errno.ENOSPC, ""), name, 0)
    assert start(photos, output) == 1
    one_line(capsys.readouterr().err, f"cannot write {output}", name, "No space left on device")
    broken.clear()
    assert start(photos, output) == 0
    assert len(read_labels(output).images) == 6


def test_an_output_that_is_deleted_is_told(photos: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(photos, output, load=interfere(lambda: shutil.rmtree(output, ignore_errors=True), 5)) == 1
    one_line(capsys.readouterr().err, f"{output}/run.json is gone")


# The input.


def failures(output: Path) -> list[tuple[str, str, str]]:
    return [
        (row["image_id"], row["error_stage"], row["error"])
        for row in read_labels(output).images
        if row["status"] == "failed"
    ]


def test_a_file_that_goes_away_is_a_row_and_its_return_is_noticed(
    photos: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(photos, output, load=interfere((photos / "5.png").unlink, 1)) == 0
    ((image_id, stage, error),) = failures(output)
    assert (image_id, stage) == ("5.png", "read") and "No such file" in error and "5.png" in error
    assert "1 failed" in capsys.readouterr().out
    # Without the file there is no row; when it is back, it is labeled as any new one.
    assert start(photos, output) == 0
    assert failures(output) == [] and len(read_labels(output).images) == 5
    (photos / "5.png").write_bytes(photo_bytes(5))
    assert start(photos, output) == 0
    assert failures(output) == [] and len(read_labels(output).images) == 6


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """A shard of thirty photos. More than is read ahead at the first look."""
    data = tmp_path / "data"
    data.mkdir()
    photos = [photo_bytes(number, (400, 300), "BMP") for number in range(30)]
    (data / "a.tar").write_bytes(images_tar(photos))
    return data / "a.tar"


def test_a_shard_that_goes_away_before_it_is_read_is_a_row_and_the_next_start_counts_its_chunks(
    photos: Path, tar: Path, output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = FileSystems.open

    def gone(path: str, *arguments: Any, **options: Any) -> Any:
        if path == str(tar):
            tar.unlink(missing_ok=True)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(FileSystems, "open", gone)
    photos.rename(tar.parent / "photos")
    assert label("--input", tar.parent, "--output", output) == 0
    ((image_id, stage, error),) = failures(output)
    assert (image_id, stage) == ("a.tar#0", "read") and "No such file" in error and str(tar) in error
    capsys.readouterr()
    assert label("--input", tar.parent, "--output", output) == 0
    assert f"1 chunks in {output} are of inputs that are not there any more" in capsys.readouterr().out


def test_a_shard_that_is_cut_while_it_is_read_gives_what_was_there_and_the_next_start_names_the_change(
    tar: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tar.read_bytes()

    def cut() -> None:
        os.truncate(tar, len(whole) // 2)

    assert start(tar.parent, output, load=interfere(cut, 1)) == 0
    ((image_id, stage, error),) = failures(output)
    rows = read_labels(output).images
    assert image_id == f"a.tar#{len(rows) - 1}" and stage == "read" and "the shard breaks off here" in error
    assert 10 <= len(rows) <= 16
    capsys.readouterr()
    assert start(tar.parent, output) == 0  # its images are those that were labeled
    assert len(read_labels(output).images) == len(rows)
    tar.write_bytes(whole)
    assert start(tar.parent, output) == 1
    one_line(capsys.readouterr().err, f"{tar} changed since it was labeled", "--accept_changed")
    assert start(tar.parent, output, "--accept_changed") == 0
    assert failures(output) == [] and len(read_labels(output).images) == 30


def test_a_directory_that_may_not_be_read_any_more_is_a_row_each(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_photos(tmp_path / "photos", 3)
    opened = LocalFileSystem.open

    def refuse(self: LocalFileSystem, path: str, *arguments: Any) -> Any:
        if path.endswith("1.png"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(self, path, *arguments)

    monkeypatch.setattr(LocalFileSystem, "open", refuse)
    assert start(photos, output) == 0
    assert failures(output) == [("1.png", "read", f"[Errno 13] Permission denied: '{photos / '1.png'}'")]
    monkeypatch.undo()
    assert start(photos, output, "--retry_failed") == 0
    assert failures(output) == []
