"""The records that cross stages. Images stay encoded bytes, masks are RLE: nothing here is large."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa

# Formats a shard can have. "image" is a directory's loose image files; the others are one file each.
FORMATS = ("tfrecord", "tar", "parquet", "image")

# Failed images named in a summary; all of them are rows in the output.
MAX_FAILURES_SHOWN = 10

# Names of annotations in a summary.
MAX_ANNOTATIONS_SHOWN = 10

# The class of masks that have none: SAM finds objects, and knows no classes.
CATEGORY_OBJECT = 1


# A byte that is not UTF-8, or the backslash of a name that looks like one.
_ESCAPE = re.compile(r"\\x([89a-f][0-9a-f]|5c)")


class DamagedFile(RuntimeError):
    """A file is not what it should be. The message names it, says where and what is wrong, and what to do."""


def printable(text: str) -> str:
    """Text that UTF-8 can store: bytes of a file name that are not UTF-8 become \\xNN."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def escape_name(name: str) -> str:
    """A file name as UTF-8 can store it; different names stay different.

    Bytes that are not UTF-8 become \\xNN. The backslash of a name that spells that out becomes \\x5c.

    >>> print(escape_name("caf\\udce9.jpg"), escape_name(r"caf\\xe9.jpg"), escape_name(r"a\\b.jpg"))
    caf\\xe9.jpg caf\\x5cxe9.jpg a\\b.jpg
    """
    return printable(_ESCAPE.sub(r"\\x5cx\1", name))


def unescape_name(name: str) -> str:
    """Inverse of escape_name: the name as the file system has it."""
    return _ESCAPE.sub(lambda escape: bytes([int(escape[1], 16)]).decode("utf-8", "surrogateescape"), name)


@dataclass(frozen=True)
class SourceFile:
    """An input file as the file system lists it.

    Attributes:
      last_updated: seconds since 1970; 0 = not known. A hint that the bytes are those of before, and no more.
    """

    path: str
    num_bytes: int
    last_updated: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Shard:
    """One input file, or up to `chunk_size` consecutive loose image files of one directory.

    Attributes:
      name: stem of the output files of its chunks: the path relative to the run's root, percent-encoded.
      path: the file, or the directory of the loose files.
      format: one of FORMATS.
      files: the file itself, or the loose files in the order of their paths.
      first_chunk: index of its first chunk. Loose files come one chunk a Shard, so theirs count up.
      max_images: read no more images than this; None = all.
      generation: of its chunks: a chunk of a higher one replaces it.
      redone: (index, generation) of those of its chunks that have a higher one.
      digest: identifies what its chunks are made of, so that a resume notices one that is made of something else.
    """

    name: str
    path: str
    format: str
    files: tuple[SourceFile, ...]
    first_chunk: int = 0
    max_images: int | None = None
    generation: int = 0
    redone: tuple[tuple[int, int], ...] = ()
    digest: str = ""

    def generation_of(self, index: int) -> int:
        """The generation of one of its chunks."""
        return dict(self.redone).get(index, self.generation)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def source(self) -> str:
        """What the shard is made of, for people."""
        return f"{len(self.files)} file{'s' * (len(self.files) != 1)}, {self.num_bytes} bytes"


@dataclass(frozen=True)
class Failure:
    """Why an image has no masks: the stage ("read", "decode", "prompt" or "model") and a sentence for people."""

    stage: str
    reason: str


@dataclass(frozen=True)
class Annotations:
    """Images of tar samples that are no rows, since they annotate the sample's photo, as 17.seg.png does 17.jpg.

    Attributes:
      images: how many.
      names: what the first few, in the order of the alphabet, are called behind the key: `seg.png`.
    """

    images: int = 0
    names: tuple[str, ...] = ()

    def __add__(self, other: Annotations) -> Annotations:
        if not (self.images and other.images):
            return self if self.images else other
        names = sorted({*self.names, *other.names})[:MAX_ANNOTATIONS_SHOWN]
        return Annotations(self.images + other.images, tuple(names))


NO_ANNOTATIONS = Annotations()


