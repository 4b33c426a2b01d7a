"""Question answering: a teacher, a baseline with three of its model's layers, and a student with three of its own.

Run: python benchmarks/questions.py train.jsonl test.jsonl
"""

import sys
from typing import Any

import torch

from setfit_kd.config.questions import QuestionConfig
from setfit_kd.qa.data import read_questions
from setfit_kd.qa.model import QuestionAnswerer
from setfit_kd.qa.train import evaluate_answers, train_questions
from setfit_kd.student.kinds import create_token_body

MODEL = "demo:all-MiniLM-L6-v2"
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "precision": "bf16",
    "max_length": 256,
    "stride": 64,
    "batch_size": 8,
    "learning_rate": 2e-4,
}


def main(train: str, test: str) -> None:
    torch.set_num_threads(1)
    questions, held_out = read_questions(train), read_questions(test, role="test")
    teacher = None
    for name, student, epochs in (
        ("teacher", MODEL, 3),
        ("baseline", f"layers:3@{MODEL}", 4),
        ("student", "layers:3", 4),
    ):
        body = create_token_body(student, "question-answering", teacher=teacher)
        config = QuestionConfig.of(epochs=epochs, **SETTINGS)
        train_questions(body, questions, config=config, teacher=teacher if name == "student" else None)
        scores = evaluate_answers(QuestionAnswerer(body, config), held_out)
        print(f"{name}: exact match {scores['exact_match']:.1%}, F1 {scores['f1']:.1%}", flush=True)
        teacher = teacher or body


if __name__ == "__main__":
    main(*sys.argv[1:])
