"""Flags <-> dataclasses. The only file that knows argparse and PipelineOptions.

What a subcommand was asked to do is a dataclass, its job, whose fields are config dataclasses. Every field of those is
a flag of the same name, with the field's type and default; its help is the field's line in the class's docstring,
and the docstring's first line is the title over the class's flags. So a default has one home, and a new parameter needs
no code here.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import re
import types
import typing
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from maskbeam.pipeline.exits import UsageError
from maskbeam.pipeline.graph import SHARED_SETTINGS, Job
from maskbeam.pipeline.launch.dataflow import install_command, is_installed
from maskbeam.transforms.masks.amg import PROFILES, AmgConfig

# Beam's "DirectRunner" first tries to download another runner's binary; this one is in the package and runs in process.
_LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
_LOCAL_RUNNER_NAMES = (None, "DirectRunner", "FnApiRunner")

# A mistyped flag is taken for one that is as similar as this (difflib's ratio), but never for one that deletes.
_SIMILARITY = 0.8
_NEVER_SUGGESTED = ("--overwrite",)

# Of file systems: the client's module, and Beam's extra that installs it.
_EXTRAS = {"s3": ("boto3", "aws"), "gs": ("google.cloud.storage", "gcp")}

J = TypeVar("J")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(message)


def label_parser() -> argparse.ArgumentParser:
    """The parser of `maskbeam label`."""
    return _job_parser(
        "label",
        Job,
        description="Labels images with SAM and writes COCO-RLE annotations to Parquet.",
        epilog="Flags that are not listed go to Beam (--runner, --direct_num_workers, --project, ...). Options that "
        "only a job server knows go after --.",
    )


def _job_parser(
    command: str, job: type, description: str, epilog: str | None = None, without: tuple[str, ...] = ()
) -> argparse.ArgumentParser:
    """The parser of a subcommand: required flags first, then groups of flags in the order of the job's fields."""
    parser = _Parser(
        prog=f"maskbeam {command}",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        add_help=False,
    )
    required = parser.add_argument_group("required")
    for config in typing.get_type_hints(job).values():
        group = parser.add_argument_group(_title(config))
        if config is AmgConfig:
            group.add_argument(
                "--profile",
                choices=list(PROFILES),
                default="default",
                help="parameters to start from: default is the reference's, sa1b what SA-1B was made with",
            )
        _add_flags(group, config, without, required=required)
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    shown = [f"{action.option_strings[0]} {action.metavar}" for action in parser._actions if action.required]
    parser.usage = " ".join(["%(prog)s", *shown, "[flags]"])
    return parser


def _title(config: type) -> str:
    """What stands over the flags of a config class."""
    return inspect.cleandoc(config.__doc__ or "").partition("\n")[0].rstrip(".")


def _add_flags(
    group: argparse._ArgumentGroup,
    config: Any,
    without: tuple[str, ...],
    show_defaults: bool = True,
    required: argparse._ArgumentGroup | None = None,
) -> None:
    """Adds the fields of a config class as flags, those without a default to the group `required` if there is one."""
    helps = field_helps(config)
    hints = typing.get_type_hints(config)
    for field in fields(config):
        if field.name in without:
            continue
        must = field.default is MISSING and field.default_factory is MISSING
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "required": must}
        told = helps[field.name] if show_defaults else helps[field.name].partition(" Default: ")[0]
        default = _default_help(field) if show_defaults else ""
        options["help"] = told.rstrip(".").replace("%", "%%") + default
        kind, many = _flag_type(field.name, hints[field.name])
        if kind is bool:
            options["action"] = "store_true"
        else:
            options["type"] = kind
            options["metavar"] = _metavar(field.name, hints[field.name], kind)
            if many:
                options["nargs"] = "+"
        (required if must and required else group).add_argument(f"--{field.name}", **options)


def _default_help(field: Field[Any]) -> str:
    if field.default is MISSING or field.default is None or field.default is False:
        return ""
    default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
    return f" (default: {default})"


