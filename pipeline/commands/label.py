"""maskbeam label: its flags, and the job that they make; run.py runs it."""

from __future__ import annotations

from maskbeam.pipeline.launch.local import run_label
from maskbeam.pipeline.options import parse_label
from maskbeam.pipeline.results import describe_default_model


def main(argv: list[str]) -> int:
    """Parses the flags and runs the job."""
    job, options = parse_label(argv)
    return run_label(job, options, notice=describe_default_model(argv))
