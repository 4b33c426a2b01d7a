"""Write docs/cli.md from the help of the commands and docs/api.md from the docstrings.

With --check, write nothing and fail if one of the files is out of date.
"""

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import click
from click.testing import CliRunner
from pydantic import BaseModel

from setfit_kd.cli import main
from setfit_kd.cli.options import GroupedCommand

SECTIONS = {
    "Runs": "distill RunConfig RunResult",
    "Steps": "train_teacher score teacher.scoring.refine_and_score TeacherSignals train_student",
    "Models": "load models.io.save_model evaluate runtime.classify.Classifier",
    "Transformers": "finetune.train.finetune config.stages.FinetuneConfig",
    "Sentence encoders": "encoder.train.train_encoder config.encoder.EncoderConfig",
    "Question answering": "qa.data.read_questions qa.data.Question qa.train.train_questions qa.train.predict_answers "
    "qa.train.evaluate_answers qa.model.save_answerer qa.model.load_answerer config.questions.QuestionConfig "
    "runtime.answer.Answerer",
    "Masked language models": "mlm.run.pretrain config.mlm.PretrainConfig mlm.train.pretrain_body "
    "mlm.train.evaluate_mlm mlm.vocabulary.choose_words mlm.vocabulary.add_words",
    "Runs of these tasks": "run.task_run.run_task config.task_runs.QuestionRunConfig config.task_runs.MlmRunConfig",
    "Several processes": "distributed.ranks.use_ranks",
    "Many files": "scale.ray_engine.BatchClassifier",
    "Data": "data.sources.read data.labeled_set.LabeledSet data.labeled_set.encode_labels",
    "Losses": "losses.base.BatchLoss losses.similarity.SimilarityLoss losses.soft_labels.SoftLabelLoss "
    "losses.embedding.EmbeddingLoss losses.pairs.PairSimilarityLoss losses.contrastive.ContrastiveLoss "
    "losses.cross_entropy.CrossEntropyLoss losses.ranking.RankingLoss "
    "qa.loss.AnswerLoss mlm.loss.MaskedLanguageLoss",
}
SETTINGS = """Each setting is also an option of [`setfit-kd {0}`](cli.md#setfit-kd-{0}), which describes it:
`warmup_steps=50` is `--warmup-steps 50`, and `cpu_fallback=False` is `--no-cpu-fallback`."""
HEADING = re.compile(r"(?m)^(Args|Attributes|Returns|Yields|Raises|References|Inputs|Example):$")
ITEM = re.compile(r"(?m)^    ([*]{0,2}\w[\w, ]*): ")


def cli_reference() -> str:
    """Return the help of all commands as Markdown."""
    parts = ["# Command line", "Generated from the help of the commands by `make docs`."]
    for name in ["", *main.list_commands(click.Context(main))]:
        flag = "--help-all" if isinstance(main.commands.get(name), GroupedCommand) else "--help"
        result = CliRunner().invoke(main, [*name.split(), flag], prog_name="setfit-kd", terminal_width=100)
        parts += [f"## {f'setfit-kd {name}'.strip()}", f"```text\n{result.output.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def api_reference() -> str:
    """Return the documentation of the public names as Markdown."""
    parts = ["<!-- fmt: off -->", "# Python API", "Generated from the docstrings by `make docs`."]
    for title, paths in SECTIONS.items():
        parts += [f"## {title}", *map(entry, paths.split())]
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(parts)) + "\n"


def entry(path: str) -> str:
    """Document a name of the package, or a module and a name in it."""
    module, _, name = f"setfit_kd.{path}".rpartition(".")
    value = getattr(import_module(module), name)
    if inspect.isclass(value) and issubclass(value, BaseModel):
        commands = {"Finetune": "finetune", "QuestionConfig": "finetune", "Encoder": "encoder", "Pretrain": "pretrain"}
        command = next((command for part, command in commands.items() if part in name), "run")
        settings = SETTINGS.format(command)
        return f"### class {module}.{name}\n\n{docstring(value)}\n\n{settings}"
    parts = [f"### {'class ' * inspect.isclass(value)}{module}.{name}", signature(name, value), docstring(value)]
    for member, function in vars(value).items() if inspect.isclass(value) and "losses" not in module else ():
        if not member.startswith("_") and isinstance(function, property | classmethod | FunctionType):
            method = getattr(value, member)
            arguments = [] if isinstance(method, property) else [signature(f"{name}.{member}", method)]
            parts += [f"#### {name}.{member}", *arguments, docstring(method)]
    return "\n\n".join(parts)


def signature(name: str, function: Any) -> str:
    """Return a signature in a code block; a long one with one parameter per line."""
    value, parameters = inspect.signature(function), []
    for parameter in value.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        if parameter.name != "self":
            text = re.sub("<.*>", "...", re.sub(r": '(.*?)'", r": \1", str(parameter)))
            parameters.append(text.replace("'", '"'))
    returns = re.sub(r".*\)( -> )'?([^']*)'?", r"\1\2", str(value)).removesuffix(" -> None")
    line = re.sub(r"\bsetfit_kd(\.\w+)*\.", "", f"{name}({', '.join(parameters)}){returns}")
    if len(line) > 100:
        line = f"{name}(\n    {f',{chr(10)}    '.join(parameters)},\n){returns}"
    return f"```python\n{line}\n```"


def docstring(value: Any) -> str:
    """Convert a docstring in Google style to Markdown."""
    text = HEADING.sub(r"**\1**\n", inspect.getdoc(value) or "")
    text = ITEM.sub(lambda match: f"- `{match[1].replace(', ', '`, `')}`: ", text)
    text = re.sub(r"(?m)^    ", "", text).replace("``", "`").replace("  # doctest: +SKIP", "")
    return re.sub(r"(?ms)^(>>> .*?)(?=\n\n|\Z)", r"```pycon\n\1\n```", text)


if __name__ == "__main__":
    for file, text in {"cli.md": cli_reference(), "api.md": api_reference()}.items():
        target = Path(__file__).parent / file
        if "--check" not in sys.argv:
            target.write_text(text, encoding="utf-8")
        elif not target.is_file() or target.read_text(encoding="utf-8") != text:
            sys.exit(f"docs/{file} is out of date: run `make docs`.")
