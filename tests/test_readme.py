"""What the README says is so: its fields, its flags, its commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from pipeline.export import ExportConfig, parse_export
from pipeline.import_coco import ImportConfig, parse_import
from pipeline.options import label_parser, parse_label
from pipeline.plan import parse_plan
from transforms.schema import ANNOTATIONS, IMAGES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PLAN_COMMANDS = re.findall(r"^\$ \S*maskbeam plan (--input .*)$", README, re.MULTILINE)
LABEL_COMMANDS = re.findall(r"^\S*maskbeam label (--input .*)$", README, re.MULTILINE)


@pytest.mark.parametrize("field", [*ANNOTATIONS.names, *IMAGES.names])
def test_every_field_of_the_output_is_described(field: str) -> None:
    assert f"`{field}`" in README


def test_every_flag_exists() -> None:
    known = {option for action in label_parser()._actions for option in action.option_strings}
    known |= {f"--{field.name}" for config in (ExportConfig, ImportConfig) for field in fields(config)}
    beams = {"--direct_num_workers", "--direct_running_mode"}
    assert set(re.findall(r"`(--\w+)", README)) - known - beams == set()


@pytest.mark.parametrize("command", LABEL_COMMANDS)
def test_every_label_command_is_understood(command: str) -> None:
    parse_label(shlex.split(command))


@pytest.mark.parametrize("command", PLAN_COMMANDS)
def test_every_plan_command_is_understood(command: str) -> None:
    parse_plan(shlex.split(command))


def test_there_are_commands() -> None:
    assert len(LABEL_COMMANDS) >= 2 and PLAN_COMMANDS
@pytest.mark.parametrize(
    ("command", "flags"), re.findall(r"^\S*maskbeam (export|import) (--.*)$", README, re.MULTILINE)
)
def test_every_export_and_import_command_is_understood(command: str, flags: str) -> None:
    {"export": parse_export, "import": parse_import}[command](shlex.split(flags))


def test_there_are_label_commands() -> None:
    assert len(LABEL_COMMANDS) >= 2


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)$", README, re.MULTILINE))
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_every_link_leads_somewhere(link: str) -> None:
    assert link.startswith("https://") or (ROOT / link).exists()