@dataclass(frozen=True, eq=False)
class Prompts:
    """What to find in one image: P prompts, in pixels of the image after orientation. One prompt, one mask.

    A prompt is a box, points, a coarse mask, or any of these together.

    Attributes:
      boxes_xyxy: (P, 4) float64, edges as in COCO's x, y, x + w, y + h; NaN = no box.
      points_xy: (N, 2) float64, the points of all prompts one after the other.
      point_labels: (N,) int8, 1 = on the object, 0 = beside it.
      first_point: (P + 1,) int64: those of prompt p are first_point[p] to first_point[p + 1].
      masks: COCO compressed RLE of the coarse masks, of the image's size; None = no mask.
      category_ids: (P,) int32.
      scores: (P,) float32, a detector's confidence; NaN = not known.
      ids: of each prompt where it comes from, in its words.
    """

    boxes_xyxy: np.ndarray
    points_xy: np.ndarray
    point_labels: np.ndarray
    first_point: np.ndarray
    masks: tuple[str | None, ...]
    category_ids: np.ndarray
    scores: np.ndarray
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of_boxes(cls, boxes_xyxy: np.ndarray) -> Prompts:
        """One prompt for each box and nothing else: no class, no score, numbers as ids.

        Args:
          boxes_xyxy: (P, 4) pixels.
        """
        count = len(boxes_xyxy)
        return cls(
            boxes_xyxy=np.asarray(boxes_xyxy, np.float64),
            points_xy=np.empty((0, 2)),
            point_labels=np.empty(0, np.int8),
            first_point=np.zeros(count + 1, np.int64),
            masks=(None,) * count,
            category_ids=np.full(count, CATEGORY_OBJECT, np.int32),
            scores=np.full(count, np.nan, np.float32),
            ids=tuple(str(index) for index in range(count)),
        )


@dataclass(frozen=True)
class DroppedPrompt:
    """A prompt that gets no mask, since no model could make sense of it; the image's others do.

    Attributes:
      index: which of the image's prompts.
      id: as in Prompts.
      reason: a clause for people: "its box lies outside ...".
    """

    index: int
    id: str
    reason: str


@dataclass(frozen=True)
class EncodedImage:
    """One image as it lies in its shard, or the reason why it could not be read.

    Attributes:
      image_id: unique in the run: path relative to root for loose files, `<shard path>#<row>` in shards.
      row: position in the shard, from 0; None for loose files.
      key: the record's own key (WebDataset key, `image/source_id`), if it has one.
      file_name: the record's own file name, if it has one; for loose files the base name.
      data: the file's bytes; empty where reading failed.
      failure: set where reading failed.
      annotations: other images of its sample, which are not labeled.
      prompts: what to find in it, where its record says so: rows of maskbeam.transforms.prompt_files.rows.SCHEMA, since
        its size is not known yet; None = nothing said.
    """

    image_id: str
    row: int | None
    key: str | None
    file_name: str | None
    data: bytes
    failure: Failure | None = None
    annotations: Annotations = NO_ANNOTATIONS
    prompts: pa.RecordBatch | None = None


@dataclass(frozen=True)
class Chunk:
    """Consecutive images of one shard: the unit of work, of commit and of resume.

    Attributes:
      shard: where the images come from.
      index: position in the shard, from 0.
      images: at most `chunk_size` of them.
      final: True for the shard's last chunk.
      digest: as in Shard.
    """

    shard: Shard
    index: int
    images: tuple[EncodedImage, ...]
    final: bool
    digest: str


