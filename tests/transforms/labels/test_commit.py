"""A reader never sees half a chunk, wherever a commit fails and whatever other starts do meanwhile.

On mem://, where each request is a step of its own and a rename is two. The reader's rule is the README's: a chunk is
there if its images file is.
"""

from __future__ import annotations

import contextlib
import errno
import io
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from apache_beam.io.filesystems import FileSystems

from maskbeam.pipeline.exits import UsageError
from maskbeam.pipeline.launch.identity import claim_output
from maskbeam.transforms.files.storage import read_json
from maskbeam.transforms.labels.commit import RunReplaced, commit_chunk
from maskbeam.transforms.labels.layout import ChunkKey, chunk_name, committed_chunks, list_tables
from maskbeam.transforms.labels.resume import finished_reports, read_report
from maskbeam.transforms.labels.run_file import Run, write_run
from maskbeam.transforms.labels.schema import RUN_KEY
from maskbeam.transforms.records import LabeledChunk, Seconds, Totals
from maskbeam.transforms.summarize import write_summary
from tests.conftest import EVENT_SECONDS
from tests.memory_store import STORE
from tests.transforms.test_write_parquet import MASK, SHARD, chunk_of, failed, labeled

OUTPUT = "mem://bucket/labels"
RUN = Run(root="/a", model_fingerprint="f")
CLAIMED = replace(RUN, id="1")

# What a reader sees of a chunk: of each table the rows that differ between the chunks here.
View = tuple[list[str], list[float]]


@pytest.fixture(autouse=True)
def empty_store(monkeypatch: pytest.MonkeyPatch) -> None:
    STORE.reset()
    monkeypatch.setattr("maskbeam.transforms.labels.commit.RETRY_SECONDS", (0, 0))


def view(index: int = 0) -> View | None:
    """The chunk as a reader finds it at this moment."""
    name = chunk_name(SHARD.name, index)
    objects = dict(STORE.objects)
    if f"{OUTPUT}/images/{name}" not in objects:
        return None
    images, annotations = (
        pq.read_table(io.BytesIO(objects[f"{OUTPUT}/{kind}/{name}"])) for kind in ("images", "annotations")
    )
    return images["status"].to_pylist(), annotations["predicted_iou"].to_pylist()


def temporaries() -> list[str]:
    return [path for path in STORE.objects if path.startswith(f"{OUTPUT}/_tmp/")]


OLD, NEW = chunk_of(labeled(0), failed(1)), chunk_of(labeled(0), labeled(1))
OLD_VIEW: View = (["labeled", "failed"], [0.5])
NEW_VIEW: View = (["labeled", "labeled"], [0.5, 0.5])


def start_from(before: LabeledChunk | None, run_id: str = "0") -> View | None:
    """A store of the run CLAIMED; the chunk there is of another run, unless its id is given."""
    STORE.reset()
    if before is not None:
        write_run(OUTPUT, replace(RUN, id=run_id))
        commit_chunk(before, OUTPUT, replace(RUN, id=run_id))
    write_run(OUTPUT, CLAIMED)
    return None if before is None else OLD_VIEW


class Gone(Exception):
    """The store does not answer."""


def fail(when: str, first: int, last: int, seen: list[View | None]) -> Callable[[], int]:
    """Makes requests first..last fail, before or after they are done; looks with a reader's eyes at all of them."""
    count = 0

    def request(kind: str, path: str) -> None:
        nonlocal count
        count += 1
        seen.append(view())
        if when == "before" and first <= count <= last:
            raise Gone(kind)

    def response(kind: str, path: str) -> None:
        seen.append(view())
        if when == "after" and first <= count <= last:
            raise Gone(kind)

    STORE.on_request, STORE.on_response = request, response
    return lambda: count


def heal() -> None:
    STORE.on_request = STORE.on_response = lambda kind, path: None


def num_requests(before: LabeledChunk | None) -> int:
    start_from(before)
    count = fail("never", 0, 0, [])
    commit_chunk(NEW, OUTPUT, CLAIMED)
    heal()
    return count()


