"""Directories of other file systems, copied to this machine once."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

import maskbeam.transforms.files.s3  # noqa: F401  # one client for all files


def copy_once(kind: str, key: str, files: Mapping[str, str]) -> Path:
    """Copies files to ~/.cache/maskbeam/<kind>/<key>, unless they are there.

    Processes that ask at the same time wait for the one that copies; a copy that was cut off is not used.

    Args:
      key: identifies what the files hold.
      files: name in the copy -> path on any of Beam's file systems.

    Raises:
      OSError: they cannot be read, or the cache cannot be written.
    """
    cache = Path.home() / ".cache" / "maskbeam" / kind
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / key
    with open(cache / f"{key}.lock", "w") as lock:  # the system unlocks it when the process dies
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = cache / f"{key}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            for name, path in files.items():
                _copy(path, partial / name)
            os.rename(partial, target)
    return target


def _copy(path: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as remote,
        open(target, "wb") as local,
    ):
        shutil.copyfileobj(remote, local, 2**24)
