"""Files of prompts, whatever their format, as rows, and the digest that identifies them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.files.beam_files import FileSystems
from maskbeam.transforms.files.paths import absolute, list_files, relative_path
from maskbeam.transforms.files.storage import read_json_bytes
from maskbeam.transforms.files.streams import open_file, read_up_to
from maskbeam.transforms.files.strict_json import parse_json
from maskbeam.transforms.formats.coco import MAX_COCO_BYTES
from maskbeam.transforms.labels.layout import RUN_FILE
from maskbeam.transforms.prompt_files.coco import check_one_kind, coco_prompts, is_results
from maskbeam.transforms.prompt_files.config import PromptConfig, PromptFilesError
from maskbeam.transforms.prompt_files.image_files import MAX_BYTES, read_voc, read_yolo
from maskbeam.transforms.prompt_files.labels import label_categories, read_label_prompts
from maskbeam.transforms.prompt_files.rows import make_batch
from maskbeam.transforms.prompt_files.tables import read_csv_prompts, read_jsonl_prompts, read_parquet_prompts
from maskbeam.transforms.records import DamagedFile, SourceFile, escape_name

# Of what is derived from the files: a new one makes all stores anew.
_VERSION = 1

_TABLES = {
    ".parquet": read_parquet_prompts,
    ".csv": read_csv_prompts,
    ".jsonl": read_jsonl_prompts,
    ".ndjson": read_jsonl_prompts,
}
_IMAGE_FILES = {"yolo": ".txt", "voc": ".xml"}

# What labelImg puts beside YOLO's files.
_NO_LABELS = "classes.txt"

# Rows of small files that become a batch.
_ROWS = 2**14


@dataclass
class PromptSource:
    """Files of prompts.

    Attributes:
      format: one of config.PromptsFormat, neither auto nor record.
      files: sorted by path.
      directory: that their paths are relative to; of labels, their directory.
      categories: id -> name, as far as a file says them; filled while the rows are read.
      images: images that the files name without any prompt, or with; filled likewise, where the format has them.
      crowds: of COCO's annotations; filled likewise.
    """

    format: str
    files: tuple[SourceFile, ...]
    directory: str
    categories: dict[int, str] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    crowds: int = 0


def find_prompts(config: PromptConfig) -> PromptSource:
    """The files of --prompts.

    Raises:
      PromptFilesError: there are none, or none of a format that is known.
    """
    assert config.prompts is not None
    files: dict[str, SourceFile] = {}
    starts = []
    for pattern in config.prompts:
        start, found = _list(pattern)
        starts.append(start)
        files.update({file.path: file for file in found})
    chosen: str = config.prompts_format
    labels = [file for file in files.values() if file.path == f"{starts[0].rstrip('/')}/{RUN_FILE}"]
    if chosen == "labels" or (chosen == "auto" and labels):
        return PromptSource("labels", _label_files(files, starts[0]), starts[0])
    if chosen == "auto":
        chosen = _format_of(list(files), config.prompts)
    extensions = (_IMAGE_FILES[chosen],) if chosen in _IMAGE_FILES else tuple(_TABLES) if chosen == "table" else ()
    kept = {path: file for path, file in files.items() if _is_wanted(path, extensions, len(files))}
    if not kept:
        raise PromptFilesError(
            f"--prompts {' '.join(config.prompts)} has no file of the format {chosen}: expected names with "
            f"{' or '.join(extensions)}."
        )
    return PromptSource(chosen, tuple(kept[path] for path in sorted(kept)), starts[0])


def _list(pattern: str) -> tuple[str, list[SourceFile]]:
    try:
        start, found = list_files(absolute(pattern))
    except Exception as error:  # whatever the file system raises
        raise PromptFilesError(f"--prompts {pattern} cannot be read: {describe_error(error)}.") from error
    if not found:
        raise PromptFilesError(
            f"--prompts {pattern} matches no file. Check the spelling; boxes in the images' own records are "
            "--prompts in_record."
        )
    return start, found


def _format_of(paths: list[str], patterns: tuple[str, ...]) -> str:
    """The format that names show."""
    if any(path.endswith(tuple(_TABLES)) for path in paths):
        return "table"
    if any(path.endswith(".json") for path in paths):
        return "coco"
    raise PromptFilesError(
        f"the format of --prompts {' '.join(patterns)} does not show: {sorted(paths)[0].rpartition('/')[2]!r} is "
        f"neither {', '.join(_TABLES)} nor .json. Say --prompts_format yolo, voc or labels, or rename the file."
    )


def _is_wanted(path: str, extensions: tuple[str, ...], count: int) -> bool:
    if not extensions:
        return count == 1 or path.endswith(".json")
    return path.endswith(extensions) and path.rpartition("/")[2] != _NO_LABELS


def _label_files(files: dict[str, SourceFile], directory: str) -> tuple[SourceFile, ...]:
    start = directory.rstrip("/")
    ours = tuple(f"{start}/{name}" for name in (RUN_FILE, "images/", "annotations/", "manifest"))
    return tuple(files[path] for path in sorted(files) if path.startswith(ours))


def digest_of(source: PromptSource, config: PromptConfig) -> str:
    """Identifies the prompts: the bytes of all files, and the settings that decide what they mean. 32 hex digits."""
    digest = hashlib.sha256()
    settings = (config.prompts_bbox, config.prompts_key, _category_names(config))
    digest.update(json.dumps([_VERSION, source.format, *settings]).encode())
    for file in source.files:
        digest.update(json.dumps([relative_path(file.path, source.directory), file.num_bytes]).encode())
        with open_file(file) as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:32]


def _category_names(config: PromptConfig) -> list[str] | None:
    return None if config.categories is None else read_names(config.categories)


def read_names(path: str) -> list[str]:
    """The names in a file with one a line; the position is the id, from 0.

    Raises:
      PromptFilesError: it cannot be read, or a name is empty or twice there.
    """
    try:
        with FileSystems.open(path) as file:
            names = [line.strip() for line in read_up_to(file, MAX_BYTES).decode("utf-8-sig").splitlines()]
    except Exception as error:
        raise PromptFilesError(f"--categories {path} cannot be read: {describe_error(error)}.") from error
    while names and not names[-1]:
        names.pop()
    first: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not name or first.setdefault(name, line) != line:
            what = f"has {name!r} in lines {first[name]} and {line}" if name else f"has no name in line {line}"
            raise PromptFilesError(f"--categories {path} {what}; expected a name a line, each once.")
    if not names:
        raise PromptFilesError(f"--categories {path} is empty; expected a name a line.")
    return names


def read_prompts(source: PromptSource, config: PromptConfig) -> Iterator[pa.RecordBatch]:
    """All rows, see rows.SCHEMA, in the order of the files and of their own; `problem` names the file.

    Raises:
      PromptFilesError: a file cannot be used as a whole; names it.
    """
    if source.format == "labels":
        with _naming(source.directory):
            source.categories.update(label_categories(source.directory))
            yield from read_label_prompts(source.directory)
    elif source.format == "coco":
        yield from _read_coco(source)
    elif source.format in _IMAGE_FILES:
        yield from _read_image_files(source)
    else:
        for file in source.files:
            yield from _read_table(file, config)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Within this, what is wrong with a file becomes a sentence that names it."""
    try:
        yield
    except DamagedFile as error:  # names it already
        raise PromptFilesError(str(error)) from error
    except (ValueError, OSError, pa.ArrowException) as error:
        own = isinstance(error, ValueError) and not isinstance(error, pa.ArrowException)
        reason = str(error).partition("\n")[0] if own else describe_error(error)
        raise PromptFilesError(f"{path}: {reason}") from error


