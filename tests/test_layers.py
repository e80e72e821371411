"""The map of the code, enforced: which module may import what. Imports inside functions count."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("pipeline", "transforms")

# Beam stages, and files on Beam's file systems. Every other module works on plain arrays, with or without Beam.
VERBS = {
    f"transforms/{name}.py"
    for name in (
        *("match", "read", "resume", "segment", "write", "summary", "source", "labels", "cache", "s3", "photos"),
        *("manifest", "reconcile", "rewrite"),
    )
}
MODEL = {f"transforms/{path.name}" for path in (ROOT / "transforms").glob("sam*.py")}


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
        path = self.module.replace(".", "/")
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


def test_the_files_named_here_exist() -> None:
    assert set(our_files(*PRODUCT)) >= VERBS | {"transforms/sam.py", "transforms/rle.py", "pipeline/options.py"}


@pytest.mark.parametrize("package", ["pipeline", "tests", "benchmarks"])
def test_transforms_stand_alone(package: str) -> None:
    assert not [found for found in imports_in("transforms") if found.package == package]


@pytest.mark.parametrize("package", ["tests", "benchmarks"])
def test_the_application_needs_no_tests(package: str) -> None:
    assert not [found for found in imports_in("pipeline") if found.package == package]


@pytest.mark.parametrize(
    ("packages", "allowed"),
    [
        ({"keras"}, MODEL),
        ({"keras_hub"}, MODEL | {"transforms/check_preset.py"}),  # to fetch presets that KerasHub knows by name
        ({"pycocotools"}, {"transforms/rle.py"}),
        ({"apache_beam"}, VERBS | set(our_files("pipeline"))),
        (
            {"pyarrow.parquet"},
            {"transforms/parquet_file.py", "transforms/write.py"},
        ),
        ({"argparse"}, {"pipeline/options.py", "pipeline/demo.py"}),
        ({"torch", "torchvision", "segment_anything", "cv2", "scipy", "pandas"}, set()),  # of tests and benchmarks
    ],
    ids=["keras", "keras_hub", "pycocotools", "apache_beam", "parquet", "argparse", "reference"],
)
def test_package_is_imported_only_in(packages: set[str], allowed: set[str]) -> None:
    imports = imports_in(*PRODUCT)
    assert {found.file for found in imports if {found.package, found.module} & packages} <= allowed


def test_launching_a_job_loads_no_keras() -> None:
    """Only a function imports it, for models that have to be downloaded."""
    tree = ast.parse((ROOT / "transforms/check_preset.py").read_text("utf-8"))
    at_the_top = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [line for line in at_the_top if "keras" in line]


def test_nouns_import_no_verbs() -> None:
    """A noun that did would import Beam after all."""
    nouns = set(our_files("transforms")) - VERBS
    assert not [found for found in imports_in("transforms") if found.file in nouns and found.imported_file in VERBS]


def test_transforms_know_no_flags() -> None:
    assert not [
        found
        for found in imports_in("transforms")
        if found.module.startswith("apache_beam.options") or found.name.endswith("Options")
    ]


def test_imports_are_absolute() -> None:
    assert not [found for found in imports_in(*PRODUCT, "tests", "benchmarks") if found.level]


def test_every_module_is_about_something() -> None:
    names = {Path(file).stem for file in our_files(*PRODUCT, "tests", "benchmarks")}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc", "base"}
