"""``setfit-kd encoder``."""

from __future__ import annotations

import shlex
from typing import Any

import click

from setfit_kd.cli.options import GroupedCommand, json_option, output_options, passed, setting_options
from setfit_kd.config.encoder import EncoderRunConfig
from setfit_kd.utils.console import json_text

_COMMON = {
    "Data": ("nli", "teacher", "texts", "sts", "first_column", "second_column", "label_column", "score_column",
             "text_column", "entailment", "contradiction"),
    "Training": ("objective", "epochs", "batch_size", "micro_batch_size", "learning_rate", "max_length"),
    "Output": ("output_dir", "overwrite"),
    "Run": ("seed", "device"),
}  # fmt: skip
_GROUPS = {
    **_COMMON,
    "Training": (*_COMMON["Training"], "warmup_steps", "schedule", "weight_decay", "precision",
                 "gradient_checkpointing", "checkpoint_seconds"),
    "Run": ("seed", "device", "cpu_fallback", "encode_batch_size"),
}  # fmt: skip


@click.command(cls=GroupedCommand, common=_COMMON, groups=_GROUPS)
@click.argument("model")
@setting_options(*(name for names in _GROUPS.values() for name in names), config_class=EncoderRunConfig)
@json_option
@output_options
def encoder(as_json: bool, **flags: Any) -> None:
    """Train a sentence encoder on labeled sentence pairs or from a larger one, for use as a teacher or student.

    MODEL is a hub name, a folder, layers:0,2,5@NAME, static@NAME or blank:CONFIG; with --teacher, layers:0,2,5 are
    the teacher's. A transformers model without pooling gets mean pooling. Choose one of two trainings: --nli with
    pairs labeled entailment, contradiction or neutral, or --teacher with unlabeled --texts. SOURCE is as for
    `setfit-kd run`.

    --sts measures the Spearman correlation of cosines with scores before and after training. To resume an
    interrupted training, start the same command again.
    """
    config = EncoderRunConfig.of(**passed(flags))

    from setfit_kd.cli.output import echo, show_table
    from setfit_kd.encoder.run import encoder_run

    result = encoder_run(config)
    if as_json:
        echo(json_text(result.metrics, indent=2))
        return
    if config.sts is not None:
        figures = result.metrics["spearman"]
        show_table(("Spearman", *figures), [(config.sts, *(f"{value:.4f}" for value in figures.values()))])
        echo("")
    echo(f"To use it: setfit-kd run --student {shlex.quote(str(config.output_dir))} ...")
