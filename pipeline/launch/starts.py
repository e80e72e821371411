"""Notes of the starts that are at work in an output directory, so that a second one can say so.

Nothing depends on them: they are no locks. A lock would have to be right on every file system and after kill -9, when
nobody is left to release it, and runners do a chunk twice at the same time by themselves anyway. So starts are harmless
to each other by construction (transforms/write_parquet.py): of one run, they end in the same rows; a start whose run
was replaced commits nothing more. What is left to do is to tell a user who started twice by mistake.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass

from maskbeam.transforms.files.beam_files import FileSystems
from maskbeam.transforms.files.storage import delete_file, list_tree, read_json, write_json
from maskbeam.transforms.labels.layout import TEMPORARY_DIR

_NOTE = ".start.json"


@dataclass(frozen=True)
class Start:
    """A start of `maskbeam label`: where it runs, and since when (UTC)."""

    host: str
    process: int
    time: str

    def died(self) -> bool:
        """True if it ran on this machine and does not any more; of other machines nothing is known."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # somebody else's
            pass
        return False

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.time}"


def announce_start(output: str) -> tuple[str, list[Start]]:
    """Leaves a note of this start in output, and reads those of others; notes of the dead are deleted.

    Returns:
      (path of the note, the other starts that may still be at work).
    """
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    directory = FileSystems.join(output, TEMPORARY_DIR)
    note = FileSystems.join(directory, uuid.uuid4().hex + _NOTE)
    # First written, then read: of two starts at the same moment, one at least sees the other.
    write_json(note, asdict(Start(socket.gethostname(), os.getpid(), now)))
    others = []
    for path in list_tree(directory):
        if not path.endswith(_NOTE) or path == note:
            continue
        with contextlib.suppress(OSError, ValueError, TypeError):  # it ends just now
            start = Start(**read_json(path))
            if start.died():
                delete_file(path)
            else:
                others.append(start)
    return note, others


def withdraw_start(note: str) -> None:
    """Deletes the note, if it is still there."""
    with contextlib.suppress(Exception):  # a note too many is only a message too many
        delete_file(note)
