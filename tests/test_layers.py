"""The map of the code, enforced: which module may import what. Imports inside functions count."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("pipeline", "transforms")
AROUND = ("tests", "benchmarks", "training", "deploy")

# Folders of transforms/ that work wherever NumPy is, and the one that needs Keras.
NO_BEAM = ("masks", "models", "formats", "evaluation")
KERAS = "transforms/models/"


@dataclass(frozen=True)
class Import:
    """`from package.module import name` in a file; name is empty for `import package.module`."""

    file: str
    module: str
    name: str
    level: int = 0  # dots of a relative import

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def imported_file(self) -> str:
        """Of a module of ours."""
        path = self.module.removeprefix("maskbeam.").replace(".", "/")
        return f"{path}/{self.name}.py" if (ROOT / path / f"{self.name}.py").exists() else f"{path}.py"


def find_imports(file: str, source: str) -> list[Import]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(file, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [Import(file, node.module or "", alias.name, node.level) for alias in node.names]
    return found


def our_files(*folders: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports_in(*folders: str) -> list[Import]:
    return [found for file in our_files(*folders) for found in find_imports(file, (ROOT / file).read_text("utf-8"))]


def test_imports_are_found_wherever_they_are() -> None:
    source = "import a.b\nfrom c.d import e, f\nfrom . import g\ndef later():\n    import h as i\n"
    assert set(find_imports("x.py", source)) == {
        Import("x.py", "a.b", ""),
        Import("x.py", "c.d", "e"),
        Import("x.py", "c.d", "f"),
        Import("x.py", "", "g", level=1),
        Import("x.py", "h", ""),
    }


def test_what_is_named_here_exists() -> None:
    folders = {path.parent.name for path in (ROOT / "transforms").glob("*/__init__.py")}
    assert folders >= set(NO_BEAM)
    assert set(our_files(*PRODUCT)) >= {"transforms/masks/rle.py", "pipeline/options.py", f"{KERAS}check_preset.py"}


@pytest.mark.parametrize("package", ["maskbeam.pipeline", "tests", "benchmarks", "training"])
def test_transforms_stand_alone(package: str) -> None:
    assert not [found for found in imports_in("transforms") if f"{found.module}.".startswith(f"{package}.")]


@pytest.mark.parametrize("package", ["tests", "benchmarks", "training"])
def test_the_application_needs_no_tests(package: str) -> None:
    assert not [found for found in imports_in("pipeline") if found.package == package]


@pytest.mark.parametrize(
    ("packages", "allowed"),
    [
        ({"keras", "keras_hub"}, {file for file in our_files(*PRODUCT) if file.startswith(KERAS)}),
        ({"pycocotools"}, {"transforms/masks/rle.py"}),
        (
            {"pyarrow.parquet"},
            {f"transforms/{name}.py" for name in ("files/parquet_file", "labels/commit", "labels/clear")},
        ),
        ({"argparse"}, {"pipeline/options.py", "pipeline/commands/demo.py"}),
        ({"torch", "torchvision", "segment_anything", "cv2", "scipy", "pandas"}, set()),  # of tests and benchmarks
    ],
    ids=["keras", "pycocotools", "parquet", "argparse", "reference"],
)
def test_package_is_imported_only_in(packages: set[str], allowed: set[str]) -> None:
    imports = imports_in(*PRODUCT)
    assert {found.file for found in imports if {found.package, found.module} & packages} <= allowed


def test_launching_a_job_loads_no_keras() -> None:
    """Only a function imports it, for models that have to be downloaded."""
    tree = ast.parse((ROOT / KERAS / "check_preset.py").read_text("utf-8"))
    at_the_top = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [line for line in at_the_top if "keras" in line]


@pytest.mark.parametrize("folder", NO_BEAM)
def test_folder_needs_no_beam(folder: str) -> None:
    """Nor does anything that it imports."""
    imports: dict[str, list[Import]] = {}
    for found in imports_in("transforms"):
        imports.setdefault(found.file, []).append(found)
    reached = list(our_files(f"transforms/{folder}"))
    for file in reached:
        reached += {found.imported_file for found in imports.get(file, [])} - set(reached)
    assert not [file for file in reached if any(found.package == "apache_beam" for found in imports.get(file, []))]


def test_transforms_know_no_flags() -> None:
    assert not [
        found
        for found in imports_in("transforms")
        if found.module.startswith("apache_beam.options") or found.name.endswith("Options")
    ]


def test_imports_are_absolute() -> None:
    assert not [
        found for found in imports_in(*PRODUCT, "maskbeam", "tests", "benchmarks", "training", "deploy") if found.level
    ]


def test_every_module_is_about_something() -> None:
    names = {Path(file).stem for file in our_files(*PRODUCT, "tests", "benchmarks", "training")}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc", "base"}


@pytest.mark.processes
def test_the_import_name_is_maskbeam() -> None:
    """Never the names of the folders, which a user's own project may have: a module would be loaded twice, too."""
    assert not [found for found in imports_in(*PRODUCT, *AROUND) if found.package in PRODUCT]
    script = (
        "import sys, maskbeam.pipeline.commands.label; print(sorted({'pipeline', 'transforms'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert printed == "[]\n"
