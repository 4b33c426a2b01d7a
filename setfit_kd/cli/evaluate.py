"""``setfit-kd evaluate``."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import click

from setfit_kd.cli import questions
from setfit_kd.cli.options import json_option, output_options, own_settings, passed, pickle_option, setting_options
from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import ColumnsConfig
from setfit_kd.errors import ConfigError
from setfit_kd.utils.console import json_text


@click.command()
@click.argument("model", metavar="MODEL")
@setting_options("eval", *own_settings(ColumnsConfig), "device", "cpu_fallback", "encode_batch_size", "exact",
                 "target_accuracy")  # fmt: skip
@click.option("--label-names", metavar="NAME,NAME[,...]",
              help="Names of the model's labels in their order, if they are only numbered, as in LABEL_0.")  # fmt: skip
@json_option
@pickle_option
@output_options
def evaluate(model: str, label_names: str | None, as_json: bool, trust_pickle: bool, **flags: Any) -> None:
    """Evaluate a classifier on labeled texts: quality, size and speed.

    MODEL is a bundle, a run folder, one of its models, or a SetFit model or transformer classifier in a folder or on
    the hub. Without --eval, a run and its models are evaluated on the main evaluation texts of the run. A transformer
    that answers questions, or its bundle, is evaluated on the questions of --eval: exact match and F1 as in SQuAD.
    """
    from setfit_kd.cli.output import echo, show_table
    from setfit_kd.data.labeled_set import encode_labels
    from setfit_kd.data.sources import evaluation_sources, read
    from setfit_kd.evaluation.measure import class_table, evaluation_table, read_texts
    from setfit_kd.evaluation.measure import evaluate as evaluate_model
    from setfit_kd.inference.answerer import answerer_folder
    from setfit_kd.inference.classifier import TorchClassifier, open_classifier
    from setfit_kd.memory.backoff import shared_backoff
    from setfit_kd.tasks.classification import TASKS

    if answerer := answerer_folder(model):
        questions.evaluate(answerer, passed(flags), as_json=as_json)
        return
    config = RunConfig.of(**passed(flags))
    rows = {name: read(each, **config.columns, role="test") for name, each in evaluation_sources(config.eval).items()}
    if not rows:
        folder = _stored_texts(Path(model))
    with shared_backoff(cpu_fallback=config.cpu_fallback):
        batch_size = config.encode_batch_size
        classifier = open_classifier(model, device=config.device, batch_size=batch_size, trust_pickle=trust_pickle)
        if rows:
            used = {label for each in rows.values() for label in each.used_labels}
            classifier.labels = _label_names(model, classifier.labels, label_names, used)
        task = TASKS[classifier.task]
        encoded = {name: encode_labels(each, classifier.labels, task) for name, each in rows.items()}
        sets = encoded or {"": read_texts(folder)}
        evaluated: Any = classifier
        if isinstance(classifier, TorchClassifier):
            evaluated = classifier.model
            evaluated.labels = classifier.labels
        measure = partial(evaluate_model, evaluated, encode_batch_size=batch_size, exact=config.exact)
        evaluations = {
            name: measure(data, description=f"Evaluating on {name}" if name else "Evaluating")
            for name, data in sets.items()
        }
    if as_json:
        described = {name: {"eval": data.origin, "eval_texts": len(data)} for name, data in sets.items()}
        values = [described[k] | e.as_dict(target_accuracy=config.target_accuracy) for k, e in evaluations.items()]
        echo(json_text(dict(zip(sets, values, strict=True)) if len(sets) > 1 else values[0], indent=2))
        return
    for name, evaluation in evaluations.items():
        if name != next(iter(sets)):
            echo("")
        show_table(*evaluation_table({f"{model} ({name})" if len(sets) > 1 else model: evaluation}))
        echo("")
        show_table(*class_table(evaluation))
        quality, calibration = evaluation.quality, evaluation.calibration
        stored = "" if rows else f", stored in {folder}"
        echo(f"\n{len(sets[name]):,} evaluation texts: {sets[name].origin}{stored}.")
        if quality.sample_f1 is not None:
            echo(f"Average precision {quality.average_precision:.1%}, sample-F1 {quality.sample_f1:.1%}.")
        echo(f"Calibration error {calibration.ece:.1%}, Brier score {calibration.brier:.3f}.")
        if (target := config.target_accuracy) is None:
            continue
        if (point := evaluation.operating_point(target)) is None:
            echo(f"No threshold reaches an accuracy of {target:.1%}.")
        else:
            needed = f"--threshold {point.threshold:.9g}, which {point.coverage:.1%} of the texts reach"
            interval = f"95% interval of the accuracy: {point.low:.1%} to {point.high:.1%}"
            echo(f"An accuracy of {target:.1%} needs {needed}. {interval}.")


def _label_names(model: str, names: list[str], text: str | None, used: set[str]) -> list[str]:
    """Return the names of a model's labels; a comma-separated list replaces those that are only numbered."""
    is_numbered = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    if text is not None and not is_numbered:
        raise ConfigError(f"{model} already has label names: {', '.join(names)}.", hint="Remove --label-names.")
    if not is_numbered or (text is None and used <= set(names)):
        return names
    new_names = [name.strip() for name in (text or "").split(",")]
    if len(set(new_names)) != len(names) or "" in new_names:
        message = f"{model} has no label names, only {', '.join(names)}."
        raise ConfigError(message, hint=f"Pass its {len(names)} labels in this order, as in --label-names yes,no.")
    return new_names


def _stored_texts(model: Path) -> Path:
    """Return the folder with the evaluation texts of the run that a model belongs to."""
    from setfit_kd.models.io import classifier_folder
    from setfit_kd.run_folder.names import EVALUATION

    if not model.is_dir() and len(model.parts) != 2:  # no name on the hub
        classifier_folder(model)
    for run in (model, *model.parents[:2]) if model.is_dir() else ():
        if (run / EVALUATION / "texts.jsonl").is_file():
            return run / EVALUATION
    raise ConfigError(f"Found no evaluation texts in {model}.", hint="Pass labeled texts with --eval.")
