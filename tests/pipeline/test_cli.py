"""What all subcommands have in common: exit codes, and flags of one name that mean the same."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import re
from typing import NoReturn

import pytest

from maskbeam.pipeline import cli

COMMANDS = list(cli._COMMANDS)

# Flags that several commands have, and words that each of them says of one.
SHARED = {
    "--labels": "directory of labels, as `label",
    "--output": "directory of|file for coco",
    "--overwrite": "(delete the labels that an earlier run left in|replace the files that an earlier export wrote)",
    "--json": "file for the whole (result|plan).*, on any Beam file system; replaced if it exists",
    "--seed": "another one draws",
}


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_there_and_says_the_same_of_flags_of_one_name(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    printed = help_of(command, capsys)
    assert printed.startswith(f"usage: maskbeam {command} ")
    for flag, words in SHARED.items():
        if flag in printed.split():
            (told,) = re.findall(rf"^  {flag} .*(?:\n {{24}}.*)?", printed, re.MULTILINE)
            assert re.search(words, told), told


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flags", [["--no_such_flag"], ["--output", ""], ["--json", ""]])
def test_a_wrong_command_line_is_told_in_a_line(
    command: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.fullmatch(rf"maskbeam {command}: .+\n", printed.err)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_is_told_in_a_line(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(argv: list[str]) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(cli._COMMANDS[command][0]), "main", interrupted)
    assert cli.main([command]) == 130
    assert capsys.readouterr().err == "maskbeam: interrupted\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_command_is_command_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = help_of(command, capsys)
    with pytest.raises(SystemExit) as ended:
        cli.main(["help", command])
    assert ended.value.code == 0 and capsys.readouterr().out == expected


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"maskbeam {importlib.metadata.version('maskbeam')}\n"


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["lable"], "did you mean label? "),
        (["exprot"], "did you mean export? "),
        (["help", "evalute"], "did you mean evaluate? "),
        (["--verbose"], ""),
        (["xyz"], ""),
    ],
)
def test_a_mistyped_command_is_refused_with_the_one_that_was_meant(
    argv: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"maskbeam: unknown command {argv[-1]}: {meant}Commands: {', '.join(COMMANDS)}\n"


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["-h"], 0), (["help"], 0), (["lable"], 2)])
def test_the_program_lists_its_commands(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == code
    printed = "".join(capsys.readouterr())
    assert all(re.search(rf"\b{command}\b", printed) for command in COMMANDS)


@pytest.mark.parametrize(("logger", "shown"), [("maskbeam.transforms.masks.amg", True), ("apache_beam.io", False)])
def test_our_own_warnings_are_shown_and_no_librarys(
    logger: str, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    cli._quiet_libraries()
    logging.getLogger(logger).warning("look here")
    assert capsys.readouterr().err == ("warning: look here\n" if shown else "")
