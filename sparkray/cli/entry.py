"""The top of a process: errors become one line and an exit code, and a kill is cleaned up after like Ctrl-C."""

from __future__ import annotations

import signal
import sys
import types
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from sparkray.errors import EXIT_INTERRUPTED, SparkrayError, exit_code

if TYPE_CHECKING:
    from sparkray.config.base import Settings

SettingsT = TypeVar("SettingsT", bound="Settings")


def run_guarded(command: Callable[[], object]) -> None:
    """Run `command`, and exit with the code that the error table gives where it raises an error of ours."""
    from sparkray.telemetry.logs import configure_logging

    configure_logging()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        command()
    except SparkrayError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(EXIT_INTERRUPTED)


def run_job(kind: type[SettingsT], job: Callable[[SettingsT, bool], Mapping[str, Any]]) -> None:
    """The whole of an entry script for `ray job submit`: settings in, a summary out as the last line of stdout.

    Args:
        kind: the job's settings. Each plain field is a flag of its own name, as `--max-tokens` of `max_tokens`; the
            others are reached by `--set` and `--config`.
        job: called with the settings and with whether `--json` was given, which means: no progress.
    """

    def run() -> None:
        from sparkray.config.base import load_settings
        from sparkray.telemetry.console import print_json

        given = vars(_parser(kind, job.__doc__).parse_args())
        files, overrides, quiet = given.pop("config"), given.pop("set"), given.pop("json")
        flags = {name: value for name, value in given.items() if value is not None}
        print_json(job(load_settings(kind, files, overrides, flags), quiet))

    run_guarded(run)


def _parser(kind: type[Settings], description: str | None) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, action="append", default=[], help="settings file; several merge")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, as a.b=1")
    parser.add_argument("--json", action="store_true", help="print the summary alone, no progress")
    for name, field in kind.model_fields.items():
        flag, text = f"--{name.replace('_', '-')}", (field.description or "").replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag, action=BooleanOptionalAction, default=None, help=text)
        elif _is_plain(field.annotation):
            # Text as it is: pydantic reads numbers from it, and its errors are the better ones.
            parser.add_argument(flag, default=None, help=text)
    return parser


def _is_plain(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return True
    if get_origin(annotation) in (Union, types.UnionType):
        return all(_is_plain(part) for part in get_args(annotation) if part is not type(None))
    return annotation in (str, int, float)


def _interrupt(_: int, __: types.FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
