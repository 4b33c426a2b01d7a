"""Command-line options made from the settings, so that a flag, its type and its help are written once."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from setfit_kd.config import (
    AugmentConfig,
    DataConfig,
    RunConfig,
    SignalsConfig,
    StageConfig,
    StudentConfig,
    TeacherConfig,
)

F = TypeVar("F", bound=Callable[..., Any])


class _Share(click.FloatRange):
    """A number from 0 to 1; what is no number is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is no number.", param, ctx)
        return number


SHARE = _Share(0, 1)


def setting_options(*names: str, of: type[StageConfig] = RunConfig) -> Callable[[F], F]:
    """Add one option for each of a run's settings, or for those named; what is not given arrives as None."""

    def decorate(function: F) -> F:
        for name in reversed(names or _in_order()):
            function = _option(name, of.model_fields[name])(function)
        return function

    return decorate


def passed_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given."""
    return {name: value for name, value in flags.items() if value is not None and value != ()}


threads_option = click.option("--threads", type=click.IntRange(1), metavar="N",
                              help="Most threads of the CPU to take. [the libraries' own choice]")  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print everything measured as JSON.")
pickle_option = click.option("--trust-pickle", is_flag=True,
                             help="Load a pickled head of somebody else's; it may run any code.")  # fmt: skip


def output_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add -q and -v, and run the command within `console_output`."""

    @click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and results.")
    @click.option("-v", "--verbose", is_flag=True, help="Say more.")
    @wraps(function)
    def command(*, quiet: bool, verbose: bool, **arguments: Any) -> None:
        from setfit_kd.cli.output import console_output

        with console_output(quiet=quiet, verbose=verbose):
            function(**arguments)

    return command


def _in_order() -> list[str]:
    shared = list(StageConfig.model_fields)
    in_order = (DataConfig, AugmentConfig, TeacherConfig, SignalsConfig, StudentConfig)
    stages = [name for stage in in_order for name in stage.model_fields]
    own = [name for name in RunConfig.model_fields if name not in stages]
    ordered = [*DataConfig.model_fields, "teacher", "student", *stages, *own]
    return list(dict.fromkeys([name for name in ordered if name not in shared] + shared))


def _option(name: str, field: FieldInfo) -> Callable[[F], F]:
    flag = "--" + name.replace("_", "-")
    kind = _plain(field.annotation)
    text = field.description or ""
    has_default = field.default is not None and field.default is not PydanticUndefined
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, is_flag=True, default=None, help=text)
    if get_origin(kind) is Literal:
        parameter_type: Any = click.Choice(get_args(kind))
    elif kind in (int, float):
        parameter_type = kind
    else:
        parameter_type = str
    if has_default:
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        text = f"{text} [{default}]"
    metavar = None if isinstance(parameter_type, click.Choice) else _METAVARS.get(name, _METAVARS.get(kind, "TEXT"))
    repeated = name in _REPEATED
    return click.option(flag, name, type=parameter_type, default=None, metavar=metavar, help=text, multiple=repeated)


_REPEATED = frozenset({"teacher", "student"})
"""Settings with several values, each given by an option of its own."""

_METAVARS: dict[Any, str] = {
    int: "N",
    float: "X",
    Path: "FOLDER",
    "labeled": "SOURCE",
    "unlabeled": "SOURCE",
    "validation": "SOURCE",
    "eval": "SOURCE",
    "teacher": "MODEL",
    "student": "MODEL",
    "text_column": "NAME[,NAME...]",
    "label_column": "NAME",
    "device": "DEVICE",
    "objective": "NAME[=X][,...]",
    "head_c": "X|auto",
}


def _plain(annotation: Any) -> Any:
    """A setting's type without its ``| None`` and its validators; text where there are several."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [part for part in get_args(annotation) if part is not type(None)]
        return _plain(kinds[0]) if len(kinds) == 1 else str
    return annotation
