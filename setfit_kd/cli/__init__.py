"""Command line interface: each command parses options, calls the library and prints the result."""

from __future__ import annotations

import atexit
import gc
from typing import Any

import click

from setfit_kd import __version__
from setfit_kd.cli.benchmark import benchmark
from setfit_kd.cli.compare import compare
from setfit_kd.cli.doctor import doctor
from setfit_kd.cli.encoder import encoder
from setfit_kd.cli.evaluate import evaluate
from setfit_kd.cli.export import export
from setfit_kd.cli.finetune import finetune
from setfit_kd.cli.predict import predict
from setfit_kd.cli.pretrain import pretrain
from setfit_kd.cli.push import push
from setfit_kd.cli.report import report
from setfit_kd.cli.run import run
from setfit_kd.distributed.ranks import use_ranks
from setfit_kd.errors import ModelError, OutOfMemoryError, SetFitKDError, first_line, is_out_of_memory
from setfit_kd.utils.console import printable

atexit.register(gc.freeze)  # a last garbage collection would take a second if torch and transformers are loaded


class _Group(click.Group):
    """Command group that prints errors of setfit-kd in two lines and exits with their codes; 130 after an interrupt."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with use_ranks():
                return super().invoke(ctx)
        except SetFitKDError as raised:
            error = raised
        except click.ClickException as raised:
            raised.message = printable(raised.message)  # type: ignore[misc]
            raise
        except Exception as raised:
            if not is_out_of_memory(raised):
                raise
            message = f"Out of memory ({first_line(str(raised))})."
            error = OutOfMemoryError(message, hint="Use a smaller model or fewer texts.")
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)
        except BaseException as raised:
            if type(raised).__name__ != "PanicException":  # raised by the tokenizers library; not an Exception
                raise
            error = ModelError(f"The tokenizer failed: {raised}.", hint="Use another model.")
        click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(printable(error.message), err=True)
        if error.hint:
            click.echo(printable(error.hint), err=True)
        return ctx.exit(error.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="setfit-kd")
def main() -> None:
    """Distil a SetFit teacher, trained on a few labels, into a small and fast text classifier.

    Try `setfit-kd run --preset newswire --output-dir runs/newswire`, which works offline.
    """


for command in (run, finetune, pretrain, encoder, predict, evaluate, report, compare, export, push, benchmark, doctor):
    command.short_help = command.get_short_help_str(1_000)  # the whole first sentence
    main.add_command(command)
