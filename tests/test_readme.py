"""What the README and the pages in docs/ say is so: fields, flags, commands, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from maskbeam.pipeline import cli
from maskbeam.pipeline.commands.evaluate import parse_evaluate
from maskbeam.pipeline.commands.export import parse_export
from maskbeam.pipeline.commands.import_coco import parse_import
from maskbeam.pipeline.commands.plan import parse_plan
from maskbeam.pipeline.commands.refine import parse_refine
from maskbeam.pipeline.commands.view import parse_view
from maskbeam.pipeline.options import parse_label
from maskbeam.transforms.labels.schema import ANNOTATIONS, CANDIDATES, IMAGES
from tests.conftest import label, read_labels

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
README = PAGES[0].read_text()
TEXT = "\n".join(page.read_text() for page in PAGES)
COMMANDS = re.findall(r"^(?:\$ )?\.venv/bin/maskbeam (\w+) (.*)$", TEXT, re.MULTILINE)
LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())]
PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "label": parse_label,
    "plan": parse_plan,
    "export": parse_export,
    "import": parse_import,
    "evaluate": parse_evaluate,
    "refine": parse_refine,
    "view": parse_view,
}


def flags_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return set(re.findall(r"--\w+", capsys.readouterr().out))


@pytest.mark.parametrize("field", [*ANNOTATIONS.names, *IMAGES.names, *CANDIDATES.names])
def test_every_field_of_the_output_is_described(field: str) -> None:
    assert f"`{field}`" in TEXT


def test_every_flag_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = set().union(*(flags_of(command, capsys) for command in cli._COMMANDS))
    beams = {"--direct_num_workers", "--direct_running_mode", "--s3_endpoint_url"}
    assert set(re.findall(r"`(--\w+)", TEXT)) - known - beams == set()


@pytest.mark.parametrize(("command", "flags"), COMMANDS)
def test_every_command_is_understood(command: str, flags: str) -> None:
    PARSERS[command](shlex.split(flags))


def test_every_subcommand_is_shown() -> None:
    assert {command for command, _ in COMMANDS} >= set(PARSERS)
    for command in cli._COMMANDS:
        assert f"maskbeam {command}" in README or f"make {command}" in README


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)$", README, re.MULTILINE))
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_every_link_leads_somewhere(page: Path, link: str) -> None:
    assert link.startswith("https://") or (page.parent / link).exists()


def test_the_packing_of_tables_works(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh directory, as it is printed."""
    (snippet,) = re.findall(r"```python\n(.*?COPY.*?)```", (ROOT / "docs/scaling.md").read_text(), re.DOTALL)
    assert label("--input", photos, "--output", tmp_path / "labels", "--chunk_size", "2") == 0
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    labels = read_labels(tmp_path / "labels")
    for table, rows in (("annotations", labels.annotations), ("images", labels.images)):
        packed = pq.read_table(tmp_path / "packed" / table).to_pylist()
        assert sorted(row["image_id"] for row in packed) == [row["image_id"] for row in rows]
