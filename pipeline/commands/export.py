"""maskbeam export: labels in the formats of other tools, chunk by chunk, so that memory does not grow with them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from PIL import Image

from maskbeam.pipeline.exits import EXIT_DONE, EXIT_FAILED, UsageError
from maskbeam.pipeline.options import parse_job
from maskbeam.pipeline.progress import progress_bar
from maskbeam.pipeline.results import escape_controls
from maskbeam.transforms.files.beam_files import FileSystems
from maskbeam.transforms.files.storage import read_json, replace_file, write_json
from maskbeam.transforms.files.systems import is_local, open_path
from maskbeam.transforms.formats.coco import annotation_to_coco, image_to_coco, segmentation_to_polygons
from maskbeam.transforms.formats.file_names import file_names, stem
from maskbeam.transforms.formats.label_picture import Overlap, label_picture
from maskbeam.transforms.formats.polygons import PolygonLoss
from maskbeam.transforms.formats.sa1b import sa1b_record
from maskbeam.transforms.formats.yolo import YoloLoss, yolo_text
from maskbeam.transforms.labels.layout import ChunkKey
from maskbeam.transforms.labels.run_file import Run, read_run
from maskbeam.transforms.labels.tables import list_chunks, read_chunk, read_chunks

# What an export leaves in its directory: a list of its files, and what lies beside it.
EXPORT_FILE = "export.json"
_STAGING_PREFIX = ".maskbeam-export-"

# How a COCO file that an export wrote begins. Other readers leave a key that they do not know alone.
_COCO_MARK = b'{"exported_by": "maskbeam",'

_ENTRIES = {"sa1b": ("annotations",), "yolo": ("labels", "data.yaml"), "png": ("masks",)}

_DESCRIPTION = "Writes labels in the format of another tool."

_MAX_FAILURES_SHOWN = 5


@dataclass(frozen=True)
class ExportConfig:
    """What is written where.

    Attributes:
      labels: directory of labels, as `label`, `refine` or `import` writes it, on any Beam file system.
      format: coco, an instances file; sa1b, a JSON file an image; yolo, a text file an image for segmentation; png, a
        16-bit picture an image, with the mask of each pixel.
      output: a file for coco, on any Beam file system; a local directory for the others.
      polygons: write polygons instead of RLE, for tools that need them (coco only). They fill holes; how much that
        changes is printed.
      overwrite: replace the files that an earlier export wrote to output; no others are touched.
    """

    labels: str
    format: Literal["coco", "sa1b", "yolo", "png"]
    output: str
    polygons: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.format not in ("coco", *_ENTRIES):
            raise ValueError(f"format is {self.format}; expected one of coco, {', '.join(_ENTRIES)}.")
        if self.polygons and self.format != "coco":
            raise ValueError(f"polygons is for format coco; {self.format} has one form only.")


@dataclass(frozen=True)
class ExportJob:
    """Everything `maskbeam export` was asked to do."""

    export: ExportConfig


@dataclass
class Labels:
    """The images of the labels as a stream, and what has come of it so far.

    Attributes:
      run: that made them.
      chunks: all of them.
      images, masks: given so far.
      failures: of the first failed images, which are not given, having no masks and often no size.
    """

    directory: str
    run: Run
    chunks: list[ChunkKey]
    images: int = 0
    masks: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Of each image that was labeled its COCO record and its rows of the annotations table.

        Ids count all images, failed ones included, so that they stay when those are labeled after all.
        """
        for chunk in progress_bar(self.chunks, unit="chunk"):
            for image, masks in read_chunk(self.directory, chunk).rows():
                if image["status"] == "failed":
                    self.failed += 1
                    if self.failed <= _MAX_FAILURES_SHOWN:
                        self.failures.append(f"{image['image_id']}: {image['error_stage']}: {image['error']}")
                    continue
                self.images += 1
                yield image_to_coco(image, self.images + self.failed), masks
                self.masks += len(masks)

    @property
    def categories(self) -> list[dict[str, Any]]:
        """COCO records of the categories; of prompts in records only the ids are known."""
        categories = self.run.categories
        if categories is not None:
            return categories
        chunks = (chunk.annotations["category_id"] for chunk in read_chunks(self.directory))
        ids = {category_id for column in chunks for category_id in column.unique().to_pylist()}
        return [{"id": category_id, "name": str(category_id)} for category_id in sorted(ids)]