def _read_table(file: SourceFile, config: PromptConfig) -> Iterator[pa.RecordBatch]:
    extension = next(extension for extension in _TABLES if file.path.endswith(extension))
    with _naming(file.path), open_file(file) as stream:
        for batch in _TABLES[extension](stream, config.prompts_bbox):
            yield _with_file(batch, file.path)


def _with_file(batch: pa.RecordBatch, path: str) -> pa.RecordBatch:
    """The rows, with the file in what is wrong with them."""
    index = batch.schema.get_field_index("problem")
    if batch.column(index).null_count == len(batch):
        return batch
    name = path.rpartition("/")[2]
    named = [text if text is None else f"{name}, {text}" for text in batch.column(index).to_pylist()]
    return batch.set_column(index, batch.schema.field(index), pa.array(named, pa.string()))


def _read_coco(source: PromptSource) -> Iterator[pa.RecordBatch]:
    contents = {}
    for file in source.files:
        with _naming(file.path):
            contents[file.path] = parse_json(read_json_bytes(file.path, MAX_COCO_BYTES))
    check_one_kind(list(contents.values()))
    results = {path: content for path, content in contents.items() if is_results(content)}
    instances = {path: content for path, content in contents.items() if not is_results(content)}
    pairs = (
        [(path, next(iter(instances.values()), None), content) for path, content in results.items()]
        if results
        else [(path, content, None) for path, content in instances.items()]
    )
    for path, truth, result in pairs:
        with _naming(path):
            found = coco_prompts(truth, result)
            source.categories.update(found.categories)
            source.images += found.images
            source.crowds += found.crowds
            for batch in found.batches:
                yield _with_file(batch, path)


def _read_image_files(source: PromptSource) -> Iterator[pa.RecordBatch]:
    rows: list[dict[str, object]] = []
    for file in source.files:
        image = escape_name(relative_path(file.path, source.directory).rpartition(".")[0])
        source.images.append(image)
        name = relative_path(file.path, source.directory)
        try:
            with open_file(file) as stream:
                data = read_up_to(stream, MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes")
            found = list(read_voc(data) if source.format == "voc" else read_yolo(data.decode("utf-8-sig")))
        except (ValueError, OSError) as error:
            found = [{"problem": describe_error(error) if isinstance(error, OSError) else str(error)}]
        for row in found:
            if "problem" in row:
                row["problem"] = f"{escape_name(name)}, {row['problem']}"
            rows.append({**row, "image": image})
        if len(rows) >= _ROWS:
            yield make_batch(rows)
            rows = []
    if rows:
        yield make_batch(rows)