# A chunk that a start of an earlier run left there is no obstacle.
@pytest.mark.parametrize("before", [None, OLD], ids=["first", "replacing"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_request_that_fails_once_is_made_up_for(before: LabeledChunk | None, when: str) -> None:
    for number in range(1, num_requests(before) + 1):
        old = start_from(before)
        seen: list[View | None] = []
        fail(when, number, number, seen)
        commit_chunk(NEW, OUTPUT, CLAIMED)
        heal()
        assert view() == NEW_VIEW and not temporaries(), number
        assert all(found in (None, old, NEW_VIEW) for found in seen)


@pytest.mark.parametrize("before", [None, OLD], ids=["first", "replacing"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_store_that_is_gone_for_good_leaves_a_whole_chunk_or_none(before: LabeledChunk | None, when: str) -> None:
    told = 0
    for number in range(1, num_requests(before) + 1):
        old = start_from(before)
        seen: list[View | None] = []
        fail(when, number, 10**9, seen)
        try:
            commit_chunk(NEW, OUTPUT, CLAIMED)
        except OSError as error:
            told += "Gone" in str(error)
        heal()
        assert view() in (None, old, NEW_VIEW)
        assert all(found in (None, old, NEW_VIEW) for found in seen)
        # The next start does the chunk again unless it is there, and leaves nothing behind.
        commit_chunk(NEW, OUTPUT, CLAIMED)
        assert view() == NEW_VIEW
        write_summary(Totals(), OUTPUT, CLAIMED)
        assert not temporaries()
    assert told >= num_requests(before) - 1  # the last deletion may fail without harm, but is told, too


# A second attempt at a chunk that is committed for this run already.


class Killed(BaseException):
    """kill -9: nothing cleans up."""


def second_attempts(chunk: LabeledChunk) -> Iterator[bool]:
    """Attempts at a chunk that is there, each killed a request later; True for the one that came to its end."""
    for number in range(1, 100):
        start_from(OLD, "1")
        seen: list[View | None] = []
        left = number

        def request(kind: str, path: str) -> None:
            nonlocal left
            seen.append(view())  # noqa: B023
            left -= 1
            if left <= 0:  # and so does every request of its cleaning up
                raise Killed

        STORE.on_request = request
        ended = False
        with contextlib.suppress(Killed):
            report = commit_chunk(chunk, OUTPUT, CLAIMED)
            assert report.totals.failed == 1, "the report is that of the committed chunk"
            ended = True
        heal()
        assert all(found == OLD_VIEW for found in seen), (number, seen)
        yield ended
        if ended:
            assert number > 5
            return


def test_a_second_attempt_killed_at_any_request_never_touches_the_committed_chunk() -> None:
    files = {}
    for ended in second_attempts(NEW):
        files = {path: data for path, data in STORE.objects.items() if "/_tmp/" not in path}
        assert view() == OLD_VIEW
        assert not ended or not temporaries()
    start_from(OLD, "1")
    assert files.keys() == STORE.objects.keys()


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_on_a_disk_too_a_second_attempt_killed_at_any_call_never_touches_the_committed_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    output = str(tmp_path)
    write_run(str(output), CLAIMED)
    commit_chunk(OLD, output, CLAIMED)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    calls = left = 0

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def killed_at_some_call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls, left
            calls, left = calls + 1, left - 1
            assert {path: path.read_bytes() for path in before} == before
            if left == 0:
                left = 1
                raise Killed
            return call(*args, **kwargs)

        return killed_at_some_call

    for name in ("create", "open", "exists", "rename", "delete", "mkdirs"):
        monkeypatch.setattr(FileSystems, name, watched(getattr(FileSystems, name)))
    for name in ("remove", "unlink", "rename", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    monkeypatch.setattr(os, "link", watched(os.link) if links else refuse_link)
    ended = False
    for number in range(1, 100):
        left = number
        with contextlib.suppress(Killed):
            commit_chunk(NEW, output, CLAIMED)
            ended = True
        assert {path: path.read_bytes() for path in before} == before
        if ended:
            break
    assert ended and calls > 10


def refuse_link(source: str, destination: str) -> None:
    raise OSError(errno.EPERM, "no hard links here")


def test_a_first_attempt_publishes_on_a_disk_without_hard_links_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse_link)
    commit_chunk(NEW, str(tmp_path), RUN)
    assert committed_chunks(str(tmp_path)) == {SHARD.name: [0]}
    assert not list((tmp_path / "_tmp").iterdir())


def test_an_attempt_overtaken_right_before_it_publishes_throws_its_files_away(tmp_path: Path) -> None:
    """Both find nothing committed; the other one is done first."""
    output = str(tmp_path)
    link, overtaken = os.link, False

    def overtake(source: str, destination: str) -> None:
        nonlocal overtaken
        if not overtaken:
            overtaken = True
            commit_chunk(OLD, output, RUN)
        link(source, destination)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", overtake)
        report = commit_chunk(NEW, output, RUN)
    assert overtaken and report.totals.failed == 1
    rows = pq.read_table(tmp_path / "images").to_pylist()
    assert [row["status"] for row in rows] == ["labeled", "failed"]
    assert not list((tmp_path / "_tmp").iterdir())


@pytest.mark.parametrize("keep_candidates", [False, True])
def test_attempts_at_a_chunk_differ_in_nothing_but_the_images_file(tmp_path: Path, keep_candidates: bool) -> None:
    for name, seconds in (("a", Seconds(decode=1.0)), ("b", Seconds(decode=2.5))):
        image = replace(labeled(0), seconds=seconds)
        commit_chunk(replace(chunk_of(image), keep_candidates=keep_candidates), str(tmp_path / name), RUN)
    for path in (tmp_path / "a").rglob("*.parquet"):
        same = path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
        assert same == (path.parent.name != "images"), path


@pytest.mark.processes
def test_two_processes_race_on_one_chunk_and_one_is_killed_at_random(tmp_path: Path) -> None:
    """Fifty rounds. Whoever is killed when, the chunk that is there after one of them ended is whole and stays."""
    coin = random.Random(0)
    # Forked from a process that has imported everything and has no threads: Arrow's would be missing in a child.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.transforms.labels.test_commit"])
    alone = tmp_path / "alone"
    commit_chunk(NEW, str(alone), RUN)
    rows = {kind: pq.read_table(alone / kind).to_pylist() for kind in ("annotations", "candidates", "images")[::2]}
    killed = 0
    for number in range(50):
        output = tmp_path / str(number)
        write_run(str(output), CLAIMED)
        barrier = processes.Barrier(2)
        racers = [
            processes.Process(target=race, args=(barrier, str(output), coin.randrange(130) if role else None))
            for role in range(2)
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(120)
        assert racers[0].exitcode == 0, number
        killed += racers[1].exitcode == -signal.SIGKILL
        for kind, expected in rows.items():
            assert pq.read_table(output / kind).to_pylist() == expected, (number, kind)
        assert committed_chunks(str(output)) == {SHARD.name: [0]}
        report = read_report(str(output), SHARD.name, 0)
        assert report is not None
        summary = write_summary(report.totals, str(output), CLAIMED)
        assert (summary.images, summary.masks) == (2, 2) and not (output / "_tmp").exists()
    assert killed > 10


def race(barrier: Any, output: str, lines: int | None) -> None:
    """Commits a chunk; is killed after so many steps of Python's own in write.py, if it gets that far."""
    barrier.wait()
    if lines is not None:
        left = lines

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename != commit_chunk.__code__.co_filename:
                return None
            left -= event == "line"
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
    commit_chunk(NEW, output, CLAIMED)


def test_a_commit_that_lost_its_temporary_files_to_another_starts_cleaning_is_done_again() -> None:
    start_from(None)
    cleaned: list[str] = []

    def clean(kind: str, path: str) -> None:
        if kind == "copy" and not cleaned:
            cleaned.append(path)
            heal()
            write_summary(Totals(), OUTPUT, CLAIMED)

    STORE.on_request = clean
    commit_chunk(NEW, OUTPUT, CLAIMED)
    assert cleaned and view() == NEW_VIEW and not temporaries()


def test_nothing_is_committed_into_a_directory_of_another_run() -> None:
    start_from(OLD)
    write_run(OUTPUT, replace(RUN, id="2"))
    with pytest.raises(RunReplaced, match=r"labels belongs to another run since.*Choose another --output"):
        commit_chunk(NEW, OUTPUT, CLAIMED)
    with pytest.raises(RunReplaced):
        write_summary(Totals(), OUTPUT, CLAIMED)
    assert view() == OLD_VIEW and not temporaries()


def test_nothing_is_committed_into_a_directory_that_was_deleted() -> None:
    with pytest.raises(RunReplaced, match=r"labels/run\.json is gone"):
        commit_chunk(NEW, OUTPUT, CLAIMED)
    assert not STORE.objects


def test_a_chunk_of_another_run_is_not_taken_for_finished() -> None:
    start_from(OLD)
    shard = replace(SHARD, digest=NEW.digest)
    commit_chunk(NEW, OUTPUT, CLAIMED)
    keys = [ChunkKey(SHARD.name, 0)]
    assert [report.index for report in finished_reports(shard, keys, OUTPUT, "1")] == [0]
    assert finished_reports(shard, keys, OUTPUT, "2") == []
    assert finished_reports(replace(shard, digest="d2"), keys, OUTPUT, "1") == []


# Two starts at once. Each takes a step when the schedule says so; a step is a request.


class Schedule:
    """Lets one of two threads go on to its next request at a time, by a seeded coin."""

    def __init__(self, seed: int) -> None:
        self._coin = random.Random(seed)
        self._condition = threading.Condition()
        self._turn: str | None = None
        self._running: dict[str, bool] = {}
        self.committing: set[str] = set()
        self.publishing: set[str] = set()

    def step(self, kind: str = "", path: str = "") -> None:
        name = threading.current_thread().name
        if name not in self._running:
            return
        with self._condition:
            self._turn = None
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._turn == name)

    def run(self, **starts: Callable[[], str]) -> dict[str, str]:
        """Runs the starts to their ends; returns what each of them returned."""
        results: dict[str, str] = {}

        def work(name: str, start: Callable[[], str]) -> None:
            try:
                self.step()
                results[name] = start()
            finally:
                with self._condition:
                    del self._running[name]
                    self._turn = None
                    self._condition.notify_all()

        self._running = dict.fromkeys(starts, True)
        threads = [threading.Thread(target=work, args=item, name=item[0]) for item in starts.items()]
        for thread in threads:
            thread.start()
        while True:
            with self._condition:
                assert self._condition.wait_for(lambda: self._turn is None, timeout=EVENT_SECONDS)
                if not self._running:
                    break
                self._turn = self._coin.choice(sorted(self._running))
                self._condition.notify_all()
                assert self._condition.wait_for(lambda: self._turn is None, timeout=EVENT_SECONDS)
        for thread in threads:
            thread.join()
        return results


NUM_CHUNKS = 2


def do_start(schedule: Schedule, name: str, iou: float, overwrite: bool = False) -> str:
    """What a start does to the output, without a pipeline: claim, look for what is done, commit the rest, sum up."""
    mask = replace(MASK, predicted_iou=iou)
    (other,) = {"x", "y"} - {name}
    try:
        run = claim_output(OUTPUT, replace(RUN, amg={"pred_iou_thresh": iou}), overwrite)
        shard = replace(SHARD, digest="d1")
        done = finished_reports(shard, list_tables(OUTPUT).committed(), OUTPUT, run.id)
        for index in sorted(set(range(NUM_CHUNKS)) - {report.index for report in done}):
            while other in schedule.publishing:  # labeling a chunk takes longer than the few requests of a commit
                schedule.step()
            image = replace(labeled(index), masks=(mask,))
            schedule.committing.add(name)
            commit_chunk(chunk_of(image, index=index), OUTPUT, run)
            schedule.committing.discard(name)
            schedule.publishing.discard(name)
        write_summary(Totals(images=NUM_CHUNKS), OUTPUT, run)
    except UsageError:
        return "refused"
    except RunReplaced:
        return "replaced"
    finally:
        schedule.publishing.discard(name)
    return "done"


def run_two(seed: int, x: float, y: float, overwrite: bool) -> dict[str, str]:
    schedule = Schedule(seed)

    def step(kind: str, path: str) -> None:
        schedule.step()
        name = threading.current_thread().name
        if path.endswith("run.json") and name in schedule.committing:
            schedule.publishing.add(name)  # from the check of the run to the last rename

    STORE.on_request = step
    results = schedule.run(
        x=lambda: do_start(schedule, "x", x),
        y=lambda: do_start(schedule, "y", y, overwrite),
    )
    heal()
    return results


def check_rows(ious: tuple[float, ...]) -> None:
    """All chunks are there, whole, and of one run: the one of run.json."""
    run = read_json(f"{OUTPUT}/run.json")
    assert run["amg"]["pred_iou_thresh"] in ious and "clearing" not in run
    for index in range(NUM_CHUNKS):
        assert view(index) == (["labeled"], [run["amg"]["pred_iou_thresh"]])
        footer = pq.read_schema(io.BytesIO(STORE.get(f"{OUTPUT}/images/{chunk_name(SHARD.name, index)}")))
        assert f'"id": "{run["id"]}"'.encode() in footer.metadata[RUN_KEY]
    assert not temporaries()


@pytest.mark.processes
@pytest.mark.parametrize("seed", range(60))
def test_two_starts_of_one_run_end_in_the_same_rows(seed: int) -> None:
    assert claim_output(OUTPUT, replace(RUN, amg={"pred_iou_thresh": 0.5}), False).id
    assert run_two(seed, 0.5, 0.5, overwrite=False) == {"x": "done", "y": "done"}
    check_rows((0.5,))


@pytest.mark.processes
@pytest.mark.parametrize("seed", range(60))
def test_of_two_first_starts_one_ends_well_and_the_other_too_or_is_told(seed: int) -> None:
    results = run_two(seed, 0.5, 0.5, overwrite=False)
    assert "done" in results.values(), results
    check_rows((0.5,))


@pytest.mark.processes
@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("overwrite", [False, True])
def test_starts_of_different_runs_never_mix_their_rows(seed: int, overwrite: bool) -> None:
    results = run_two(seed, 0.5, 0.25, overwrite)
    assert "done" in results.values(), results
    check_rows((0.5, 0.25))


@pytest.mark.processes
@pytest.mark.parametrize("seed", range(60))
def test_a_start_that_overwrites_what_another_goes_on_with_never_mixes_their_rows(seed: int) -> None:
    do_start(Schedule(0), "x", 0.5)
    results = run_two(seed, 0.5, 0.25, overwrite=True)
    assert "done" in results.values(), results
    check_rows((0.5, 0.25))


def test_a_start_that_was_killed_while_deleting_labels_leaves_a_directory_that_the_next_one_clears() -> None:
    do_start(Schedule(0), "x", 0.5)
    for number in range(1, 40):
        before = dict(STORE.objects)

        def dies(kind: str, path: str, left: list[int] = [number]) -> None:  # noqa: B006
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        STORE.on_request = dies
        try:
            claim_output(OUTPUT, replace(RUN, amg={"pred_iou_thresh": 0.25}), True)
            break
        except KeyboardInterrupt:
            pass
        heal()
        if read_json(f"{OUTPUT}/run.json")["amg"] == {"pred_iou_thresh": 0.25}:
            assert do_start(Schedule(0), "x", 0.25) == "done"
            check_rows((0.25,))
        else:
            assert do_start(Schedule(0), "x", 0.5) == "done"
            check_rows((0.5,))
        STORE.objects = before
    heal()
    assert number > 8
