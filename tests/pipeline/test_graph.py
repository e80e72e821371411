"""The graph: from reading to writing it is one stage, so a chunk is committed before the next is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest

from maskbeam.pipeline.graph import build
from maskbeam.pipeline.launch.identity import describe_run
from maskbeam.pipeline.options import parse_label
from maskbeam.transforms import read_chunks as reading
from maskbeam.transforms import write_parquet as writing
from maskbeam.transforms.load_model import ModelConfig
from maskbeam.transforms.match_shards import match_shards
from maskbeam.transforms.records import Chunk, ChunkReport, LabeledChunk
from tests.conftest import SMALL_GRID, label, photo_bytes
from tests.fakes import FakeSam, load_fake
from tests.transforms.readers.test_shard import images_tar


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two tars of three photos."""
    directory = tmp_path / "data"
    directory.mkdir()
    for name in ("a.tar", "b.tar"):
        (directory / name).write_bytes(images_tar([photo_bytes(number) for number in range(3)]))
    return directory


@pytest.fixture
def graph(shards: Path, output: Path) -> Any:
    """The pipeline as runners get it."""
    job, _ = parse_label([*SMALL_GRID, "--input", str(shards), "--output", str(output)])
    root = beam.Pipeline()
    build(root, job, describe_run(job, match_shards(job.input).root), load_fake)
    return root.to_runner_api()


def test_all_steps_share_one_environment_without_resource_hints(graph: Any) -> None:
    used = {step.environment_id for step in graph.components.transforms.values() if step.environment_id}
    assert len(used) == 1
    assert not graph.components.environments[used.pop()].resource_hints


def test_the_steps_are_those_of_the_design(graph: Any) -> None:
    steps = graph.components.transforms
    (root,) = graph.root_transform_ids
    names = [steps[step].unique_name for step in steps[root].subtransforms]
    assert names == ["ReadManifest", "ReadChunks", "GenerateMasks", "WriteParquet", "Summarize"]
    assert len({step.unique_name for step in steps.values()}) == len(steps)


def test_only_paths_and_totals_are_shuffled(graph: Any) -> None:
    shuffles = [
        step.unique_name
        for step in graph.components.transforms.values()
        if step.spec.urn == beam.portability.common_urns.primitives.GROUP_BY_KEY.urn
    ]
    assert {name.partition("/")[0] for name in shuffles} == {"ReadManifest", "Summarize"}


EVENTS: list[str] = []


class EventSam(FakeSam):
    def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> np.ndarray:
        EVENTS.append("label")
        return super().embed(frame, resized_hw)


def load_events(config: ModelConfig) -> EventSam:
    return EventSam()


def test_a_chunk_is_committed_before_the_next_is_read(
    shards: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_chunks, commit_chunk = reading.read_chunks, writing.commit_chunk

    def read(*arguments: Any) -> Iterator[Chunk]:
        for chunk in read_chunks(*arguments):
            EVENTS.append("read")
            yield chunk

    def commit(chunk: LabeledChunk, *arguments: Any) -> ChunkReport:
        EVENTS.append("commit")
        return commit_chunk(chunk, *arguments)

    EVENTS.clear()
    monkeypatch.setattr(reading, "read_chunks", read)
    monkeypatch.setattr(writing, "commit_chunk", commit)
    assert label("--input", shards, "--output", output, "--chunk_size", "1", load=load_events) == 0
    assert EVENTS == ["read", "label", "commit"] * 6
