"""``setfit-kd finetune``."""

from __future__ import annotations

import shlex
from typing import Any

import click

from setfit_kd.cli import questions
from setfit_kd.cli.options import GroupedCommand, json_option, output_options, own_settings, passed, setting_options
from setfit_kd.config.questions import QuestionFinetuneConfig
from setfit_kd.config.run import FinetuneRunConfig
from setfit_kd.config.stages import ColumnsConfig
from setfit_kd.utils.console import json_text

_COMMON = {
    "Data": ("labeled", "validation", "eval", "text_column", "pair_column", "label_column", "label_separator"),
    "Training": ("epochs", "batch_size", "micro_batch_size", "learning_rate", "max_length", "patience", "metric"),
    "Output": ("output_dir", "overwrite"),
    "Run": ("seed", "device"),
}
_GROUPS = {
    **_COMMON,
    "Data": ("labeled", "validation", "eval", *own_settings(ColumnsConfig)),
    "Training": ("epochs", "steps", "batch_size", "micro_batch_size", "learning_rate", "warmup_steps", "schedule",
                 "weight_decay", "dropout", "max_length", "eval_steps", "metric", "patience", "thresholds",
                 "precision", "gradient_checkpointing", "checkpoint_seconds"),
    "Run": ("seed", "device", "cpu_fallback", "encode_batch_size", "exact"),
}  # fmt: skip
_TASK = ("task", "stride", "max_answer_tokens")


@click.command(cls=GroupedCommand, common={"Task": ("task",), **_COMMON}, groups={"Task": _TASK, **_GROUPS})
@click.argument("model")
@click.option("--task", type=click.Choice(["classification", "qa"]), default="classification",
              help="Classification, or extractive question answering. [default: classification]")  # fmt: skip
@setting_options("stride", "max_answer_tokens", config_class=QuestionFinetuneConfig)
@setting_options(*(name for names in _GROUPS.values() for name in names), config_class=FinetuneRunConfig)
@json_option
@output_options
def finetune(task: str, as_json: bool, **flags: Any) -> None:
    """Fine-tune a transformer end to end on labels and save it in transformers format.

    MODEL is a hub name, a folder, or demo:all-MiniLM-L6-v2. SOURCE is as for `setfit-kd run`; a folder written by
    datasets' save_to_disk may be tokenized already. If a source has splits, --labeled uses train, --validation uses
    validation and --eval uses test.

    The checkpoint that is best on the validation texts is saved. With several labels per text, it is evaluated with the
    thresholds that fit these texts best, which are saved with it; without validation texts, they are 0.5 or the number
    in --thresholds. For batches that do not fit in memory, set --micro-batch-size below --batch-size. To resume an
    interrupted fine-tuning, start the same command again.

    With --task qa, sources hold questions: files in SQuAD's JSON format, or rows with question, context and answers.
    The validation questions choose the threshold for giving no answer. The defaults are --max-length 384 and
    --learning-rate 5e-5.
    """
    if task == "qa":
        questions.finetune(passed(flags), as_json=as_json)
        return
    config = FinetuneRunConfig.of(**passed(flags))

    from setfit_kd.cli.output import echo, show_table
    from setfit_kd.evaluation.measure import evaluation_table
    from setfit_kd.finetune.run import finetune_run

    result = finetune_run(config)
    if as_json:
        echo(json_text(result.metrics, indent=2))
        return
    evaluations = result.evaluations | ({"validation": result.validation} if result.validation else {})
    for set_name, evaluation in evaluations.items():
        name = f"{config.output_dir}{f' ({set_name})' if len(evaluations) > 1 or result.validation else ''}"
        show_table(*evaluation_table({name: evaluation}))
        echo("")
        show_table(("metric", "value"), [(name, f"{value:.1%}") for name, value in evaluation.quality.scores.items()])
        echo("")
    texts = '"..." "..."' if config.pair_column else '"..."'
    echo(f"To use it: setfit-kd predict {shlex.quote(str(config.output_dir))} {texts}")
