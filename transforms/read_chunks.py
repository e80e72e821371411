"""ReadChunks: the chunks of the shards that no earlier start has committed, and the reports of those that one has."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import apache_beam as beam

from maskbeam.transforms.chunks import cut_chunks
from maskbeam.transforms.labels.layout import ANNOTATIONS_DIR, CANDIDATES_DIR, IMAGES_DIR, ChunkKey, list_tables
from maskbeam.transforms.labels.resume import finished_reports, is_finished
from maskbeam.transforms.prompt_files.in_record import RecordPrompts
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.readers.shard import read_images
from maskbeam.transforms.records import Chunk, ChunkReport, Shard


def read_chunks(
    shard: Shard,
    config: ReadConfig,
    root: str,
    chunk_size: int,
    finished: Container[int],
    prompts: RecordPrompts | None = None,
) -> Iterator[Chunk]:
    """The chunks of a shard that are not finished. At most one of them and one image more are in memory.

    Args:
      chunk_size: images in a chunk; it also closes at CHUNK_BYTES.
      finished: indices of the chunks to leave out. They are cut again all the same, so the others stay what they
        were; finished loose files are not even opened.
      prompts: how the prompts in the records are read; None = they are not.
    """
    if shard.format == "image":
        if shard.first_chunk not in finished:
            images = tuple(read_images(shard, config, root))
            yield Chunk(shard, shard.first_chunk, images, final=True, digest=shard.digest)
        return
    index = shard.first_chunk
    images_of_shard = read_images(shard, config, root, prompts)
    for images, final in cut_chunks(images_of_shard, lambda image: len(image.data), chunk_size):
        if index not in finished:
            yield Chunk(shard, index, images, final, shard.digest)
        del images  # or it would stay in memory beside the next one
        index += 1


FINISHED = "finished"


def read_unfinished(
    shard: Shard,
    config: ReadConfig,
    chunk_size: int,
    root: str,
    reports: list[ChunkReport],
    prompts: RecordPrompts | None = None,
) -> Iterator[Chunk]:
    """The chunks of a shard that are not among the finished ones; a finished shard is not opened at all."""
    finished = {report.index for report in reports}
    if not is_finished(reports, shard.first_chunk):
        yield from read_chunks(shard, config, root, chunk_size, finished, prompts)


@dataclass(eq=False, repr=False)
class ReadChunks(beam.PTransform):
    """PCollection[Shard] -> PCollection[Chunk] to do, PCollection[ChunkReport] of those that are done.

    Attributes:
      prompts: how prompts are read from the images' records; None = they are not.
    """

    config: ReadConfig
    chunk_size: int
    root: str
    output: str
    run_id: str | None = None
    keep_candidates: bool = False
    prompts: RecordPrompts | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, shards: beam.PCollection) -> tuple[beam.PCollection, beam.PCollection]:
        outputs = shards | beam.ParDo(_ReadChunksFn(self)).with_outputs(FINISHED, main="chunks")
        return outputs["chunks"], outputs[FINISHED]


class _ReadChunksFn(beam.DoFn):
    """Lists the committed chunks once a worker, instead of once a shard."""

    def __init__(self, settings: ReadChunks) -> None:
        self._settings = settings

    def setup(self) -> None:
        settings = self._settings
        directories = [IMAGES_DIR, ANNOTATIONS_DIR] + [CANDIDATES_DIR] * settings.keep_candidates
        self._committed: dict[str | tuple[str, int], list[ChunkKey]] = {}
        for key in list_tables(settings.output, directories).committed(settings.keep_candidates):
            # A directory of loose files may have a hundred thousand chunks, and a Shard for each.
            self._committed.setdefault(key.shard, []).append(key)
            self._committed.setdefault((key.shard, key.index), []).append(key)

    def process(self, shard: Shard) -> Iterator[Chunk | beam.pvalue.TaggedOutput]:
        settings = self._settings
        place = (shard.name, shard.first_chunk) if shard.format == "image" else shard.name
        reports = finished_reports(shard, self._committed.get(place, []), settings.output, settings.run_id)
        for report in reports:
            yield beam.pvalue.TaggedOutput(FINISHED, report)
        yield from read_unfinished(
            shard, settings.config, settings.chunk_size, settings.root, reports, settings.prompts
        )
