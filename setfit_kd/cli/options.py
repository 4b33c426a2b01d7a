"""Command-line options created from the configs, so that each flag, its type and its help are defined once."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from setfit_kd.config.base import StageConfig
from setfit_kd.config.run import RunConfig

F = TypeVar("F", bound=Callable[..., Any])
Groups = Mapping[str, Sequence[str]]


class GroupedCommand(click.Command):
    """Command whose options have headings: the ``common`` ones in ``--help``, all ``groups`` in ``--help-all``.

    The last heading of both is "Run"; it may be left out of ``groups`` and gets all other options.
    """

    def __init__(self, *args: Any, common: Groups, groups: Groups, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.common, self.groups = common, groups
        show_all = click.Option(["--help-all"], is_flag=True, is_eager=True, expose_value=False,
                                callback=_show_all_options, help="Show all options and exit.")  # fmt: skip
        self.params.append(show_all)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; keep a copy of them for messages."""
        ctx.meta["arguments"] = list(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the common options, or all if ``--help-all`` is passed."""
        options = {param.name: param for param in self.get_params(ctx) if isinstance(param, click.Option)}
        groups, last = dict(self.common), list(options)[-2:]  # --help-all and --help
        if "all_options" in ctx.meta:
            grouped = {name for names in self.groups.values() for name in names}
            groups, last = dict(self.groups), [name for name in options if name not in grouped]
        groups["Run"] = [*groups.get("Run", ()), *last]
        for heading, names in groups.items():
            with formatter.section(heading):
                formatter.write_dl([record for name in names if (record := options[name].get_help_record(ctx))])


def _show_all_options(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["all_options"] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def own_settings(config_class: type[StageConfig]) -> list[str]:
    """Return the settings of a stage without those that all stages share."""
    return [name for name in config_class.model_fields if name not in StageConfig.model_fields]


class _Fraction(click.FloatRange):
    """Number between 0 and 1; rejects NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


FRACTION = _Fraction(0, 1)


def setting_options(*names: str, config_class: type[StageConfig] = RunConfig) -> Callable[[F], F]:
    """Add one option per named setting, by default all; options that are not passed are None."""

    def decorate(function: F) -> F:
        for name in reversed(names or list(config_class.model_fields)):
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


_METAVARS: dict[Any, str] = {
    **{int: "N", float: "X", Path: "FOLDER"},
    **dict.fromkeys(("labeled", "unlabeled", "validation", "eval", "texts", "nli", "sts"), "SOURCE"),
    **dict.fromkeys(("teacher", "student"), "MODEL"),
    **dict.fromkeys(("text_column", "pair_column", "label_columns"), "NAME[,NAME...]"),
    **dict.fromkeys(
        ("label_column", "first_column", "second_column", "score_column", "entailment", "contradiction"), "NAME"
    ),
    **{"device": "DEVICE", "vocab_file": "FILE"},
    **{"objective": "NAME[=X][,...]"},
}


def _option(name: str, field: FieldInfo) -> Callable[[F], F]:
    flag, kind = "--" + name.replace("_", "-"), _base_type(field.annotation)
    text, default = field.description or "", field.default
    if kind is bool:
        flag, default = f"{flag}/--no-{flag[2:]}", "on" if default else None if default is None else "off"
    if default is not None and default is not PydanticUndefined:
        text = f"{text} [default: {','.join(default) if isinstance(default, tuple) else default}]"
    if kind is bool:
        return click.option(flag, name, is_flag=True, default=None, help=text)
    if get_origin(kind) is Literal:
        return click.option(flag, name, type=click.Choice(get_args(kind)), default=None, help=text)
    metavar = _METAVARS.get(name, _METAVARS.get(kind, "TEXT"))
    multiple = name in ("teacher", "student", "eval") and get_origin(kind) is tuple
    kind = kind if kind in (int, float) else str
    return click.option(flag, name, type=kind, metavar=metavar, default=None, multiple=multiple, help=text)


def _base_type(annotation: Any) -> Any:
    """Return the type of a setting without ``| None`` and validators; str if several types remain."""
    if get_origin(annotation) is Annotated:
        return _base_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [part for part in get_args(annotation) if part is not type(None)]
        return _base_type(kinds[0]) if len(kinds) == 1 else str
    return annotation
