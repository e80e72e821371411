"""Ctrl-C and SIGTERM, sent to real processes: one line, 130 or 143, no process and no temporary file left.

The moments are a sample; what is asserted holds at any. A process is watched from when it handles signals: before that,
Python itself is starting.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from maskbeam.pipeline import cli
from maskbeam.pipeline.interruption import describe_interruption, when_interrupted
from tests.conftest import EVENT_SECONDS, label, wait_until, write_photos

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc"),
]

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = ("--direct_num_workers", "2", "--direct_running_mode", "multi_processing")
SIGNALS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


class Command:
    """A process with a session and a directory for temporary files of its own."""

    def __init__(self, directory: Path, *arguments: str | Path) -> None:
        self.temporary = directory / "temporary"
        self.temporary.mkdir(parents=True)
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=directory,
            env={**os.environ, "TMPDIR": str(self.temporary), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell that runs the tests in the background has its children ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Waits until something happened, while the process runs."""
        wait_until(happened, self.process)

    def handles_signals(self) -> bool:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1)

    def workers(self) -> list[Path]:
        """What each worker process leaves when it begins."""
        return list(self.temporary.glob("maskbeam-*/progress/*"))

    def send(self, number: signal.Signals, may_be_done: bool = False) -> str:
        """Sends a signal as a terminal does, to all processes; checks the end and returns the last line."""
        os.killpg(self.process.pid, number)
        _, said = self.process.communicate(timeout=EVENT_SECONDS)
        code, word = SIGNALS[number]
        if may_be_done and self.process.returncode == 0:
            return ""
        assert self.process.returncode == code, said
        assert not re.search("Traceback|KeyboardInterrupt|Exception|Killed", said), said
        of_the_end = [line for line in said.splitlines() if not line.startswith("maskbeam: without --model")]
        assert sum("maskbeam: " in line for line in of_the_end) == 1, said
        assert of_the_end[-1].startswith(f"maskbeam: {word}"), said
        wait_until(lambda: not living_processes(self.process.pid))  # what was killed takes a moment to be gone
        assert list(self.temporary.iterdir()) == []
        return said.splitlines()[-1]


def living_processes(session: int) -> list[str]:
    """The command lines of a session's processes, but for those that are dead and not yet taken note of."""
    living = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of, *_ = (directory / "stat").read_text().rpartition(")")[2].split()
            if int(of) == session and state != "Z":
                living.append((directory / "cmdline").read_text())
        except OSError:  # it ends just now
            continue
    return living


