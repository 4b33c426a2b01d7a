"""Fine-tune a transformer to answer questions, distil it into three of its layers, and export that as a bundle.

Run: python examples/question_answering.py train.json dev.json, with files in the format of SQuAD
"""

import sys
from typing import Any

from setfit_kd.config.questions import QuestionConfig
from setfit_kd.export.answers import export_answerer
from setfit_kd.qa.data import read_questions
from setfit_kd.qa.train import evaluate_answers, train_questions
from setfit_kd.runtime.answer import Answerer
from setfit_kd.student.kinds import create_token_body


def main(train: str, test: str, model: str = "demo:all-MiniLM-L6-v2", **settings: Any) -> float:
    questions, held_out = read_questions(train), read_questions(test, role="test")
    config = QuestionConfig.of(**settings)

    teacher = create_token_body(model, "question-answering")
    train_questions(teacher, questions, config=config)
    body = create_token_body("layers:3", "question-answering", teacher=teacher)
    student = train_questions(body, questions, config=config, teacher=teacher)  # pool=... adds unlabeled questions

    for name, trained in (("teacher", teacher), ("student", body)):
        scores = evaluate_answers(trained, held_out, config=config)
        print(f"{name}: exact match {scores['exact_match']:.1%}, F1 {scores['f1']:.1%}")
    export_answerer(student, "bundle", questions=questions, overwrite=True)
    print(Answerer("bundle")(held_out[0].question, held_out[0].context))  # needs no torch
    return scores["f1"]


if __name__ == "__main__":
    main(*sys.argv[1:])