@dataclass(frozen=True)
class Sums:
    """Figures that are added field by field, over the images or the processes that they are of."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Dropped(Sums):
    """How many candidate masks each filter removed, in the order of the filters.

    `prompt` counts prompts that cannot be used, before the model sees them; each counts as one candidate.
    """

    prompt: int = 0
    predicted_iou: int = 0
    stability: int = 0
    crop_edge: int = 0
    box_nms: int = 0
    crop_nms: int = 0
    small_region: int = 0
    area: int = 0
    containment: int = 0
    max_masks: int = 0

    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Prompt:
    """What one mask answers: a point of the grid, or the prompt that somebody gave.

    Attributes:
      points_xy: (x, y) of its points in pixels of the image; one for a point of the grid, NaN where an imported mask
        has none.
      index: position among the image's prompts; None for a point of the grid, which has nothing of what follows.
      id: what its source calls it.
      point_labels: one for each point, 1 = on the object, 0 = beside it.
      box_xywh: pixels of the image, as the model got it; None = no box.
      mask: whether it has a coarse mask.
      score: a detector's confidence; None = not known.
    """

    points_xy: tuple[tuple[float, float], ...]
    index: int | None = None
    id: str | None = None
    point_labels: tuple[int, ...] = ()
    box_xywh: tuple[float, float, float, float] | None = None
    mask: bool = False
    score: float | None = None


@dataclass(frozen=True)
class Mask:
    """One mask of one image, ready to be written.

    Attributes:
      size_hw: (H, W) of the image in pixels.
      counts: COCO compressed RLE, column-major.
      bbox_xywh: pixels, COCO's convention (pycocotools' toBbox of the RLE).
      area: pixels.
      predicted_iou: the model's own estimate of the mask's IoU with the object; of an imported mask its score, or NaN.
      stability_score: IoU of the mask cut at a higher and at a lower logit, [0, 1]; NaN where both are empty, and where
        an imported mask has none.
      prompt: what it answers.
      crop_box_xywh: the crop it was made in, pixels of the image; all of the image where an imported mask has none.
      parent_id: mask_index of the smallest mask of the image that contains it; None if there is none, or if nobody
        looked (`label` does not).
      category_id: its class.
      iscrowd: 1 = a crowd, as COCO has them; else 0.
      mask_token: which of the model's masks for the prompt it is, 0..3; None for a point of the grid.
    """

    size_hw: tuple[int, int]
    counts: str
    bbox_xywh: tuple[float, float, float, float]
    area: int
    predicted_iou: float
    stability_score: float
    prompt: Prompt
    crop_box_xywh: tuple[float, float, float, float]
    parent_id: int | None = None
    category_id: int = CATEGORY_OBJECT
    iscrowd: int = 0
    mask_token: int | None = None


@dataclass(frozen=True)
class StoredCandidate:
    """A candidate before any choice was made: what selection needs to know of it, so that it can be done again.

    Attributes:
      crop: where it was made.
      point_xy: the prompt that made it, in pixels of the image.
      predicted_iou, stability_score: as in Mask.
      box_xyxy: inclusive pixel indices in the crop, as the reference has it; 0, 0, 0, 0 for an empty mask.
      counts, area: as in Mask; None if it was below the bar of the stability, so that it was not encoded.
    """

    crop: CropBox
    point_xy: tuple[float, float]
    predicted_iou: float
    stability_score: float
    box_xyxy: tuple[int, int, int, int]
    counts: str | None
    area: int | None


@dataclass(frozen=True)
class Seconds(Sums):
    """Where the time went: decode = image bytes, embed = image encoder, predict_masks = mask decoder.

    Of the threads that did it, which work side by side: the sum is more than the wall time.
    """

    decode: float = 0.0
    embed: float = 0.0
    predict_masks: float = 0.0
    postprocess: float = 0.0
    write: float = 0.0

    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class ImageMasks:
    """What a labeler makes of one image. The fields are those of LabeledImage; seconds are those it took here.

    Attributes:
      dropped_prompts: what could not be used of the image's prompts, and why; as many as dropped.prompt.
      clipped_prompts: prompts whose box reached beyond the image and was clipped to it.
    """

    masks: tuple[Mask, ...]
    num_candidates: int
    dropped: Dropped
    seconds: Seconds
    candidates: tuple[tuple[StoredCandidate, ...], ...] = ()
    num_prompts: int | None = None
    dropped_prompts: tuple[DroppedPrompt, ...] = ()
    clipped_prompts: int = 0


@dataclass(frozen=True)
class WorkerTime(Sums):
    """Wall time of worker processes in seconds, summed over them, so that it gives the pace of one.

    Attributes:
      load_model, compile: until the first image (with crops: its first crop) was through the model; it is included.
      label: everything else, reading and writing included.
      images: labeled in that time.
      started: worker processes.
    """

    load_model: float = 0.0
    compile: float = 0.0
    label: float = 0.0
    images: int = 0
    started: int = 0

    @property
    def images_per_second(self) -> float | None:
        """Of one worker, without its start-up; None if that was all it did."""
        return self.images / self.label if self.images and self.label else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "images_per_second": self.images_per_second}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WorkerTime:
        """Inverse of to_dict."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


