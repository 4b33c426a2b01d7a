"""``setfit-kd evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from setfit_kd.cli.options import json_option, output_options, passed, pickle_option, setting_options
from setfit_kd.config.run import RunConfig
from setfit_kd.errors import ConfigError
from setfit_kd.utils.escape import json_text

if TYPE_CHECKING:
    from setfit_kd.evaluation.calibration import OperatingPoint


@click.command()
@click.argument("model", metavar="RUN_OR_MODEL")
@setting_options("eval", "text_column", "label_column", "device", "cpu_fallback", "encode_batch_size",
                 "target_accuracy")  # fmt: skip
@json_option
@pickle_option
@output_options
def evaluate(model: str, as_json: bool, trust_pickle: bool, **flags: Any) -> None:
    """Evaluate a classifier on labeled texts: quality, size and speed."""
    from setfit_kd.cli.output import echo, show_evaluations, show_table
    from setfit_kd.data.labeled_set import encode_labels
    from setfit_kd.data.sources import read
    from setfit_kd.evaluation.measure import evaluate as evaluate_model
    from setfit_kd.memory.backoff import shared_backoff
    from setfit_kd.models.io import load

    config = RunConfig.of(**passed(flags))
    if config.eval is None:
        raise ConfigError("No evaluation texts specified.", hint="Pass labeled texts with --eval.")
    with shared_backoff(cpu_fallback=config.cpu_fallback):
        classifier = load(model, device=config.device, trust_pickle=trust_pickle)
        rows = read(config.eval, text_column=config.text_column, label_column=config.label_column, role="test")
        evaluation = evaluate_model(
            classifier, encode_labels(rows, classifier.labels), encode_batch_size=config.encode_batch_size
        )
        if as_json:
            echo(json_text(evaluation.as_dict(target_accuracy=config.target_accuracy), indent=2))
            return
        show_evaluations({model: evaluation})
        echo("")
        classes = [
            (name, f"{quality.precision:.1%}", f"{quality.recall:.1%}", f"{quality.f1:.1%}", quality.support)
            for name, quality in evaluation.quality.classes.items()
        ]
        show_table(("class", "precision", "recall", "F1", "texts"), classes)
        echo("")
        calibration = evaluation.calibration
        echo(f"Calibration error {calibration.ece:.1%}, Brier score {calibration.brier:.3f}.")
        if config.target_accuracy is not None:
            echo(_threshold_message(evaluation.operating_point(config.target_accuracy), config.target_accuracy))


def _threshold_message(point: OperatingPoint | None, target: float) -> str:
    if point is None:
        return f"No threshold reaches an accuracy of {target:.1%}."
    return (
        f"An accuracy of {target:.1%} needs --threshold {point.threshold:.9g}, which {point.coverage:.1%} of the texts "
        f"reach. 95% interval of the accuracy: {point.low:.1%} to {point.high:.1%}."
    )
