"""What the flex template runs: `maskbeam label` with the template's parameters as flags."""

from __future__ import annotations

import sys

from maskbeam.pipeline.cli import main
from maskbeam.pipeline.options import label_parser


def to_command(arguments: list[str]) -> list[str]:
    """The template's launcher gives each parameter, and flags of its own for Beam, as --name=value.

    Ours come first; switches have no value there. Beam's go after "--", so that newer ones than this Beam knows pass.
    """
    flags = {flag: action for action in label_parser()._actions for flag in action.option_strings}
    ours, beams = [], ["--runner=DataflowRunner"]
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if flag not in flags:
            beams.append(argument)
        elif flags[flag].nargs != 0:
            ours.append(argument)
        elif value.lower() != "false":
            ours.append(flag)
    return ["label", *ours, "--", *beams]


if __name__ == "__main__":
    sys.exit(main(to_command(sys.argv[1:])))