@dataclass(frozen=True)
class LabeledImage:
    """What became of one image: masks in the reference's order, or a failure.

    Attributes:
      source: the image without its bytes.
      num_bytes: of the encoded image.
      sha256: of the bytes, hex; empty where there were none.
      size_hw: (H, W) in pixels after orientation; None where decoding failed.
      exif_orientation: 1..8 as stored in the file, 1 where it says nothing.
      num_candidates: masks that could have become rows: points of the grid x 3, the image's prompts (each of those that
        can be used x 4 if all of its masks are wanted), or the masks of an imported image. Equals len(masks) +
        dropped.total().
      candidates: with keep_candidates those above the bar, one tuple for each crop, as the model proposed them.
      num_prompts: that the image was given; None where it was a grid, or where it was imported.
      prompts_key: the key that its prompts were found by; None where there is none.
      dropped_prompts: those that cannot be used, and why.
      clipped_prompts: how many had a box that reached beyond the image.
    """

    source: EncodedImage
    num_bytes: int
    sha256: str
    size_hw: tuple[int, int] | None
    exif_orientation: int
    masks: tuple[Mask, ...] = ()
    num_candidates: int = 0
    dropped: Dropped = Dropped()
    failure: Failure | None = None
    seconds: Seconds = Seconds()
    candidates: tuple[tuple[StoredCandidate, ...], ...] = ()
    num_prompts: int | None = None
    prompts_key: str | None = None
    dropped_prompts: tuple[DroppedPrompt, ...] = ()
    clipped_prompts: int = 0

    @property
    def status(self) -> str:
        if self.failure:
            return "failed"
        return "labeled" if self.masks else "empty"


@dataclass(frozen=True)
class LabeledChunk:
    """A chunk's images with their masks, from whatever they come: labeled, refined or imported.

    Attributes:
      shard, path, source: name of its shard, where that lies, and what it is made of, for people; as in Shard.
      index, final, digest: as in Chunk.
      generation: a chunk of a higher one replaces it.
      encoded_bytes: of the images; None = the sum of what they know themselves.
      keep_candidates: whether the images' candidates are stored.
      workers: what the chunk took, and the start-up of its process if it is the first one.
    """

    shard: str
    path: str
    source: str
    index: int
    images: tuple[LabeledImage, ...]
    final: bool
    digest: str
    generation: int = 0
    encoded_bytes: int | None = None
    keep_candidates: bool = False
    workers: WorkerTime = WorkerTime()

    @classmethod
    def of(
        cls,
        shard: Shard,
        index: int,
        images: tuple[LabeledImage, ...],
        final: bool,
        digest: str,
        keep_candidates: bool = False,
    ) -> LabeledChunk:
        """A chunk of a shard of the input."""
        generation = shard.generation_of(index)
        return cls(
            shard.name, shard.path, shard.source, index, images, final, digest, generation, None, keep_candidates
        )

    def totals(self) -> Totals:
        """Sums over the chunk's images."""
        failed = [image for image in self.images if image.failure]
        return Totals(
            images=len(self.images),
            encoded_bytes=(
                sum(image.num_bytes for image in self.images) if self.encoded_bytes is None else self.encoded_bytes
            ),
            labeled=sum(image.status == "labeled" for image in self.images),
            empty=sum(image.status == "empty" for image in self.images),
            failed=len(failed),
            masks=sum(len(image.masks) for image in self.images),
            candidates=sum(image.num_candidates for image in self.images),
            dropped=sum((image.dropped for image in self.images), Dropped()),
            seconds=sum((image.seconds for image in self.images), Seconds()),
            workers=self.workers,
            chunks=1,
            failures=tuple(
                f"{image.source.image_id}: {image.failure.stage}: {image.failure.reason}"
                for image in failed[:MAX_FAILURES_SHOWN]
                if image.failure
            ),
            annotations=sum((image.source.annotations for image in self.images), NO_ANNOTATIONS),
            prompts=sum(image.num_prompts or 0 for image in self.images),
            clipped_prompts=sum(image.clipped_prompts for image in self.images),
            dropped_prompts=tuple(
                f"{image.source.image_id}: {prompt.id or f'number {prompt.index}'}: {prompt.reason}"
                for image in self.images
                for prompt in image.dropped_prompts
            )[:MAX_FAILURES_SHOWN],
        )


