"""make with real environments, in which pip and pytest are stubs that write down their calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import OTHER_MARKERS

ROOT = Path(__file__).parents[1]
PACKAGE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = [pytest.mark.processes, pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")]

# A Python whose environments have those stubs. With VERSION set it takes itself for another one.
PYTHON = f"""#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    {sys.executable} "$@" --without-pip && cp -r {{stubs}}/* $4/lib/python*/site-packages/
else
    {sys.executable} -c "import sys; sys.version_info = ${{{{VERSION:-sys.version_info}}}}; $2"
fi
"""

# Writes its arguments and KERAS_BACKEND into the file that CALLS names. FAIL has the calls that fail, KILL those that
# are killed with the shell that made them; a semicolon separates them.
STUB = """
import os, sys
call = " ".join([{name!r}, *sys.argv[1:], os.environ.get("KERAS_BACKEND", "")]).strip()
with open(os.environ["CALLS"], "a") as calls:
    print(call, file=calls)
if call in os.environ.get("KILL", "").split(";"):
    os.kill(os.getppid(), 9)
sys.exit(3 if call in os.environ.get("FAIL", "").split(";") else 0)
"""

INSTALL = "pip install --editable ."
INSTALL_DEV = "pip install --editable .[dev]"
PYTEST = "pytest -q -n 2 --dist worksteal"
TEST = f"{PYTEST} -m not (clients or engines)"
TEST_JAX = f"{PYTEST} tests/transforms/models jax"
CHECK = f"{PYTEST} -m not (processes or browser or model or slow or clients or engines)"


class Project:
    """A directory with the Makefile."""

    def __init__(self, directory: Path, stubs: Path) -> None:
        self.directory = directory
        directory.mkdir()
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, directory)
        self.python = stubs / "bin" / "python3"
        self._calls = stubs / "calls"

    @property
    def venv(self) -> Path:
        return self.directory / ".venv"

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: text for name, text in os.environ.items() if name not in ("PYTHON", "VENV", "MAKEFLAGS")}
        environment |= {"PATH": f"{self.python.parent}:{environment['PATH']}", "CALLS": str(self._calls), **variables}
        environment.pop("KERAS_BACKEND", None)
        return subprocess.run(
            ["make", "--no-print-directory", *arguments],
            cwd=self.directory,
            env=environment,
            capture_output=True,
            text=True,
        )

    def calls(self) -> list[str]:
        """What pip and pytest were called with since this was last asked."""
        found = self._calls.read_text().splitlines() if self._calls.exists() else []
        self._calls.unlink(missing_ok=True)
        return found


@pytest.fixture
def project(tmp_path: Path) -> Project:
    stubs = tmp_path / "stubs"
    for name in ("pip", "pytest"):
        (stubs / "packages" / name).mkdir(parents=True)
        (stubs / "packages" / name / "__init__.py").touch()
        (stubs / "packages" / name / "__main__.py").write_text(STUB.format(name=name))
    (stubs / "bin").mkdir()
    (stubs / "bin" / "python3").write_text(PYTHON.format(stubs=stubs / "packages"))
    (stubs / "bin" / "python3").chmod(0o755)
    return Project(tmp_path / "project", stubs)


def test_the_first_install_says_how_large_it_is_and_the_second_does_nothing(project: Project) -> None:
    first = project.make("install")
    assert first.returncode == 0 and project.calls() == [INSTALL], first.stderr
    assert re.search(r"about \d+ MB to download and [\d.]+ GB on disk", first.stdout)
    second = project.make("install")
    assert second.returncode == 0 and project.calls() == [] and "download" not in second.stdout


def test_a_changed_pyproject_is_installed_into_the_same_environment(project: Project) -> None:
    project.make("install")
    (project.venv / "kept").touch()
    os.utime(project.venv / "installed", (0, 0))
    assert project.make("install").returncode == 0
    assert project.calls() == [INSTALL, INSTALL] and (project.venv / "kept").exists()


@pytest.mark.parametrize("version", ["(2, 7, 18)", "(3, 10, 13)", "(3, 14, 0)"])
@pytest.mark.parametrize("target", ["install", "demo", "test"])
def test_other_pythons_are_refused_in_one_sentence_before_anything_is_made(
    project: Project, target: str, version: str
) -> None:
    refused = project.make(target, VERSION=version)
    assert refused.returncode != 0 and refused.stdout == ""
    said, make = refused.stderr.splitlines()
    found = version.strip("()").replace(", ", ".")
    assert said == (
        f"maskbeam needs Python 3.11 to 3.13, but python3 is Python {found}. "
        "Name another one, for example: make PYTHON=python3.12"
    )
    assert "Error" in make
    assert project.calls() == [] and not project.venv.exists()


def test_the_versions_are_those_of_the_package() -> None:
    assert PACKAGE["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= v[:2] <= (3, 13)" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("dependency", PACKAGE["dependencies"])
def test_an_older_python_has_nothing_to_look_for(dependency: str) -> None:
    """So pip says in one line that maskbeam requires another Python, and not that it cannot find some package."""
    marker = Requirement(dependency).marker
    assert marker is not None
    wanted = {version: marker.evaluate({"python_version": version}) for version in ("3.9", "3.10", "3.11", "3.13")}
    assert wanted == {"3.9": False, "3.10": False, "3.11": True, "3.13": True}


def lose_the_interpreter(project: Project) -> None:
    for link in (project.venv / "bin").glob("python*"):
        link.unlink()
        link.symlink_to("/nowhere/python")


def lose_pip(project: Project) -> None:
    (pip,) = project.venv.glob("lib/python*/site-packages/pip")
    shutil.rmtree(pip)


def break_off(project: Project) -> None:
    """As if pip had been killed."""
    os.utime(project.venv / "installed", (0, 0))
    assert project.make("install", KILL=INSTALL).returncode != 0


def move(project: Project) -> None:
    """The scripts in an environment name the place where it was made."""
    project.directory = project.directory.rename(project.directory.with_name("moved"))


def make_by_hand(project: Project) -> None:
    """Half of it."""
    shutil.rmtree(project.venv)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project.venv], check=True)


def upgrade(project: Project) -> None:
    """As if it had been made by Python 3.10."""
    stamp = project.venv / "installed"
    stamp.write_text(re.sub(r"^\S+", "3.10", stamp.read_text()))


@pytest.mark.parametrize(
    "spoil",
    [lose_the_interpreter, lose_pip, break_off, move, make_by_hand, upgrade],
    ids=lambda spoil: spoil.__name__,
)
def test_a_broken_or_foreign_environment_is_replaced(project: Project, spoil: Callable[[Project], None]) -> None:
    assert project.make("install").returncode == 0
    spoil(project)
    (project.venv / "left").touch()
    project.calls()
    done = project.make("install")
    assert done.returncode == 0, done.stderr
    assert project.calls() == [INSTALL] and not (project.venv / "left").exists()
    assert "it is made again" in done.stdout and "to download" in done.stdout
    assert project.make("install").returncode == 0 and project.calls() == []


def test_an_environment_of_another_python_than_the_one_given_is_replaced(project: Project) -> None:
    assert project.make("install").returncode == 0
    (project.venv / "left").touch()
    given = f"PYTHON={project.python}"
    assert project.make("install", given).returncode == 0 and (project.venv / "left").exists()
    other = (3, 13) if sys.version_info[:2] < (3, 13) else (3, 12)
    assert project.make("install", given, VERSION=str((*other, 0))).returncode == 0
    assert not (project.venv / "left").exists()


def test_what_python3_is_does_not_matter_to_a_finished_environment(project: Project) -> None:
    """One that was made by `make PYTHON=python3.12` serves `make test`."""
    assert project.make("install").returncode == 0
    (project.venv / "left").touch()
    assert project.make("test", VERSION="(3, 9, 0)").returncode == 0
    assert (project.venv / "left").exists()


@pytest.mark.parametrize("is_environment", [False, True])
def test_what_make_did_not_make_is_not_emptied(project: Project, is_environment: bool) -> None:
    other = project.directory / "mine"
    other.mkdir()
    (other / "letter").write_text("dear")
    if is_environment:
        (other / "pyvenv.cfg").touch()
    refused = project.make("install", "VENV=mine")
    assert refused.returncode != 0 and (other / "letter").read_text() == "dear" and project.calls() == []
    assert refused.stderr.splitlines()[0].startswith("mine was not made by make")


def test_a_directory_that_is_no_environment_is_not_emptied_whatever_its_name(project: Project) -> None:
    project.venv.mkdir()
    (project.venv / "letter").write_text("dear")
    assert project.make("install").returncode != 0
    assert (project.venv / "letter").read_text() == "dear" and project.calls() == []


def test_a_first_install_that_failed_is_made_again(project: Project) -> None:
    assert project.make("install", FAIL=INSTALL).returncode != 0
    (project.venv / "left").touch()
    assert project.make("install").returncode == 0
    assert project.calls() == [INSTALL, INSTALL] and not (project.venv / "left").exists()


def test_tests_that_cannot_be_installed_leave_the_environment_as_it_was(project: Project) -> None:
    """Without a network `make demo` goes on to work."""
    assert project.make("install").returncode == 0
    assert project.make("test", FAIL=INSTALL_DEV).returncode != 0
    assert project.calls() == [INSTALL, INSTALL_DEV]
    assert project.make("install").returncode == 0 and project.calls() == []
    assert project.make("test").returncode == 0 and project.calls() == [INSTALL_DEV, TEST, TEST_JAX]
    assert project.make("test").returncode == 0 and project.calls() == [TEST, TEST_JAX]


@pytest.mark.parametrize("failing", [(), (TEST,), (TEST_JAX,), (TEST, TEST_JAX)])
def test_both_halves_run_and_the_end_says_which_failed(project: Project, failing: tuple[str, ...]) -> None:
    done = project.make("test", FAIL=";".join(failing))
    assert project.calls() == [INSTALL, INSTALL_DEV, TEST, TEST_JAX]
    assert (done.returncode == 0) == (not failing)
    assert done.stdout.splitlines()[-2:] == [
        f"{name}: {'FAILED (exit code 3)' if call in failing else 'passed'}"
        for name, call in (("all tests", TEST), ("the model's tests on JAX", TEST_JAX))
    ]
    assert "It takes" in done.stdout


@pytest.mark.parametrize("failing", [(), (CHECK,), ("ruff",), ("mypy",), (CHECK, "ruff")])
def test_check_runs_tests_style_and_types_whatever_fails(project: Project, failing: tuple[str, ...]) -> None:
    project.make("install")
    for tool in ("ruff", "mypy"):
        program = project.venv / "bin" / tool
        program.write_text(f"#!/bin/sh\necho {tool} ran; exit {int(tool in failing)}\n")
        program.chmod(0o755)
    project.calls()
    done = project.make("check", FAIL=";".join(failing))
    assert project.calls() == [INSTALL_DEV, CHECK]
    assert "ruff ran" in done.stdout and ("mypy ran" in done.stdout) == ("ruff" not in failing)
    assert done.stdout.splitlines()[-2:] == [
        f"everyday tests: {'FAILED (exit code 3)' if CHECK in failing else 'passed'}",
        f"style and types: {'FAILED (exit code 1)' if {'ruff', 'mypy'} & set(failing) else 'passed'}",
    ]
    assert (done.returncode == 0) == (not failing)


def test_everyday_tests_are_those_without_a_marker(project: Project) -> None:
    names = re.search(r"EVERYDAY := not \((.*)\)", (ROOT / "Makefile").read_text())
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    assert names and names[1].split(" or ") == list(OTHER_MARKERS) == [text.partition(":")[0] for text in declared]


@pytest.mark.parametrize(("target", "marker"), [("test-clients", "clients"), ("test-engines", "engines")])
def test_what_other_programs_and_engines_do_is_tested_by_itself(project: Project, target: str, marker: str) -> None:
    assert project.make(target).returncode == 0
    assert project.calls() == [INSTALL, INSTALL_DEV, f"pytest -q -m {marker}"]