def main(argv: list[str]) -> int:
    """Parses the flags and exports."""
    return run_export(parse_export(argv).export)


def parse_export(argv: list[str]) -> ExportJob:
    """Command line -> what to do."""
    return parse_job("export", ExportJob, argv, _DESCRIPTION)


def run_export(config: ExportConfig) -> int:
    """Exports and prints what was written and what was lost.

    Returns:
      the exit code.

    Raises:
      UsageError: before anything is read, if the job cannot be done as asked.
    """
    try:
        labels = Labels(config.labels, read_run(config.labels), list_chunks(config.labels))
        check_output(config)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    write = {"coco": _export_coco, "sa1b": _export_sa1b, "yolo": _export_yolo, "png": _export_png}[config.format]
    try:
        told = write(labels, config)
    except (ValueError, OSError) as error:
        print(f"maskbeam: {error}", file=sys.stderr)
        return EXIT_FAILED
    print(f"{labels.images} images with {labels.masks} masks: {config.output}")
    if labels.failed:
        print(
            f"{labels.failed} failed images are not in it; they are rows with status failed in {config.labels}/images"
        )
        print("\n".join(f"  failed {escape_controls(failure)}" for failure in labels.failures))
    if told:
        print(told)
    return EXIT_DONE


def check_output(config: ExportConfig) -> None:
    """Refuses to write over anything but, if asked to, an earlier export.

    Raises:
      ValueError
    """
    output = config.output
    if config.format == "coco":
        _check_coco_output(output, config.overwrite)
        return
    if not is_local(output):
        raise ValueError(f"--output {output} is not local; --format {config.format} writes into a local directory.")
    if os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"--output {output} is a file; --format {config.format} writes into a directory.")
    before = _earlier_export(Path(output))
    if before and before.finished and not config.overwrite:
        raise ValueError(f"--output {output} holds an export already. Choose another directory, or --overwrite.")
    for entry in _ENTRIES[config.format]:
        if entry not in before.entries and os.path.lexists(os.path.join(output, entry)):
            raise ValueError(
                f"--output {output} already has {entry}, which no export made (no {EXPORT_FILE} says so). Choose "
                "another directory."
            )


def _check_coco_output(output: str, overwrite: bool) -> None:
    is_directory = is_local(output) and os.path.isdir(output)
    if output.endswith("/") or is_directory:
        raise ValueError(
            f"--output {output} is a directory; --format coco writes a file, such as {output.rstrip('/')}/coco.json."
        )
    if not FileSystems.exists(output):
        return
    if not overwrite:
        raise ValueError(f"--output {output} exists. Choose another file, or --overwrite it.")
    with open_path(output) as file:
        if file.read(len(_COCO_MARK)) != _COCO_MARK:
            raise ValueError(
                f"--output {output} was not written by `maskbeam export` (it does not begin with its mark), so "
                "--overwrite leaves it alone. Choose another file, or delete it yourself."
            )


# COCO.


def _export_coco(labels: Labels, config: ExportConfig) -> str:
    """The file has one record a line; annotations come first, since they need not wait for anything."""
    loss = PolygonLoss()
    with replace_file(config.output) as file, tempfile.TemporaryFile() as images:
        file.write(_COCO_MARK + b'\n"annotations": [')
        number = 0
        for image, masks in labels:
            images.write((b",\n" if images.tell() else b"\n") + _json_line(image))
            for mask in masks:
                number += 1
                record = annotation_to_coco(mask, number, image["id"])
                if config.polygons:
                    record["segmentation"] = segmentation_to_polygons(mask, loss)
                file.write((b",\n" if number > 1 else b"\n") + _json_line(record))
        file.write(b'\n],\n"images": [')
        images.seek(0)
        shutil.copyfileobj(images, file)
        file.write(b"\n]")
        about = {"info": _about(labels.run), **(labels.run.coco or {}), "categories": labels.categories}
        about.pop("exported_by", None)  # of labels that were exported and imported again
        for key, value in about.items():
            file.write(b",\n" + _json_line(key) + b": " + _json_line(value))
        file.write(b"\n}\n")
    return str(loss) if config.polygons else ""


