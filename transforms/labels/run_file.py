"""run.json: what identifies a run, and so what later starts and readers have to know of it.

It is written before anything else. Its content is also in the footer of each Parquet file
(transforms/labels/schema.py), so that a file by itself says how it was made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from maskbeam.transforms.files.storage import MAX_JSON_BYTES, read_json_bytes, write_json
from maskbeam.transforms.files.strict_json import parse_json
from maskbeam.transforms.files.systems import check_scheme, join_path, path_exists
from maskbeam.transforms.formats.coco import OBJECT_CATEGORY, category_ids
from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.labels.layout import RUN_FILE
from maskbeam.transforms.masks.rle import MAX_PIXELS
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.records import DamagedFile

# Of a directory of labels: run.json, and the columns of the tables. 1: neither says so, there is no manifest. 2: the
# input's files are in a manifest. 3: the annotations have the columns of prompts.
FORMAT = 3

_EXPECTED = "Expected the --output of `maskbeam label`, `refine` or `import`."
_MADE_BY_US = {"root", "model_fingerprint", "amg"}

# Fields that are in the file whatever their value is; the others are if they have one.
_ALWAYS = ("root", "input_format", "limit", "model", "model_fingerprint", "amg", "versions")

# What may differ between starts of one run: names for people, not what makes the rows, and where the input lies, since
# a copy of it has the same rows (transforms/labels/reconcile.py looks).
_NOT_IDENTITY = ("prompt_files", "model", "versions", "coco", "id", "root", "manifest", "format", "clearing")

_Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run, as run.json has it. Values are what JSON can hold; None = the run has no such thing.

    Attributes:
      root: directory that image ids are relative to.
      model: by the name that --model was given; None for imported labels.
      model_fingerprint: sha256 of the model's architecture and weights.
      amg: fields of AmgConfig; empty for imported labels.
      names: fields of ReadConfig.
      versions: of Python, this program and the libraries that rows may depend on.
      input_format, chunk_size, limit: as in InputConfig.
      exif, max_pixels: as in ImageConfig.
      dtype: precision of the model.
      backend: of Keras.
      refined_from: of refined labels: the labels, their settings, and fields of ContainmentConfig.
      imported, imported_sha256: of imported labels: the file.
      coco: of imported labels: what the file has beside images and annotations.
      prompts: of labels made from prompts: their files and how they were read.
      prompt_files: where those lay.
      class_records: COCO records of the classes that prompts named; None = see categories.
      format: FORMAT of the version that wrote the directory last.
      id: of the run: a directory that is labeled from the beginning gets a new one.
      manifest: id of the manifest that says which chunks there are.
      clearing: True while the labels of an earlier run are being deleted: a start after a kill goes on with that.
      other: fields of run.json that this version does not know.
    """

    root: str = ""
    model: str | None = None
    model_fingerprint: str | None = None
    amg: _Json = field(default_factory=dict)
    names: _Json | None = None
    versions: _Json = field(default_factory=dict)
    input_format: Literal["image", "tfrecord", "tar", "parquet"] | None = None
    chunk_size: int | None = None
    limit: int | None = None
    exif: Literal["apply", "ignore"] | None = None
    max_pixels: int | None = None
    dtype: str | None = None
    backend: str = ""
    refined_from: _Json | None = None
    imported: str | None = None
    imported_sha256: str | None = None
    coco: _Json | None = None
    prompts: _Json | None = None
    prompt_files: list[str] | None = None
    class_records: list[_Json] | None = None
    format: int = FORMAT
    id: str | None = None
    manifest: str | None = None
    clearing: bool = False
    other: _Json = field(default_factory=dict)

    def to_json(self) -> _Json:
        """The content of run.json."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "other"}
        said = {name: value for name, value in values.items() if name in _ALWAYS or value not in (None, False, "")}
        known = {_NAMES.get(name, name): value for name, value in said.items()}
        return {**self.other, **known}

    @classmethod
    def from_json(cls, values: _Json) -> Run:
        """Inverse of to_json. What earlier versions wrote is read; their format is 1 if they do not say.

        Raises:
          ValueError: a field is not what it should be. Says which, and what was expected.
        """
        known: _Json = {"format": 1}
        for name, kind in _KINDS.items():
            key = _NAMES.get(name, name)
            if values.get(key) is None:
                continue
            if type(values[key]) is not kind:
                raise ValueError(f"its {key} is {str(values[key])[:100]!r}; expected {kind.__name__}")
            known[name] = values[key]
        keys = {_NAMES.get(name, name) for name in _KINDS}
        run = cls(**known, other={name: value for name, value in values.items() if name not in keys})
        try:
            _ = run.read_config, run.image_config
        except TypeError as error:  # the settings of another version
            raise ValueError(str(error)) from error
        if run.coco is not None and "categories" not in run.coco:
            raise ValueError("its coco has no categories")
        _ = run.category_ids
        return run

    def to_footer(self) -> str:
        """JSON for the footers of the tables: all but what an imported file says, which can be long."""
        return json.dumps({name: value for name, value in self.to_json().items() if name != "coco"}, sort_keys=True)

    def identity(self) -> _Json:
        """What has to be the same for a later start to go on with the run; parts of settings by their own names."""
        flat: _Json = {}
        for name, value in self.to_json().items():
            if name not in _NOT_IDENTITY:
                flat.update(value if isinstance(value, dict) else {name: value})
        return {name: _as_json(value) for name, value in flat.items() if value is not None}

    def changes(self, now: Run) -> list[str]:
        """What makes another run of `now` than this one is, a sentence for each field."""
        old, new = self.identity(), now.identity()
        return [
            f"{name} was {old.get(name)}, now {new.get(name)}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]

    @property
    def categories(self) -> list[_Json] | None:
        """COCO records of the classes that masks may have; None = prompts in records have any."""
        if self.class_records is not None or self.prompts is not None:
            return self.class_records
        if self.coco is None:
            return [OBJECT_CATEGORY]
        records: list[_Json] = self.coco["categories"]
        return records

    @property
    def category_ids(self) -> frozenset[int] | None:
        """The ids of the categories; None = any."""
        return None if self.categories is None else category_ids(self.categories)

    @property
    def read_config(self) -> ReadConfig:
        """Under what names images were found in shards."""
        return ReadConfig(**{name: tuple(names) for name, names in (self.names or {}).items()})

    @property
    def image_config(self) -> ImageConfig:
        """How images were decoded."""
        return ImageConfig(
            ImageConfig.exif if self.exif is None else self.exif,
            ImageConfig.max_pixels if self.max_pixels is None else self.max_pixels,
        )

    @property
    def most_pixels(self) -> int:
        """That an image with masks can have."""
        return min(self.max_pixels or MAX_PIXELS, MAX_PIXELS)


_KINDS: dict[str, type] = {
    **dict.fromkeys(("root", "model", "model_fingerprint", "input_format", "exif", "dtype", "backend"), str),
    **dict.fromkeys(("imported", "imported_sha256", "id", "manifest"), str),
    **dict.fromkeys(("amg", "names", "versions", "refined_from", "coco", "prompts"), dict),
    **dict.fromkeys(("chunk_size", "limit", "max_pixels", "format"), int),
    **dict.fromkeys(("prompt_files", "class_records"), list),
    "clearing": bool,
}

# Fields by another name in the file.
_NAMES = {"class_records": "categories"}


def _as_json(value: Any) -> Any:
    return [_as_json(part) for part in value] if isinstance(value, (list, tuple)) else value


def write_run(output: str, run: Run) -> None:
    """Makes run.json say this. Raises OSError."""
    write_json(join_path(output, RUN_FILE), run.to_json())


def read_run(labels: str) -> Run:
    """The run that made labels.

    Args:
      labels: directory that `maskbeam label`, `refine` or `import` wrote, on any Beam file system.

    Raises:
      ValueError: the directory is not one of ours, or of a newer version.
      DamagedFile: it is, but run.json is damaged.
    """
    return parse_run(labels, read_run_bytes(labels))


def read_run_bytes(labels: str) -> bytes:
    """run.json as it is; see read_run for the errors."""
    path = join_path(labels, RUN_FILE)
    check_scheme(path)
    try:
        return read_json_bytes(path, MAX_JSON_BYTES)
    except OSError as error:
        if path_exists(path):
            raise
        raise ValueError(f"{labels} holds no labels: there is no {RUN_FILE}. {_EXPECTED}") from error
    except ValueError as error:
        raise _damaged(path, error) from error


def parse_run(labels: str, data: bytes) -> Run:
    """A Run from the bytes of run.json; see read_run for the errors."""
    path = join_path(labels, RUN_FILE)
    try:
        values = parse_json(data)
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(values, dict) or not values.keys() >= _MADE_BY_US:
        raise ValueError(f"{path} was not written by maskbeam. {_EXPECTED}")
    written = values.get("format")
    if type(written) is int and written > FORMAT:
        raise ValueError(
            f"{path} was written by a newer maskbeam (format {written}, this one knows {FORMAT}). Update maskbeam."
        )
    try:
        return Run.from_json(values)
    except ValueError as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> DamagedFile:
    return DamagedFile(f"{path} is damaged: {error}. Label again, into another --output.")
