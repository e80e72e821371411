"""Runs the label job: checks, progress, summary, and a clean end whatever happens.

The pipeline runs in a thread of its own; the main thread shows the progress and notices dead workers, for which the
local runner would wait for ever.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import apache_beam as beam
from apache_beam.io.filesystem import BeamIOError
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import python_urns
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from maskbeam.pipeline.exits import EXIT_DONE, EXIT_FAILED, UsageError
from maskbeam.pipeline.graph import Job, build
from maskbeam.pipeline.interruption import when_interrupted
from maskbeam.pipeline.launch.dataflow import makes_template
from maskbeam.pipeline.launch.identity import default_backend, refuse_input_in_output
from maskbeam.pipeline.launch.prompts import claim, report_prompts
from maskbeam.pipeline.launch.remote import JobFailed, prepare, run_elsewhere
from maskbeam.pipeline.launch.settle import Settled, finish, settle
from maskbeam.pipeline.launch.starts import announce_start, withdraw_start
from maskbeam.pipeline.options import runs_locally
from maskbeam.pipeline.progress import Progress
from maskbeam.pipeline.results import describe_model, escape_controls, format_some
from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.files.outage import StoreUnavailable
from maskbeam.transforms.labels.commit import RunReplaced
from maskbeam.transforms.labels.resume import InputChanged
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.load_model import LoadSam, load_model, use_backend
from maskbeam.transforms.match_shards import Matched, check_output, match_shards
from maskbeam.transforms.model_health import ModelBroken
from maskbeam.transforms.presets.embedded import PresetError, check_model_name
from maskbeam.transforms.prompt_files.finder import NoPromptsFound
from maskbeam.transforms.prompt_files.store import StoreMeta
from maskbeam.transforms.records import Totals
from maskbeam.transforms.summarize import read_totals
from maskbeam.transforms.write_parquet import TooManyFailures

_POLL_SECONDS = 0.2

# In the temporary directory of a run: a file of each worker process, by its id.
PROGRESS_DIR = "progress"

# These say all there is to say; for others the stack trace is shown, too.
_EXPECTED_ERRORS = (
    InputChanged,
    JobFailed,
    ModelBroken,
    NoPromptsFound,
    PresetError,
    RunReplaced,
    StoreUnavailable,
    TooManyFailures,
    OSError,
)

# Beam's text of a BeamIOError: "Rename operation failed with exceptions {(from, to): error}".
_BEAM_DETAILS = re.compile(r" with exceptions \{(?:\('.*', |)'(.*?)'\)?: (.*)\}$")


def run_label(job: Job, options: PipelineOptions, load: LoadSam = load_model, notice: str = "") -> int:
    """Labels the input and prints a summary.

    Args:
      load: makes the model; tests give a fake.
      notice: printed once the job is known to be possible.

    Returns:
      the exit code.

    Raises:
      UsageError: before anything is read, if the job cannot be done as asked.
    """
    local = runs_locally(options)
    try:
        if not local or job.dataflow.gpu is not None:
            job = prepare(job, options)
        check_model_name(job.model.model)  # at once: looking at the input may take a while
        matched = match_shards(job.input, job.read)
        check_output(job.input, job.output.output)
        use_backend(default_backend())
    except (ValueError, RuntimeError, OSError) as error:
        raise UsageError(describe_error(error) if isinstance(error, BeamIOError) else str(error)) from error
    refuse_input_in_output(matched.shards, job.output.output)
    run, prompts = claim(job, matched.root)
    try:
        settled = settle(job, matched, run)
        note, others = announce_start(job.output.output)
    except (InputChanged, RunReplaced, OSError) as error:
        print(f"maskbeam: {describe_error(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return EXIT_FAILED
    for other in others:
        print(
            f"maskbeam: another start may be at work in {job.output.output} ({other}). Both end in the same rows, but "
            "do the work twice.",
            file=sys.stderr,
        )
    if notice:
        print(notice, file=sys.stderr)
    stays = f"What is committed in {job.output.output} stays; run the same command to go on."
    with when_interrupted(lambda: withdraw_start(note), stays):
        try:
            return _label(job, options, settled, matched, load, prompts)
        finally:
            withdraw_start(note)


def _label(
    job: Job, options: PipelineOptions, settled: Settled, matched: Matched, load: LoadSam, prompts: StoreMeta | None
) -> int:
    """Runs the pipeline and tells how it ended; returns the exit code."""
    if runs_locally(options):
        outcome = _run_here(job, options, settled.run, matched, settled.done, load)
    else:
        outcome = _run_remotely(job, options, settled.run, load)
    if outcome.error is not None:
        expected, message = _expected(outcome.error)
        if not expected:
            traceback.print_exception(outcome.error)
        print(f"maskbeam: {message}", file=sys.stderr)
        print(f"What is committed in {job.output.output} stays; run the same command to go on.", file=sys.stderr)
        return EXIT_FAILED
    if makes_template(options):
        return EXIT_DONE
    totals = read_totals(job.output.output)
    print(summary(totals, outcome, matched.ignored, job.output.output, describe_model(settled.run)))
    for note in settled.notes:
        print(escape_controls(note))
    mismatch = report_prompts(job, settled.run, totals, prompts) if job.prompts.prompts is not None else None
    try:
        gap = finish(job, settled, totals)
    except RunReplaced as error:  # it tidies up, too
        gap = str(error)
    if gap is not None:
        print(f"maskbeam: {gap}", file=sys.stderr)
        return EXIT_FAILED
    if mismatch is not None:
        print(f"maskbeam: {mismatch}", file=sys.stderr)
        return EXIT_FAILED
    if totals.failed == totals.images:
        print(f"maskbeam: {describe_no_result(totals)}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


@dataclass(frozen=True)
class _Outcome:
    """How the pipeline ended.

    Attributes:
      images: done by this start; None where not known.
      seconds: of wall time.
      pace: (images, seconds) without the start-up; None where not known.
      start_up: seconds, by what they were spent on.
    """

    error: BaseException | None
    images: int | None = None
    seconds: float = 0.0
    pace: tuple[int, float] | None = None
    start_up: dict[str, float] = field(default_factory=dict)


def _run_remotely(job: Job, options: PipelineOptions, run: Run, load: LoadSam) -> _Outcome:
    start = time.monotonic()
    try:
        images = run_elsewhere(job, options, run, load)
    except UsageError:
        raise
    except Exception as error:
        return _Outcome(error)
    return _Outcome(None, images, time.monotonic() - start)


class _LocalRunner(FnApiRunner):
    """Runs worker processes so that they leave signals to this one, can be stopped, and know the flags of file systems.

    Beam itself starts them without any.
    """

    def __init__(self, progress_dir: Path) -> None:
        super().__init__()
        self._progress_dir = progress_dir

    def run_via_runner_api(self, pipeline_proto: Any, options: PipelineOptions) -> Any:
        # Those of the file systems are texts and switches. A switch that is off has no flag for it.
        given = options.get_all_options(drop_default=True).items()
        self._provision_info.provision_info.pipeline_options.update(
            {name: value for name, value in given if isinstance(value, str) or value is True}
        )
        for environment in pipeline_proto.components.environments.values():
            if environment.urn == python_urns.SUBPROCESS_SDK:
                # The payload is a shell's command line. The process is known before it does anything, so that it can be
                # stopped; once everything is, no new one begins, without a word. Without exec the shell would stay, and
                # tell who was killed.
                known = (
                    f"(: > {shlex.quote(str(self._progress_dir))}/$$) 2> /dev/null || exit 1; trap '' INT TERM; exec "
                )
                environment.payload = known.encode() + environment.payload
        return super().run_via_runner_api(pipeline_proto, options)


def _run_here(job: Job, options: PipelineOptions, run: Run, matched: Matched, done: Totals, load: LoadSam) -> _Outcome:
    """Runs the pipeline in a thread and looks after it from this one."""
    directory = Path(tempfile.gettempdir(), f"maskbeam-{uuid.uuid4().hex}")
    progress_dir = directory / PROGRESS_DIR
    ended = threading.Event()
    errors: list[BaseException] = []
    dead_workers: list[BaseException] = []

    def work() -> None:
        try:
            pipeline = beam.Pipeline(_LocalRunner(progress_dir), options=options)
            build(pipeline, job, run, load, str(progress_dir))
            pipeline.run().wait_until_finish()
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    def thread_failed(failure: threading.ExceptHookArgs) -> None:
        # Beam's threads end without an exception unless a worker process died.
        dead_workers.append(failure.exc_value or RuntimeError(str(failure.exc_type)))

    start = time.monotonic()
    previous_hook, threading.excepthook = threading.excepthook, thread_failed
    previous_tempdir = tempfile.tempdir
    with when_interrupted(lambda: _stop_workers(directory)):
        try:
            directory.mkdir(mode=0o700)
            progress_dir.mkdir()
            tempfile.tempdir = str(directory)  # so that Beam's own directory does not stay, however this ends
            progress = _make_progress(job, matched, done, progress_dir)
            threading.Thread(target=work, name="pipeline", daemon=True).start()
            while not ended.wait(_POLL_SECONDS):
                progress.update()
                if dead_workers:
                    progress.close()
                    _give_up(directory, dead_workers[0])
            progress.close()
            pace = progress.pace
            shutil.rmtree(directory, ignore_errors=True)
        except BaseException:
            _stop_workers(directory)
            raise
        finally:
            tempfile.tempdir = previous_tempdir
            threading.excepthook = previous_hook
    error = errors[0] if errors else None
    return _Outcome(error, progress.images, time.monotonic() - start, pace, progress.start_up)


def _give_up(directory: Path, error: BaseException) -> NoReturn:
    """Ends this process and its workers at once: the runner's own threads cannot be asked to stop."""
    print(
        f"maskbeam: a worker process died ({_last_line(error)}). If memory ran out, lower --direct_num_workers, "
        "--points_per_batch or --max_pixels. What is committed stays; run the same command to go on.",
        file=sys.stderr,
        flush=True,
    )
    _stop_workers(directory)
    sys.stdout.flush()
    os._exit(EXIT_FAILED)


