"""The command `maskbeam`: subcommands and exit codes."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import logging
import os
import sys
import warnings

from maskbeam.pipeline.interruption import handle_signals, interruptible

# Each is a module's main(argv); what it does is shown by --help.
_COMMANDS = {
    "label": ("maskbeam.pipeline.commands.label", "label images with SAM, from shards to Parquet"),
    "view": (
        "maskbeam.pipeline.commands.view",
        "look at labels: an HTML report of photos with their masks, or plain pictures",
    ),
    "evaluate": (
        "maskbeam.pipeline.commands.evaluate",
        "hold labels against a hand-made truth, or against other labels",
    ),
    "refine": ("maskbeam.pipeline.commands.refine", "choose the masks anew from stored candidates, without the model"),
    "export": (
        "maskbeam.pipeline.commands.export",
        "write labels in the format of another tool: COCO, SA-1B, YOLO, pictures",
    ),
    "import": ("maskbeam.pipeline.commands.import_coco", "make labels of COCO annotations or results"),
    "plan": (
        "maskbeam.pipeline.commands.plan",
        "tell what a run will take: files, bytes, hours and money, without labeling",
    ),
    "certify": ("maskbeam.pipeline.commands.certify", "compare the masks of a lower precision with those of float32"),
    "demo": ("maskbeam.pipeline.commands.demo", "label a few photos with the embedded model and draw the masks"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
      argv: None = this is the program itself, whose signals are handled from here on.

    Returns:
      0 done, 1 the run failed, 2 usage, 130 interrupted, 143 terminated.
    """
    if argv is None:
        handle_signals()
        argv = sys.argv[1:]
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command == "help" and rest:
        command, rest = rest[0], ["--help"]
    if command in ("", "help", "-h", "--help"):
        print(_usage(), end="")
        return 0 if command else 2
    if command == "--version":
        print(f"maskbeam {importlib.metadata.version('maskbeam')}")
        return 0
    _quiet_libraries()
    try:
        return _run(command, rest)
    except KeyboardInterrupt:
        print("maskbeam: interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    width = max(len(command) for command in _COMMANDS) + 2
    commands = "".join(f"  {command:{width}}{does}\n" for command, (_, does) in _COMMANDS.items())
    more = "maskbeam help COMMAND lists its flags, maskbeam --version prints the version."
    return f"usage: maskbeam COMMAND ...\n\ncommands:\n{commands}\n{more}\n"


def _run(command: str, argv: list[str]) -> int:
    if command not in _COMMANDS:
        meant = "".join(f"did you mean {name}? " for name in difflib.get_close_matches(command, _COMMANDS, n=1))
        print(f"maskbeam: unknown command {command}: {meant}Commands: {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    # Imported late, and only what is asked for: most bring Beam with them, and --help should not wait for it.
    from maskbeam.pipeline.exits import UsageError
    from maskbeam.transforms.records import DamagedFile

    module = importlib.import_module(_COMMANDS[command][0])
    try:
        with interruptible():
            code: int = module.main(argv)
    except UsageError as error:
        print(f"maskbeam {command}: {error}", file=sys.stderr)
        return 2
    except DamagedFile as error:
        print(f"maskbeam {command}: {error}", file=sys.stderr)
        return 1
    return code


def _quiet_libraries() -> None:
    """What libraries say is nothing that a user could act on; errors that matter are exceptions, and said once."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    warnings.simplefilter("ignore")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.addFilter(lambda record: record.name.startswith("maskbeam."))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


if __name__ == "__main__":
    sys.exit(main())
