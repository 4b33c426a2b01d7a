"""``setfit-kd evaluate``."""

from __future__ import annotations

import json

import click

from setfit_kd.cli.options import verbosity_options


@click.command()
@click.argument("model", metavar="RUN_OR_MODEL")
@click.option("--eval", "eval_source", required=True, metavar="SOURCE", help="Labeled texts: file, folder or hub name.")
@click.option("--text-column", default="text", metavar="NAME[,NAME...]", help="Text column. [text]")
@click.option("--label-column", default="label", metavar="NAME", help="Label column. [label]")
@click.option("--device", default="auto", metavar="DEVICE", help="auto, cuda, cuda:N, mps or cpu. [auto]")
@click.option("--encode-batch-size", type=click.IntRange(1), default=32, metavar="N",
              help="Texts encoded at once. [32]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print everything measured as JSON.")
@click.option("--trust-pickle", is_flag=True, help="Load a pickled head of somebody else's; it may run any code.")
@verbosity_options
def evaluate(
    model: str,
    eval_source: str,
    text_column: str,
    label_column: str,
    device: str,
    encode_batch_size: int,
    as_json: bool,
    trust_pickle: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Measure a classifier on labeled texts: quality, size and speed."""
    from setfit_kd.cli.screen import evaluation_table, rows_table, screen
    from setfit_kd.data import encode_labels, read
    from setfit_kd.evaluation import evaluate as evaluate_model
    from setfit_kd.models import load

    with screen(quiet=quiet, verbose=verbose) as results:
        classifier = load(model, device=device, trust_pickle=trust_pickle)
        columns = [column.strip() for column in text_column.split(",")]
        rows = read(eval_source, text_column=columns, label_column=label_column, role="test")
        evaluation = evaluate_model(
            classifier, encode_labels(rows, classifier.labels), encode_batch_size=encode_batch_size
        )
        if as_json:
            click.echo(json.dumps(evaluation.as_dict(), indent=2, ensure_ascii=False))
            return
        results.print(evaluation_table({model: evaluation}))
        results.print()
        classes = [
            (name, f"{quality.precision:.1%}", f"{quality.recall:.1%}", f"{quality.f1:.1%}", quality.support)
            for name, quality in evaluation.quality.classes.items()
        ]
        results.print(rows_table(("class", "precision", "recall", "F1", "texts"), classes))
