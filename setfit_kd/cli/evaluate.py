"""``setfit-kd evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from setfit_kd.cli.options import given, json_option, on_screen, pickle_option, setting_options
from setfit_kd.config import RunConfig
from setfit_kd.errors import ConfigError
from setfit_kd.utils.escape import json_text

if TYPE_CHECKING:
    from setfit_kd.evaluation import Abstaining


@click.command()
@click.argument("model", metavar="RUN_OR_MODEL")
@setting_options("eval", "text_column", "label_column", "device", "cpu_fallback", "encode_batch_size",
                 "target_accuracy")  # fmt: skip
@json_option
@pickle_option
@on_screen
def evaluate(model: str, as_json: bool, trust_pickle: bool, **flags: Any) -> None:
    """Measure a classifier on labeled texts: quality, size and speed."""
    from setfit_kd.cli.screen import say, show_evaluations, show_table
    from setfit_kd.data import encode_labels, read
    from setfit_kd.evaluation import evaluate as evaluate_model
    from setfit_kd.memory import remembering
    from setfit_kd.models import load

    config = RunConfig.of(**given(flags))
    if config.eval is None:
        raise ConfigError("No labeled texts are given.", hint="Name them by --eval.")
    with remembering(cpu_fallback=config.cpu_fallback):
        classifier = load(model, device=config.device, trust_pickle=trust_pickle)
        rows = read(config.eval, text_column=config.text_column, label_column=config.label_column, role="test")
        evaluation = evaluate_model(
            classifier, encode_labels(rows, classifier.labels), encode_batch_size=config.encode_batch_size
        )
        if as_json:
            told = evaluation.as_dict(target_accuracy=config.target_accuracy)
            say(json_text(told, indent=2))
            return
        show_evaluations({model: evaluation})
        say("")
        classes = [
            (name, f"{quality.precision:.1%}", f"{quality.recall:.1%}", f"{quality.f1:.1%}", quality.support)
            for name, quality in evaluation.quality.classes.items()
        ]
        show_table(("class", "precision", "recall", "F1", "texts"), classes)
        say("")
        calibration = evaluation.calibration
        say(f"Calibration error {calibration.ece:.1%}, Brier score {calibration.brier:.3f}.")
        if config.target_accuracy is not None:
            say(_told_of(evaluation.answering(config.target_accuracy), config.target_accuracy))


def _told_of(found: Abstaining | None, target: float) -> str:
    if found is None:
        return f"No threshold makes the answers {target:.1%} accurate."
    return (
        f"{target:.1%} accurate with --threshold {found.threshold:.9g}, which "
        f"{found.coverage:.1%} of the texts have; 95 % interval {found.low:.1%} to {found.high:.1%}."
    )