def _json_line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _about(run: Run) -> dict[str, Any]:
    """COCO's info: where the masks are from."""
    return {
        "description": "masks of SAM, labeled by maskbeam",
        "version": run.versions.get("maskbeam"),
        "model": run.model,
        "model_fingerprint": run.model_fingerprint,
    }


# Directories.


@dataclass
class Files:
    """The files of an export while they are written: they move to their directory when all are there.

    Attributes:
      directory: where they are written.
      renamed: files that could not have the name of their image, with its image_id.
    """

    directory: Path
    renamed: dict[str, str] = field(default_factory=dict)

    def create(self, folder: str, image: dict[str, Any], extension: str) -> IO[bytes]:
        """Opens the file of an image, whose name no other has."""
        image_id = image.get("image_id", image["file_name"])
        names = file_names(image["file_name"], image_id, extension)
        for name in names:
            path = self.directory / folder / name
            # Names may be taken, too, as a directory, or by one that differs in case.
            with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
                path.parent.mkdir(parents=True, exist_ok=True)
                file = path.open("xb")
                if name != stem(image["file_name"]) + extension:
                    self.renamed[f"{folder}/{name}"] = image_id
                return file
        raise ValueError(f"there is no name left for the labels of {image_id}: {', '.join(names)} are taken")

    def __str__(self) -> str:
        if not self.renamed:
            return ""
        some = "; ".join(f"{name!r} is of {image_id!r}" for name, image_id in list(self.renamed.items())[:3])
        return f"{len(self.renamed)} files have other names than their images, all in {EXPORT_FILE}: {some}"


@dataclass(frozen=True)
class EarlierExport:
    """What an export left in a directory.

    Attributes:
      entries: what belongs to it there, of _ENTRIES; none if there is no export.
      files: paths of its files, relative to the directory.
      finished: False if it was cut off while its files were moved there: the same command may replace it.
    """

    entries: tuple[str, ...] = ()
    files: frozenset[str] = frozenset()
    finished: bool = True

    def __bool__(self) -> bool:
        return bool(self.entries)


def _earlier_export(output: Path) -> EarlierExport:
    """Reads what an export left.

    Raises:
      ValueError: export.json is not one of ours.
    """
    path = output / EXPORT_FILE
    if not os.path.lexists(path):
        return EarlierExport()
    with contextlib.suppress(ValueError, OSError, TypeError, KeyError, AttributeError):
        content = read_json(str(path))
        entries, files = _ENTRIES[content["format"]], frozenset(content["files"])
        # One that was cut off while it replaced another format has files of both.
        entries = tuple({*entries, *(name.split("/")[0] for name in files)})
        known = {entry for entries_of in _ENTRIES.values() for entry in entries_of}
        if known.issuperset(entries) and not any(".." in name.split("/") for name in files):
            return EarlierExport(entries, files, not content.get("unfinished"))
    raise ValueError(
        f"{path} was not written by maskbeam, or by an earlier version. Delete that export yourself, or choose another "
        "--output."
    )


