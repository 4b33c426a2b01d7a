"""Distil a model that finds the answer to a question in a text.

Run: python examples/question_answering.py train.json dev.json, with files in the format of SQuAD
"""

import sys
from pathlib import Path
from typing import Any

from setfit_kd.config.task_runs import QuestionRunConfig
from setfit_kd.qa.data import Question
from setfit_kd.qa.train import predict_answers
from setfit_kd.run.task_run import run_task


def main(labeled: str, evaluation: str, folder: str | Path = "runs/questions", **settings: Any) -> None:
    options: dict[str, Any] = {"teacher": "demo:all-MiniLM-L6-v2", "student": "layers:0,2,5", **settings}
    config = QuestionRunConfig.of(labeled=labeled, eval=evaluation, output_dir=folder, **options)
    result = run_task(config)
    for model, metrics in result.metrics.items():
        print(f"{model}: exact match {metrics['exact_match']:.1%}, F1 {metrics['f1']:.1%}")
    question = Question("1", "Who won?", "The islanders won the final by 2 to 1.")
    (answer,) = predict_answers(result.student, [question])
    print(f"{answer.text!r} with probability {answer.score:.2f}; the student is in {folder}/student")


if __name__ == "__main__":
    main(*sys.argv[1:])
