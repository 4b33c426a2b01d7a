"""``setfit-kd pretrain``."""

from __future__ import annotations

import shlex
from typing import Any

import click

from setfit_kd.cli.options import GroupedCommand, json_option, output_options, passed, setting_options
from setfit_kd.config.mlm import PretrainConfig
from setfit_kd.utils.console import json_text

_COMMON = {
    "Data": ("texts", "text_column", "eval"),
    "Vocabulary": ("add_vocab", "vocab_file"),
    "Distillation": ("teacher", "alpha", "temperature", "cosine_weight"),
    "Training": ("epochs", "steps", "batch_size", "micro_batch_size", "learning_rate", "max_length", "whole_words"),
    "Output": ("output_dir", "overwrite"),
    "Run": ("seed", "device"),
}
_GROUPS = {
    **_COMMON,
    "Training": ("epochs", "steps", "head_steps", "batch_size", "micro_batch_size", "learning_rate", "warmup_steps",
                 "schedule", "weight_decay", "dropout", "max_length", "pack", "mask_probability", "whole_words",
                 "precision", "gradient_checkpointing", "checkpoint_seconds"),
    "Run": ("seed", "device", "cpu_fallback", "encode_batch_size"),
}  # fmt: skip


@click.command(cls=GroupedCommand, common=_COMMON, groups=_GROUPS)
@click.argument("model")
@setting_options(*(name for names in _GROUPS.values() for name in names), config_class=PretrainConfig)
@json_option
@output_options
def pretrain(as_json: bool, **flags: Any) -> None:
    """Train a masked language model on texts, or distil it from another one, and save it in transformers format.

    MODEL is a hub name, a folder, demo:all-MiniLM-L6-v2, or blank:CONFIG for an untrained transformer; with --teacher
    also layers:0,2,4 or layers:3 for layers of the teacher. If it has no head that predicts masked tokens, one is
    trained first. The folder can be used as --teacher transformer:FOLDER, --student layers:3@FOLDER and --augment-model
    FOLDER of `setfit-kd run`.

    With --eval, whole words of the evaluation texts are masked before and after training; bits per character compares
    models with different vocabularies. To resume an interrupted training, start the same command again.
    """
    config = PretrainConfig.of(**passed(flags))

    from setfit_kd.cli.output import echo, show_table
    from setfit_kd.mlm.run import pretrain

    result = pretrain(config)
    if as_json:
        echo(json_text(result.metrics, indent=2))
        return
    figures = [
        (name, f"{metrics['bits_per_character']:.3f}", f"{metrics['perplexity']:.2f}")
        for name in ("before", "after", "teacher")
        if (metrics := result.metrics[name])
    ]
    if figures:
        show_table(("", "bits per character", "perplexity"), figures)
        echo("")
    folder = shlex.quote(str(config.output_dir))
    echo(f"To use it: setfit-kd run --teacher transformer:{folder} ...")