def _stop_workers(directory: Path) -> None:
    """Kills the worker processes, those that begin just now, too, and deletes the run's temporary directory."""
    stopped = directory.with_suffix(".stopped")
    with contextlib.suppress(FileNotFoundError):  # the run had ended, or had not begun
        directory.rename(stopped)  # who looks for it from now on, ends
        for name in os.listdir(stopped / PROGRESS_DIR):
            _kill_child(int(name))
    shutil.rmtree(stopped, ignore_errors=True)


def _kill_child(process: int) -> None:
    """Kills a process if it is a child of this one and lives; its number may be another's by now."""
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        if os.waitpid(process, os.WNOHANG) == (0, 0):
            os.kill(process, signal.SIGKILL)


def _make_progress(job: Job, matched: Matched, done: Totals, progress_dir: Path) -> Progress:
    """The bar, starting from what earlier starts committed."""
    countable = all(shard.format == "image" for shard in matched.shards)
    total_images = sum(len(shard.files) for shard in matched.shards) if countable else None
    if not countable and job.input.limit is not None:
        total_images = job.input.limit
    total_bytes = sum(shard.num_bytes for shard in matched.shards)
    return Progress(progress_dir, total_images, total_bytes, done.images, done.encoded_bytes, job.progress)


def _expected(error: BaseException) -> tuple[bool, str]:
    """Whether the message says all there is to say, and the message."""
    if isinstance(error, BeamIOError):
        return True, describe_error(error).partition(" [while running ")[0]
    message = _last_line(error)
    if isinstance(error, _EXPECTED_ERRORS):
        return True, message
    # What fails in a worker process comes as text, a stack trace with the error in its last line.
    name, _, rest = message.partition(": ")
    kind = name.rpartition(".")[2]
    if type(error) is RuntimeError and kind == BeamIOError.__name__:
        return True, _BEAM_DETAILS.sub(r"\1: \2", rest)
    if type(error) is RuntimeError and kind in {kind.__name__ for kind in _EXPECTED_ERRORS}:
        return True, rest
    return False, message


