"""maskbeam label: its flags, and the job that they make; run.py runs it."""

from __future__ import annotations

from pipeline.options import parse_label
from pipeline.results import describe_default_model
from pipeline.run import run_label


def main(argv: list[str]) -> int:
    """Parses the flags and runs the job."""
    job, options = parse_label(argv)
    return run_label(job, options, notice=describe_default_model(argv))