def _flag_type(name: str, hint: Any) -> tuple[Any, bool]:
    """The function that parses one value of a field, and whether the flag takes several."""
    if name == "point_grids":
        return _read_point_grids, False
    hint = _without_none(hint)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return (str if typing.get_origin(hint) is typing.Literal else hint), False


def _metavar(name: str, hint: Any, kind: Any) -> str:
    """What stands for a value in --help. Which values are allowed is checked by the config class, for all callers."""
    hint = _without_none(hint)
    if typing.get_origin(hint) is typing.Literal:
        return f"{{{','.join(typing.get_args(hint))}}}"
    return {_read_point_grids: "FILE.json", int: "N", float: "X"}.get(kind, name.rpartition("_")[2].upper())


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _read_point_grids(path: str) -> tuple[tuple[tuple[float, float], ...], ...]:
    """A JSON file with one list of [x, y] in [0, 1] for each crop layer."""
    try:
        with open(path) as file:
            grids = json.load(file)
        return tuple(tuple((float(x), float(y)) for x, y in grid) for grid in grids)
    except (OSError, ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"{path} must be a JSON file with one list of [x, y] points in [0, 1] for each crop layer: {error}"
        ) from error


def field_helps(config: type) -> dict[str, str]:
    """The line(s) of each field under "Attributes:" in the docstring of a config class or of one it inherits from."""
    helps = {}
    for documented in reversed(config.__mro__):
        attributes = inspect.cleandoc(documented.__doc__ or "").partition("Attributes:\n")[2]
        for entry in re.split(r"\n(?=  \w[\w, ]*: )", "\n" + attributes):
            names, _, text = entry.strip().partition(": ")
            for name in names.split(", "):
                helps[name] = " ".join(text.split())
    return helps


def parse_label(argv: list[str]) -> tuple[Job, PipelineOptions]:
    """Command line -> what to do, and how Beam runs it. Beam's file systems have their options from then on.

    Raises:
      UsageError: a flag nobody knows, a value out of range.
    """
    own, passed_on = argv, []
    if "--" in argv:
        own, passed_on = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = label_parser()
    parsed, rest = parser.parse_known_args(own)
    _check_beam_flags(rest, parser)
    options = _beam_options(rest + passed_on)
    FileSystems.set_options(options)  # files are looked at before there is a pipeline, which would do this
    return _build_job(Job, vars(parsed)), options


def parse_job(command: str, job: type[J], argv: list[str], description: str, without: tuple[str, ...] = ()) -> J:
    """Command line -> what to do, for a subcommand that does not run on Beam.

    Args:
      command: its name.
      job: a dataclass whose fields are config dataclasses.
      description: a sentence for --help.
      without: fields that are no flags here and keep their defaults, since they would do nothing.

    Raises:
      UsageError: a flag nobody knows, a value out of range.
    """
    parser = _job_parser(command, job, description, without=without)
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(_describe_unknown(unknown[0], parser.prog, parser))
    FileSystems.set_options(PipelineOptions([]))  # object stores want some, if only to look into the environment
    return _build_job(job, vars(parsed))


def parse_changes(
    command: str, job: type[J], settings: dict[str, type], argv: list[str], description: str, without: tuple[str, ...]
) -> tuple[J, dict[str, Any]]:
    """As parse_job, for a subcommand that starts from the settings of an earlier run and changes some.

    Args:
      settings: title in --help -> config class. Their flags have no defaults here. A field that two classes share,
        since one inherits from the other, is a flag under the first title only.
      without: fields of these that are no flags here.

    Returns:
      the job, and the settings that were given.
    """
    parser = _job_parser(command, job, description)
    for title, config in settings.items():
        _add_flags(parser.add_argument_group(title), config, without, show_defaults=False)
        without += tuple(field.name for field in fields(config))
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(_describe_unknown(unknown[0], parser.prog, parser))
    values = vars(parsed)
    changes = {name: value for config in settings.values() for name, value in _given(config, values).items()}
    return _build_job(job, values), changes


