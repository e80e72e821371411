"""Beam's file systems, with deadlines and one client per process: whoever needs them imports them from here."""

from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

import maskbeam.transforms.files.gs
import maskbeam.transforms.files.s3  # noqa: F401

__all__ = ["CompressionTypes", "FileSystems"]