@dataclass(frozen=True)
class Totals(Sums):
    """Sums over images; the sum of all chunks' totals is the run's summary.

    Attributes:
      chunks: committed ones; 0 = not known, before version 2.
      failures: "image_id: stage: reason" of the first few failed images, in the order of their ids.
      annotations: images of tar samples that are not among `images`.
      prompts: that the images were given.
      clipped_prompts: of those, how many had a box that reached beyond its image.
      dropped_prompts: "image_id: prompt: reason" of the first few that cannot be used, in the order of the images' ids.
    """

    images: int = 0
    encoded_bytes: int = 0
    labeled: int = 0
    empty: int = 0
    failed: int = 0
    masks: int = 0
    candidates: int = 0
    dropped: Dropped = Dropped()
    seconds: Seconds = Seconds()
    workers: WorkerTime = WorkerTime()
    chunks: int = 0
    failures: tuple[str, ...] = ()
    annotations: Annotations = NO_ANNOTATIONS
    prompts: int = 0
    clipped_prompts: int = 0
    dropped_prompts: tuple[str, ...] = ()

    def __add__(self, other: Totals) -> Totals:
        added = super().__add__(other)
        return replace(
            added,
            failures=tuple(sorted(added.failures)[:MAX_FAILURES_SHOWN]),
            dropped_prompts=tuple(sorted(added.dropped_prompts)[:MAX_FAILURES_SHOWN]),
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "workers": self.workers.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Totals:
        """Inverse of to_dict."""
        annotations = values.get("annotations", asdict(NO_ANNOTATIONS))  # labels of earlier versions have none
        return cls(
            **{
                **values,
                "dropped": Dropped(**values["dropped"]),
                "seconds": Seconds(**values["seconds"]),
                "workers": WorkerTime.from_dict(values.get("workers", {})),
                "failures": tuple(values["failures"]),
                "dropped_prompts": tuple(values.get("dropped_prompts", ())),
                "annotations": Annotations(annotations["images"], tuple(annotations["names"])),
            }
        )


@dataclass(frozen=True)
class ChunkReport:
    """What a committed chunk leaves behind in its images file.

    Attributes:
      digest, source: what the chunk was made of, for machines (see Shard) and for people.
      final: True for the shard's last chunk.
      run_id: the id in run.json when it was committed.
      generation: of the chunk, see Shard.
      siblings: bytes of the files that were committed with it, by their directories; None before version 2.
    """

    shard: str
    index: int
    final: bool
    digest: str
    source: str
    totals: Totals
    run_id: str | None = None
    generation: int = 0
    siblings: dict[str, int] | None = None


@dataclass(frozen=True)
class CropBox:
    """Part of an image that SAM sees as an image of its own.

    Attributes:
      xyxy: pixels of the image, x1 and y1 exclusive.
      layer: 0 for the full image; layer i >= 1 has (2**i)**2 boxes.
    """

    xyxy: tuple[int, int, int, int]
    layer: int

    @property
    def size_hw(self) -> tuple[int, int]:
        x0, y0, x1, y1 = self.xyxy
        return y1 - y0, x1 - x0

    @property
    def xywh(self) -> tuple[float, float, float, float]:
        x0, y0, x1, y1 = self.xyxy
        return float(x0), float(y0), float(x1 - x0), float(y1 - y0)
