"""What the README says is so: its fields, its flags, its commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipeline.options import field_helps, label_parser, parse_label
from pipeline.view import LabelsConfig, ReportConfig, SampleConfig, parse_view
from transforms.schema import ANNOTATIONS, IMAGES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
VIEW_COMMANDS = re.findall(r"^\S*maskbeam view (--labels .*)$", README, re.MULTILINE)
LABEL_COMMANDS = re.findall(r"^\S*maskbeam label (--input .*)$", README, re.MULTILINE)


@pytest.mark.parametrize("field", [*ANNOTATIONS.names, *IMAGES.names])
def test_every_field_of_the_output_is_described(field: str) -> None:
    assert f"`{field}`" in README


def test_every_flag_exists() -> None:
    known = {option for action in label_parser()._actions for option in action.option_strings}
    beams = {"--direct_num_workers", "--direct_running_mode"}
    views = {f"--{name}" for config in (LabelsConfig, SampleConfig, ReportConfig) for name in field_helps(config)}
    assert set(re.findall(r"`(--\w+)", README)) - known - beams - views == set()


@pytest.mark.parametrize("command", LABEL_COMMANDS)
def test_every_label_command_is_understood(command: str) -> None:
    parse_label(shlex.split(command))


@pytest.mark.parametrize("command", VIEW_COMMANDS)
def test_every_view_command_is_understood(command: str) -> None:
    parse_view(shlex.split(command))


def test_there_are_commands() -> None:
    assert len(LABEL_COMMANDS) >= 2 and VIEW_COMMANDS


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)$", README, re.MULTILINE))
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_every_link_leads_somewhere(link: str) -> None:
    assert link.startswith("https://") or (ROOT / link).exists()
