"""``setfit-kd evaluate``."""

from __future__ import annotations

import json
from typing import Any

import click

from setfit_kd.cli.options import given, setting_options, verbosity_options
from setfit_kd.config import RunConfig
from setfit_kd.errors import ConfigError


@click.command()
@click.argument("model", metavar="RUN_OR_MODEL")
@setting_options("eval", "text_column", "label_column", "device", "cpu_fallback", "encode_batch_size")
@click.option("--json", "as_json", is_flag=True, help="Print everything measured as JSON.")
@click.option("--trust-pickle", is_flag=True, help="Load a pickled head of somebody else's; it may run any code.")
@verbosity_options
def evaluate(model: str, as_json: bool, trust_pickle: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
    """Measure a classifier on labeled texts: quality, size and speed."""
    from setfit_kd.cli.screen import evaluation_table, rows_table, screen, show
    from setfit_kd.data import encode_labels, read
    from setfit_kd.evaluation import evaluate as evaluate_model
    from setfit_kd.memory import remembering
    from setfit_kd.models import load

    config = RunConfig.of(**given(flags))
    if config.eval is None:
        raise ConfigError("No labeled texts are given.", hint="Name them by --eval.")
    with screen(quiet=quiet, verbose=verbose) as results, remembering(cpu_fallback=config.cpu_fallback):
        classifier = load(model, device=config.device, trust_pickle=trust_pickle)
        rows = read(config.eval, text_column=config.text_column, label_column=config.label_column, role="test")
        evaluation = evaluate_model(
            classifier, encode_labels(rows, classifier.labels), encode_batch_size=config.encode_batch_size
        )
        if as_json:
            click.echo(json.dumps(evaluation.as_dict(), indent=2, ensure_ascii=False))
            return
        show(results, evaluation_table({model: evaluation}))
        results.print()
        classes = [
            (name, f"{quality.precision:.1%}", f"{quality.recall:.1%}", f"{quality.f1:.1%}", quality.support)
            for name, quality in evaluation.quality.classes.items()
        ]
        show(results, rows_table(("class", "precision", "recall", "F1", "texts"), classes))