def _given(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Those of a config's fields that were given as flags.

    Raises:
      UsageError: a value is the empty string, as of a variable of the shell that is not set, or a URI whose client is
        not installed.
    """
    given = {}
    for field in fields(config):
        value = values.get(field.name)
        if value is not None:
            for part in value if isinstance(value, list) else [value]:
                if part == "":
                    raise UsageError(f"--{field.name} is empty. Give it a value, or leave it out.")
                _check_extra(field.name, str(part))
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return given


def _check_extra(flag: str, value: str) -> None:
    """Beam says of a file system whose client is missing only that it does not know it, or "Missing requirement"."""
    scheme, is_uri, _ = value.partition("://")
    module, extra = _EXTRAS.get(scheme, ("", ""))
    if is_uri and module and not is_installed(module):
        raise UsageError(f"--{flag} is {value}, and {scheme}:// needs a client: {install_command(extra)}")


def _build_job(job: type[J], values: dict[str, Any]) -> J:
    configs: dict[str, Any] = {}
    for name, config in typing.get_type_hints(job).items():
        given = _given(config, values)
        if config is AmgConfig and job is Job and values.get("prompts") is not None:
            _check_no_grid(given, values)
            given = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, **given}
        try:
            if config is AmgConfig:
                if "point_grids" in given:
                    given.setdefault("points_per_side", None)
                configs[name] = AmgConfig.for_profile(values["profile"], **given)
            else:
                configs[name] = config(**given)
        except ValueError as error:
            raise UsageError(str(error)) from error
    return job(**configs)


def _check_no_grid(given: dict[str, Any], values: dict[str, Any]) -> None:
    """With prompts there is no grid of points, no crop and no duplicate.

    Raises:
      UsageError: a flag is of those.
    """
    names = [name for name in given if name not in SHARED_SETTINGS]
    if values["profile"] != "default":
        names.append("profile")
    if names:
        raise UsageError(
            f"--{names[0]} is for a grid of points, and --prompts is in its place: each prompt gets its mask. Leave "
            "one of the two out."
        )


def _beam_options(flags: list[str]) -> PipelineOptions:
    options = PipelineOptions(flags)
    standard = options.view_as(StandardOptions)
    if standard.runner in _LOCAL_RUNNER_NAMES:
        standard.runner = _LOCAL_RUNNER
    return options


def runs_locally(options: PipelineOptions) -> bool:
    """Whether the workers are threads or processes on this machine."""
    return options.view_as(StandardOptions).runner == _LOCAL_RUNNER


def _check_beam_flags(flags: list[str], own_parser: argparse.ArgumentParser) -> None:
    """Beam only warns of a flag that it does not know, and drops it. Here it is an error with a suggestion."""
    beam_parser = _Parser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for options in _subclasses(PipelineOptions):
        if "_add_argparse_args" in vars(options):
            options._add_argparse_args(beam_parser)
    _, unknown = beam_parser.parse_known_args(flags)
    if unknown:
        told = _describe_unknown(unknown[0], own_parser.prog, own_parser, beam_parser)
        raise UsageError(f"{told} (Options only a job server knows go after --.)")


def _describe_unknown(argument: str, program: str, *parsers: argparse.ArgumentParser) -> str:
    """What to say of an argument that no parser knows, with the flag that was probably meant."""
    for parser in parsers:
        if meant := _nearest_flag(argument, parser):
            return f"unknown argument {argument}: did you mean {meant}?"
    return f"unknown argument {argument}: {program} --help lists all flags."


def _nearest_flag(argument: str, parser: argparse.ArgumentParser) -> str | None:
    """The one flag that an argument begins, or else the most similar one, if it is really close."""
    if not argument.startswith("--"):
        return None
    given = "--" + argument[2:].partition("=")[0].replace("-", "_")
    flags = [flag for action in parser._actions for flag in action.option_strings if flag not in _NEVER_SUGGESTED]
    begun = [flag for flag in flags if flag.startswith(given)]
    if len(begun) == 1:
        return begun[0]
    return next(iter(difflib.get_close_matches(given, flags, n=1, cutoff=_SIMILARITY)), None)


def _subclasses(cls: type) -> list[Any]:
    found: list[Any] = []
    subclasses: list[Any] = cls.__subclasses__()
    for subclass in subclasses:
        found += [subclass, *_subclasses(subclass)]
    return found
