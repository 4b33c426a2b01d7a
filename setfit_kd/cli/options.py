"""Command-line options created from the configs, so that each flag, its type and its help are defined once."""

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

from setfit_kd.config.base import StageConfig
from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import AugmentConfig, DataConfig, SignalsConfig, StudentConfig, TeacherConfig

F = TypeVar("F", bound=Callable[..., Any])


class _Fraction(click.FloatRange):
    """Number between 0 and 1; rejects NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


FRACTION = _Fraction(0, 1)


def setting_options(*names: str, config_class: type[StageConfig] = RunConfig) -> Callable[[F], F]:
    """Add one option per named setting, or per setting of a run; options that are not passed are None."""

    def decorate(function: F) -> F:
        for name in reversed(names or _all_names()):
            function = _option(name, config_class.model_fields[name])(function)
        return function

    return decorate


def passed(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the settings whose flags were passed."""
    return {name: value for name, value in flags.items() if value is not None and value != ()}


threads_option = click.option("--threads", type=click.IntRange(1), metavar="N",
                              help="Maximum number of CPU threads. [default: chosen by the libraries]")  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print all results as JSON.")
pickle_option = click.option("--trust-pickle", is_flag=True,
                             help="Load a pickled head that others wrote; it can run arbitrary code.")  # fmt: skip


def output_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add -q and -v, and run the command inside `console_output`."""

    @click.option("-q", "--quiet", is_flag=True, help="Print only warnings and results.")
    @click.option("-v", "--verbose", is_flag=True, help="Print debug messages.")
    @wraps(function)
    def command(*, quiet: bool, verbose: bool, **arguments: Any) -> None:
        from setfit_kd.cli.output import console_output

        with console_output(quiet=quiet, verbose=verbose):
            function(**arguments)

    return command


def _all_names() -> list[str]:
    shared = list(StageConfig.model_fields)
    stages = (DataConfig, AugmentConfig, TeacherConfig, SignalsConfig, StudentConfig)
    stage_names = [name for stage in stages for name in stage.model_fields]
    run_names = [name for name in RunConfig.model_fields if name not in stage_names]
    ordered = [*DataConfig.model_fields, "teacher", "student", *stage_names, *run_names]
    return list(dict.fromkeys([name for name in ordered if name not in shared] + shared))


def _option(name: str, field: FieldInfo) -> Callable[[F], F]:
    flag = "--" + name.replace("_", "-")
    kind = _base_type(field.annotation)
    text = field.description or ""
    if field.default is not None and field.default is not PydanticUndefined:
        text = f"{text} [default: {_default_text(field.default)}]"
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, is_flag=True, default=None, help=text)
    if get_origin(kind) is Literal:
        parameter_type: Any = click.Choice(get_args(kind))
    elif kind in (int, float):
        parameter_type = kind
    else:
        parameter_type = str
    metavar = None if isinstance(parameter_type, click.Choice) else _METAVARS.get(name, _METAVARS.get(kind, "TEXT"))
    repeated = name in _REPEATED
    return click.option(flag, name, type=parameter_type, default=None, metavar=metavar, help=text, multiple=repeated)


def _default_text(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(default) if isinstance(default, tuple) else str(default)


_REPEATED = frozenset({"teacher", "student"})
"""Settings with several values, whose option may be repeated."""

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


def _base_type(annotation: Any) -> Any:
    """Return the type of a setting without ``| None`` and validators; str if several types remain."""
    if get_origin(annotation) is Annotated:
        return _base_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [part for part in get_args(annotation) if part is not type(None)]
        return _base_type(kinds[0]) if len(kinds) == 1 else str
    return annotation