@pytest.fixture
def slow_label(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts `maskbeam label` with a model that waits after the first chunk; what a failed test leaves is killed."""
    commands: list[Command] = []

    def begin(*flags: str) -> Command:
        program = "import sys; from tests.pipeline.commands import test_label; sys.exit(test_label.waiting_main())"
        photos = write_photos(tmp_path / "photos", 12)
        arguments = ("label", "--input", photos, "--output", tmp_path / "labels", "--chunk_size", "2")
        command = Command(tmp_path / str(len(commands)), "-c", program, *arguments, "--points_per_side", "2", *flags)
        commands.append(command)
        command.wait_for(command.handles_signals)
        return command

    yield begin
    for command in commands:
        if command.process.poll() is None:
            os.killpg(command.process.pid, signal.SIGKILL)


STAYS = "What is committed in {output} stays; run the same command to go on."


@pytest.mark.parametrize("number", SIGNALS, ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("begun", [1, 2])
def test_worker_processes_end_however_far_their_start_is(
    begun: int, number: signal.Signals, slow_label: Callable[..., Command], tmp_path: Path
) -> None:
    command = slow_label(*TWO_PROCESSES)
    command.wait_for(lambda: len(command.workers()) >= begun)
    assert command.send(number).endswith(STAYS.format(output=tmp_path / "labels"))
    # The note of the start goes, too.
    assert not list((tmp_path / "labels" / "_tmp").glob("*.start.json"))


@pytest.mark.parametrize("flags", [(), TWO_PROCESSES], ids=["one worker", "two processes"])
def test_labeling_ends_at_any_moment(
    flags: tuple[str, ...], slow_label: Callable[..., Command], tmp_path: Path
) -> None:
    for delay in (0.0, 1.5, 4.0):
        command = slow_label(*flags)
        time.sleep(delay)
        command.send(signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS, ids=["Ctrl-C", "SIGTERM"])
def test_the_command_ends_at_any_moment_of_its_start(number: signal.Signals, tmp_path: Path) -> None:
    """The real one, with its imports and the embedded model."""
    photos = write_photos(tmp_path / "photos", 2)
    for index, delay in enumerate((0.0, 0.05, 0.3, 0.8, 1.5, 3.0)):
        output = tmp_path / str(index) / "labels"
        command = Command(
            tmp_path / str(index), "-m", "pipeline", "label", "--input", photos, "--output", output, "--model=sam_tiny"
        )
        command.wait_for(command.handles_signals)
        time.sleep(delay)
        if command.process.poll() is None:
            command.send(number)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of six photos, with candidates, and the same as COCO."""
    directory = tmp_path_factory.mktemp("interrupted")
    photos = write_photos(directory / "photos", 6)
    assert label("--input", photos, "--output", directory / "labels", "--keep_candidates") == 0
    flags = ("--labels", directory / "labels", "--output", directory / "coco.json", "--format", "coco")
    assert cli.main(["export", *map(str, flags)]) == 0
    return directory


COMMANDS = {
    "view": ("--labels", "labels", "--images", "photos", "--output", "{out}/view"),
    "evaluate": ("--labels", "labels", "--truth", "coco.json", "--json", "{out}/result.json"),
    "refine": ("--labels", "labels", "--output", "{out}/refined", "--max_masks", "1"),
    "export": ("--labels", "labels", "--output", "{out}/yolo", "--format", "yolo"),
    "import": ("--annotations", "coco.json", "--output", "{out}/imported"),
    "plan": ("--input", "photos", "--json", "{out}/plan.json"),
    "certify": ("--input", "photos", "--images", "2", "--json", "{out}/certificate.json"),
    "demo": ("--output", "{out}/demo"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_other_commands_end_in_a_line_and_leave_nothing_half_done(name: str, labels: Path, tmp_path: Path) -> None:
    for index, delay in enumerate((0.1, 0.9, 2.0)):
        directory = tmp_path / str(index)
        flags = [flag.format(out=directory) for flag in COMMANDS[name]]
        flags = [str(labels / flag) if flag in ("labels", "photos", "coco.json") else flag for flag in flags]
        command = Command(directory, "-m", "pipeline", name, *flags)
        command.wait_for(command.handles_signals)
        time.sleep(delay)
        if command.process.poll() is not None:  # it was done
            _, said = command.process.communicate()
            assert command.process.returncode == 0, said
            break
        command.send(signal.SIGINT, may_be_done=True)
        named_by_id = (path for path in directory.rglob("*") if re.search(r"[0-9a-f]{32}", path.name))
        half = [path for path in named_by_id if not path.name.startswith("manifest-")]  # demo's labels go on from it
        assert half == []


# The mechanism, where it is hardest.

PROGRAM = """
import hashlib, threading, time
from pathlib import Path
from pipeline import cli
from maskbeam.pipeline.interruption import handle_signals, interruptible, when_interrupted

handle_signals()
left = Path("left")
left.touch()
with interruptible(), when_interrupted(left.unlink, "Look."):
    {work}
"""

WORK = {
    "the interrupt is swallowed": """
    while True:
        try:
            print(flush=True)
            time.sleep(60)
        except BaseException:
            pass
""",
    "native code has the main thread": """
    print(flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
""",
    "another thread does not end": """
    threading.Thread(target=time.sleep, args=(60,)).start()
    print(flush=True)
    time.sleep(60)
""",
    "it becomes another exception": """
    print(flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise ImportError("initialization failed")
""",
    "cleaning up does not end": """
    print(flush=True)
    try:
        time.sleep(60)
    finally:
        time.sleep(60)
""",
}


@pytest.mark.parametrize("number", SIGNALS, ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("work", WORK)
def test_the_process_ends_even_if(work: str, number: signal.Signals, tmp_path: Path) -> None:
    program = PROGRAM.format(work=WORK[work].strip("\n").removeprefix("    "))
    command = Command(tmp_path, "-c", program)
    assert command.process.stdout is not None
    command.process.stdout.readline()
    assert command.send(number) == f"maskbeam: {SIGNALS[number][1]}. Look."
    assert not (tmp_path / "left").exists()


def test_a_second_ctrl_c_does_not_wait_for_the_main_thread(tmp_path: Path) -> None:
    command = Command(tmp_path, "-c", PROGRAM.format(work=WORK["cleaning up does not end"].strip("\n")[4:]))
    assert command.process.stdout is not None and command.process.stderr is not None
    command.process.stdout.readline()
    os.kill(command.process.pid, signal.SIGINT)
    assert command.process.stderr.readline() == "maskbeam: interrupted. Look.\n"
    os.kill(command.process.pid, signal.SIGINT)
    assert command.process.wait(timeout=EVENT_SECONDS) == 130
    assert not (tmp_path / "left").exists()


def test_a_signal_after_the_work_changes_nothing(tmp_path: Path) -> None:
    # What a module holds is deleted after Python has put back what a signal does by default.
    program = """
import os, signal
from maskbeam.pipeline.interruption import handle_signals

class Last:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGINT):
        kill(process, number)

handle_signals()
last = Last()
"""
    command = Command(tmp_path, "-c", program)
    _, said = command.process.communicate(timeout=EVENT_SECONDS)
    assert (command.process.returncode, said) == (0, "")


def test_the_innermost_sentence_is_said() -> None:
    assert describe_interruption(signal.SIGINT) == "maskbeam: interrupted"
    with when_interrupted(sentence="Outer."), when_interrupted(), when_interrupted(sentence="Inner."):
        assert describe_interruption(signal.SIGTERM) == "maskbeam: terminated. Inner."
    assert describe_interruption(signal.SIGINT) == "maskbeam: interrupted"