@contextlib.contextmanager
def _new_files(labels: Labels, config: ExportConfig) -> Iterator[Files]:
    """Where the files of an export are written; at the end they replace those of an earlier one, and no others."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=output))
    try:
        files = Files(staging)
        for entry in _ENTRIES[config.format]:
            if "." not in entry:
                (staging / entry).mkdir()
        yield files
        about = {
            "format": config.format,
            "labels": config.labels,
            "images": labels.images,
            "masks": labels.masks,
            "failed_images": labels.failed,
            "renamed": files.renamed,
        }
        _publish(staging, output, about)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, output: Path, about: dict[str, Any]) -> None:
    """Moves an export to its directory, after deleting the files of an earlier one.

    First export.json names the files of both: whatever ends this, the next export knows what may go.

    Raises:
      ValueError: a file that no export wrote is in the way.
    """
    before = _earlier_export(output)
    folders, names = _walk(staging)
    for name in names:
        if name not in before.files and os.path.lexists(output / name):
            raise ValueError(f"{output / name} is in the way, and no export wrote it. Move it, and export again.")
    both = {"format": about["format"], "unfinished": True, "files": sorted({*names, *before.files})}
    write_json(str(output / EXPORT_FILE), both)
    _delete_export(output, before)
    for folder in folders:
        (output / folder).mkdir(exist_ok=True)
    for name in names:
        (staging / name).rename(output / name)
    write_json(str(output / EXPORT_FILE), {**about, "files": names})


def _walk(directory: Path) -> tuple[list[str], list[str]]:
    """The folders and the files below a directory, by their paths there; a folder comes before what is in it."""
    paths = sorted(directory.rglob("*"))
    folders = [path.relative_to(directory).as_posix() for path in paths if path.is_dir()]
    return folders, [path.relative_to(directory).as_posix() for path in paths if not path.is_dir()]


def _delete_export(output: Path, export: EarlierExport) -> None:
    """Deletes the files of an export, and the folders that are empty without them. Links lead to what others made."""
    parents = {Path(name).parent for name in export.files}
    ours = {parent for parent in parents if (output / parent).resolve() == output.resolve() / parent}
    for name in export.files:
        if Path(name).parent in ours:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                (output / name).unlink()
    folders = {output / folder for parent in ours for folder in (parent, *parent.parents)} - {output}
    for folder in sorted(folders, reverse=True):  # what is in a folder comes before it
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()


def _export_sa1b(labels: Labels, config: ExportConfig) -> str:
    first_id = 1
    with _new_files(labels, config) as files:
        for image, masks in labels:
            with files.create("annotations", image, ".json") as file:
                file.write(_json_line(sa1b_record(image, masks, first_id)))
            first_id += len(masks)
    return str(files)


def _export_yolo(labels: Labels, config: ExportConfig) -> str:
    categories = sorted(labels.categories, key=lambda category: category["id"])
    classes = {category["id"]: index for index, category in enumerate(categories)}
    loss = YoloLoss(PolygonLoss())
    with _new_files(labels, config) as files:
        for image, masks in labels:
            with files.create("labels", image, ".txt") as file:
                file.write(yolo_text(masks, classes, loss).encode())
        # A JSON string is one of YAML, too.
        names = "".join(
            f"  {index}: {json.dumps(category.get('name', str(category['id'])))}\n"
            for index, category in enumerate(categories)
        )
        (files.directory / "data.yaml").write_text(
            "# Put or link the images into images/, by the names that they have in labels/, and make a split of them.\n"
            f"train: images\nval: images\nnames:\n{names}",
            "utf-8",
        )
    told = [str(loss.polygons)]
    if loss.crowds or loss.empty:
        told.append(f"left out: {loss.crowds} crowds, {loss.empty} masks without a pixel")
    return "\n".join([*told, *filter(None, [str(files)])])


def _export_png(labels: Labels, config: ExportConfig) -> str:
    overlap = Overlap()
    with _new_files(labels, config) as files:
        for image, masks in labels:
            picture = label_picture(masks, (image["height"], image["width"]), overlap)
            with files.create("masks", image, ".png") as file:
                Image.fromarray(picture).save(file, "PNG")
    share = overlap.hidden_pixels / overlap.pixels if overlap.pixels else 0.0
    told = (
        f"smaller masks lie on larger ones: {share:.1%} of the masks' pixels are hidden, and all of "
        f"{overlap.hidden_masks} masks"
    )
    return "\n".join(filter(None, [told, str(files)]))