def _last_line(error: BaseException) -> str:
    """The line that says what happened, without the stack trace and the step's name that runners add."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" [while running ")[0] if lines else type(error).__name__


def describe_no_result(totals: Totals) -> str:
    """The sentence about a run none of whose images was labeled."""
    if not totals.images:
        return "nothing was labeled: the input has no images. Check --input."
    return (
        f"nothing was labeled: all {totals.images} images failed for the reasons above. Their rows stay. Mend the input"
        " and run the same command with --retry_failed."
    )


def summary(totals: Totals, outcome: _Outcome, ignored: tuple[str, ...], output: str, model: str) -> str:
    """What the command prints at the end."""
    lines = [
        f"{totals.images} images: {totals.labeled} labeled, {totals.empty} empty, {totals.failed} failed",
        *[f"  failed {escape_controls(failure)}" for failure in totals.failures[:5]],
    ]
    if totals.failed > 5:
        lines.append(f"  ... and {totals.failed - 5} more: rows with status failed in {output}/images")
    if annotations := totals.annotations.images:
        lines.append(
            f"{annotations} images in tar files annotate a photo and were not labeled: "
            f"{format_some(totals.annotations.names)}"
        )
    if ignored:
        lines.append(f"{len(ignored)} files ignored, not images by their names: {format_some(ignored)}")
    dropped = ", ".join(f"{name} {count}" for name, count in vars(totals.dropped).items() if count)
    lines.append(
        f"{totals.masks} masks of {totals.candidates} candidates" + (f" (dropped: {dropped})" if dropped else "")
    )
    if outcome.images:
        lines.append(_describe_pace(outcome))
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in vars(totals.seconds).items())
    lines.append(f"seconds in {seconds}")
    directory = output.rstrip("/")
    lines.append(f"model: {model}")
    lines.append(f"labels: {directory}/annotations/*.parquet, {directory}/images/*.parquet")
    return "\n".join(lines)


def _describe_pace(outcome: _Outcome) -> str:
    """The rate without the start-up, and the start-up by itself.

    >>> _describe_pace(_Outcome(None, 20, 30.0, (19, 19.5), {"starting": 1.5, "loading model": 9.0}))
    '0.97 images/s (19 in 19.5 s), after 10.5 s of start-up (starting 1.5, loading model 9.0)'
    """
    if outcome.pace is None:
        return f"{outcome.images} images in {outcome.seconds:.1f} s, the runner's start-up included"
    images, seconds = outcome.pace
    if images and seconds:
        rate = f"{images / seconds:.2f} images/s ({images} in {seconds:.1f} s)"
    else:
        rate = f"{outcome.images} image{'s' * (outcome.images != 1)} in {outcome.seconds:.1f} s, too few for a rate"
    parts = ", ".join(f"{state} {spent:.1f}" for state, spent in outcome.start_up.items())
    return f"{rate}, after {sum(outcome.start_up.values()):.1f} s of start-up ({parts})"
