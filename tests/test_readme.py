"""What README.md and docs/ say is so: every command and snippet runs, every field, flag, link and target exists.

A fence's info string says how its block is checked. `bash`, `python` and `sql` are executed, in order, in a directory
that has what the pages speak of. `other: REASON` after the language means that a block cannot be: its maskbeam commands
must be understood by the program's own parser, and its Python must compile.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pytest
from PIL import Image

import maskbeam
from maskbeam.pipeline import cli
from maskbeam.pipeline.commands.certify import parse_certify
from maskbeam.pipeline.commands.evaluate import parse_evaluate
from maskbeam.pipeline.commands.export import parse_export
from maskbeam.pipeline.commands.import_coco import parse_import
from maskbeam.pipeline.commands.plan import parse_plan
from maskbeam.pipeline.commands.refine import parse_refine
from maskbeam.pipeline.commands.view import parse_view
from maskbeam.pipeline.options import parse_label
from maskbeam.transforms.labels.schema import ANNOTATIONS, CANDIDATES, IMAGES

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "pipeline/demo_photos"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
README = PAGES[0].read_text()
TEXT = "\n".join(page.read_text() for page in PAGES)
LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)]+)\)", page.read_text())]
PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "label": parse_label,
    "plan": parse_plan,
    "export": parse_export,
    "import": parse_import,
    "evaluate": parse_evaluate,
    "refine": parse_refine,
    "view": parse_view,
    "certify": parse_certify,
}

# What stands in for a download of SAM's weights, and keeps the model's work small. Nothing else is changed.
STAND_IN = "sam_tiny"
SMALLER = {"label": ["--points_per_side", "4"], "certify": ["--points_per_side", "4"]}

# Exit codes that are not 0: two photos on a coarse grid do change in a lower precision, which certify is there to say.
EXIT_CODES = {"certify": 1}

# Lines of executed bash blocks that are not maskbeam's.
SHELL: dict[str, Callable[[], Any]] = {
    "source .venv/bin/activate": lambda: None,  # the tests run in an environment already
    "mkdir few && cp $(ls photos/*.jpg | head -n 100) few/": lambda: shutil.copytree("photos", "few"),
}


@dataclass(frozen=True)
class Block:
    """A fenced block; reason is set if it cannot be executed."""

    page: Path
    line: int
    language: str
    reason: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """Its lines that run maskbeam, split into words without the first."""
        lines = self.text.splitlines() if self.language == "bash" else []
        return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("maskbeam ")]


def find_blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text[: found.start()].count("\n") + 1, found[1], found[2] or "", found[3])
        for found in re.finditer(r"^```(\w*)(?: other: ([^\n]+))?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


BLOCKS = [block for page in PAGES for block in find_blocks(page)]
COMMANDS = [command for block in BLOCKS for command in block.commands]


def flags_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return set(re.findall(r"--\w+", capsys.readouterr().out))


def test_every_fence_is_a_block_and_every_block_with_a_command_is_checked() -> None:
    for page in PAGES:
        assert len(re.findall(r"^```", page.read_text(), re.MULTILINE)) == 2 * len(find_blocks(page)), page
    plain = [block for block in BLOCKS if block.language not in ("bash", "python", "sql")]
    assert not [block for block in plain if block.language or re.search(r"^\$? ?maskbeam ", block.text, re.MULTILINE)]


@pytest.mark.parametrize("field", [*ANNOTATIONS.names, *IMAGES.names, *CANDIDATES.names])
def test_every_field_of_the_output_is_described(field: str) -> None:
    assert f"`{field}`" in TEXT


def test_every_flag_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = set().union(*(flags_of(command, capsys) for command in cli._COMMANDS))
    beams = {"--direct_num_workers", "--direct_running_mode", "--s3_endpoint_url"}
    assert set(re.findall(r"`(--\w+)", TEXT)) - known - beams == set()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_understood(command: list[str]) -> None:
    PARSERS[command[0]](command[1:])


def test_every_subcommand_is_shown_and_has_a_command_to_copy() -> None:
    assert {command[0] for command in COMMANDS} == set(PARSERS)
    assert set(PARSERS) | {"demo"} == set(cli._COMMANDS)
    assert not [command for command in cli._COMMANDS if f"`maskbeam {command}`" not in README]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    assert not [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name not in index and page.name != "README.md"
    ]


def test_every_make_target_and_extra_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    lines = [line for block in BLOCKS for line in block.text.splitlines()]
    targets = [line.split()[1] for line in lines if re.match(r"make [a-z]", line)]
    targets += re.findall(r"`make ([a-z][\w-]*)", TEXT)
    assert targets and not [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"'\.\[(\w+)\]'", TEXT)) <= set(extras)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_every_link_leads_somewhere(page: Path, link: str) -> None:
    if link.startswith("https://"):
        return
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists() and (not anchor or anchor in anchors(target))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.reason and b.language == "python"], ids=lambda b: b.page.name)
def test_python_that_cannot_run_here_compiles(block: Block) -> None:
    compile(block.text, block.page.name, "exec")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages take for granted: photos, labels with candidates, and COCO files of the same images."""
    directory = tmp_path_factory.mktemp("prepared")
    (directory / "photos").mkdir()
    for path in sorted(PHOTOS.glob("*.jpg"))[:2]:
        Image.open(path).resize((160, 120)).save(directory / "photos" / path.name)
    flags = [*SMALLER["label"], "--pred_iou_thresh", "0.5", "--stability_score_thresh", "0.5", "--keep_candidates"]
    code = cli.main(["label", "--input", str(directory / "photos"), "--output", str(directory / "labels"), *flags])
    assert code == 0
    shutil.copytree(directory / "labels", directory / "earlier")
    truth = directory / "instances.json"
    assert cli.main(["export", "--labels", str(directory / "labels"), "--format", "coco", "--output", str(truth)]) == 0
    instances = json.loads(truth.read_text())
    assert instances["annotations"]
    results = [
        {key: a[key] for key in ("image_id", "category_id", "segmentation", "score")} for a in instances["annotations"]
    ]
    (directory / "results.json").write_text(json.dumps(results))
    shutil.copy(directory / "photos/astronaut.jpg", directory / "photo.jpg")
    return directory


def run_bash(block: Block) -> None:
    for line in block.text.splitlines():
        if not line.startswith("maskbeam "):
            SHELL[line]()
            continue
        command = shlex.split(line, comments=True)[1:]
        if command[0] == "label":  # the page starts from photos
            shutil.rmtree(command[command.index("--output") + 1], ignore_errors=True)
        if "--model" in command:
            command[command.index("--model") + 1] = STAND_IN
        assert cli.main([*command, *SMALLER.get(command[0], [])]) == EXIT_CODES.get(command[0], 0), line


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.language and not block.reason for block in find_blocks(page))],
    ids=lambda p: p.stem,
)
def test_every_snippet_of_a_page_runs(
    page: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    load_sam = maskbeam.load_sam
    monkeypatch.setattr(maskbeam, "load_sam", lambda model, dtype="float32": load_sam(STAND_IN, dtype))
    for block in find_blocks(page):
        if block.reason or not block.language:
            continue
        if block.language == "bash":
            run_bash(block)
        elif block.language == "sql":
            assert duckdb.sql(block.text).fetchall() is not None
        else:
            exec(compile(block.text, f"{page.name}, line {block.line}", "exec"), {})
