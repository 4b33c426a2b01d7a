"""The loss against a naive formula, and training: gold answers, a teacher, a pool, memory and resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import log_softmax
from synthetic import raise_at_step
from synthetic_questions import QUICK, config, load_body, make_questions

from setfit_kd.errors import ConfigError, DataError, ModelError, OutOfMemoryError
from setfit_kd.models.token_model import TokenModel, check_same_tokens
from setfit_kd.qa.loss import AnswerLoss, answer_logits
from setfit_kd.qa.model import QuestionAnswerer
from setfit_kd.qa.train import _WindowDataset, evaluate_answers, predict_answers, train_questions
from setfit_kd.qa.windows import BodyWindows
from setfit_kd.student.kinds import create_token_body

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

QUESTIONS = make_questions(6, unanswerable=1)


@pytest.fixture
def body(tiny_student: Path) -> SentenceTransformer:
    return load_body(tiny_student)


@pytest.fixture
def teacher(tiny_teacher: Path) -> SentenceTransformer:
    """A random teacher whose logits differ between tokens."""
    body: Any = load_body(tiny_teacher, seed=1)
    with torch.no_grad():
        body[0].model.qa_outputs.weight.mul_(50)
    return body  # type: ignore[no-any-return]


def weights(body: SentenceTransformer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in body.state_dict().items()}


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def batch(body: SentenceTransformer, rows: list[int], questions: Any = QUESTIONS) -> dict[str, torch.Tensor]:
    (features,) = _WindowDataset(body, questions, config()).__getitems__(rows)["features"]
    return features  # type: ignore[no-any-return]


# Loss


def naive_loss(
    body: SentenceTransformer,
    teacher: SentenceTransformer | None,
    rows: list[int],
    t: float,
    alpha: float,
    questions: Any,
) -> float:
    """Compute the loss window by window, from logits of the tokens that can be chosen only."""
    losses = []
    for row in rows:
        features = batch(body, [row], questions)
        chosen = features["answer_mask"][0].nonzero()[:, 0]
        tokens = features["answer_tokens"][0].tolist()
        models = [body] if teacher is None else [body, teacher]
        with torch.no_grad():
            logits: list[npt.NDArray[Any]] = [answer_logits(m, features)[0][:, chosen].double().numpy() for m in models]
        terms = []
        for side, token in enumerate(tokens):
            place = chosen.tolist().index(max(token, 0))
            hard = -log_softmax(logits[0][side])[place]
            if teacher is None:
                terms.append(hard if token >= 0 else 0.0)
                continue
            target, student = (log_softmax(values[side] / t) for values in (logits[1], logits[0]))
            soft = t**2 * np.sum(np.exp(target) * (target - student))
            terms.append(alpha * hard + (1 - alpha) * soft if token >= 0 else soft)
        losses.append(np.mean(terms))
    return float(np.mean(losses))


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (3.0, 0.2), (0.5, 0.0), (2.0, 1.0), (None, None)])
def test_loss_and_gradient_are_those_of_the_formula_for_any_micro_batch_size(
    temperature: float | None, alpha: float | None, body: SentenceTransformer, teacher: SentenceTransformer
) -> None:
    questions = [*QUESTIONS, replace(QUESTIONS[0], answers=None)]
    rows = list(range(len(_WindowDataset(body, questions, config()))))
    live = None if temperature is None else teacher
    settings: dict[str, Any] = {} if temperature is None else {"temperature": temperature, "alpha": alpha}
    expected = naive_loss(body, live, rows, temperature or 1, alpha or 0, questions)
    gradients = []
    for micro_batch_size in (None, 1, 3):
        loss = AnswerLoss(body, teacher=live, micro_batch_size=micro_batch_size, **settings)
        body.zero_grad()
        value = loss([batch(body, rows, questions)], torch.zeros(len(rows)))
        value.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in body.parameters() if p.grad is not None]))
        assert value.item() == pytest.approx(expected, rel=1e-4)
        assert torch.allclose(gradients[0], gradients[-1], atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_teacher_is_not_trained_but_follows_the_device_of_the_student(body: Any, teacher: Any) -> None:
    loss = AnswerLoss(body, teacher=teacher)
    assert {id(parameter) for parameter in loss.parameters()} == {id(parameter) for parameter in body.parameters()}
    teacher.train()
    loss([batch(body, [0])], torch.zeros(1))
    assert not teacher.training


# Training


def test_training_fits_the_gold_answers(tiny_student: Path) -> None:
    body = load_body(tiny_student)
    before = evaluate_answers(QuestionAnswerer(body, config()), QUESTIONS)
    model = train_questions(body, QUESTIONS, config=config(epochs=40, learning_rate=5e-3))
    scores = evaluate_answers(QuestionAnswerer(body, model.config, 0.0), QUESTIONS)
    assert scores["f1"] > 0.95 > before["f1"]
    assert scores["noans_f1"] == 1
    assert model.model_body is body
    assert model.loss_curve_[-1] < 0.5 < model.loss_curve_[0]
    answers = predict_answers(QuestionAnswerer(body, model.config, 0.0), QUESTIONS)
    for question, answer in zip(QUESTIONS[:5], answers, strict=False):
        assert question.context[answer.start : answer.end] == answer.text
    assert answers[5][::2] == ("", None)


def test_student_learns_the_answers_of_the_teacher(tiny_teacher: Path) -> None:
    teacher = load_body(tiny_teacher)
    train_questions(teacher, QUESTIONS, config=config(epochs=30, learning_rate=5e-3))
    student = create_token_body("layers:0,2", "question-answering", teacher=teacher)
    unchanged = weights(teacher)
    pool = [replace(question, answers=(("wrong", 0),)) for question in QUESTIONS]  # the answers of a pool are not used
    options: Any = {"config": config(epochs=30, learning_rate=3e-3), "pool": pool, "teacher": teacher}
    train_questions(student, [], **options)
    assert evaluate_answers(QuestionAnswerer(student, config(), 0.0), QUESTIONS)["f1"] > 0.8
    assert distance(weights(teacher), unchanged) == 0


def test_windows_of_a_student_fit_the_teacher(body: Any, teacher: Any) -> None:
    teacher.max_seq_length = 32
    model = train_questions(body, QUESTIONS, teacher=teacher, config=config(stride=20))
    assert body.max_seq_length == 32
    assert BodyWindows(body, model.config).stride == 10


def test_interrupted_training_resumes_with_the_same_result(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {"config": config(epochs=3, checkpoint_seconds=1e-9), "checkpoints": tmp_path / "checkpoints"}
    expected, body = load_body(tiny_student), load_body(tiny_student)
    curve = train_questions(expected, QUESTIONS, config=config(epochs=3)).loss_curve_
    with monkeypatch.context() as patch:
        raise_at_step(patch, 4, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            train_questions(body, QUESTIONS, **options)
    resumed = train_questions(load_body(tiny_student), QUESTIONS, **options)
    assert resumed.loss_curve_ == pytest.approx(curve)
    assert distance(weights(resumed.model_body), weights(expected)) < 1e-6


def limit_memory(monkeypatch: pytest.MonkeyPatch, windows: int) -> list[int]:
    """Let forward passes of more than this number of windows run out of memory; return the sizes of the others."""
    sizes: list[int] = []
    forward = TokenModel.forward

    def limited(self: Any, features: dict[str, Any], **options: Any) -> Any:
        size = len(features["input_ids"])
        if size > windows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(size)
        return forward(self, features, **options)

    monkeypatch.setattr(TokenModel, "forward", limited)
    return sizes


def test_training_and_prediction_back_off_if_memory_runs_out(
    tiny_student: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, body = load_body(tiny_student), load_body(tiny_student)
    curve = train_questions(expected, QUESTIONS, config=config()).loss_curve_
    answers = predict_answers(QuestionAnswerer(expected, config()), QUESTIONS)
    sizes = limit_memory(monkeypatch, 1)
    assert train_questions(body, QUESTIONS, config=config()).loss_curve_ == pytest.approx(curve, rel=1e-4)
    assert distance(weights(body), weights(expected)) < 5e-4  # Adam enlarges rounding errors of small gradients
    backed_off = predict_answers(QuestionAnswerer(body, config(encode_batch_size=4)), QUESTIONS)
    assert [answer.text for answer in backed_off] == [answer.text for answer in answers]
    assert set(sizes) == {1}
    assert "out of memory" in caplog.text
    limit_memory(monkeypatch, 0)
    with pytest.raises(OutOfMemoryError):
        predict_answers(QuestionAnswerer(body, config()), QUESTIONS)


def test_long_contexts_are_trained_and_answered_in_windows(tiny_student: Path) -> None:
    short = make_questions(3)
    padding = " ".join(question.context for question in make_questions(4, first=20, characters=140))
    questions = [replace(q, context=f"{padding} {q.context}") for q in short]
    questions = [
        replace(q, answers=((text, start + len(padding) + 1),))
        for q, ((text, start),) in zip(questions, [q.answers or () for q in short], strict=True)
    ]
    body = load_body(tiny_student)
    windows = _WindowDataset(body, questions, config())
    assert len(windows) > 4 * len(questions)
    assert 0 < (windows.answer_tokens[:, 0] > 0).sum() < len(windows)
    train_questions(body, questions, config=config(epochs=30, learning_rate=5e-3, batch_size=8))
    answers = predict_answers(QuestionAnswerer(body, config()), questions)
    for question, answer in zip(questions, answers, strict=True):
        assert answer.text == question.context[answer.start : answer.end]
    assert evaluate_answers(QuestionAnswerer(body, config()), questions)["f1"] > 0.9


# Errors


def test_training_needs_gold_answers_or_a_teacher(body: SentenceTransformer, masked_lm: Path) -> None:
    from setfit_kd.models.token_model import load_token_model

    for questions, pool in (([], []), (QUESTIONS, QUESTIONS)):
        with pytest.raises(ConfigError, match="needs questions with answers"):
            train_questions(body, questions, pool=pool, config=config())
    with pytest.raises(DataError, match="Question 'q0' has no gold answers"):
        train_questions(body, [replace(QUESTIONS[0], answers=None)], config=config())
    with pytest.raises(ModelError, match="not for question answering"):
        train_questions(load_token_model(masked_lm, "fill-mask"), QUESTIONS, config=config())


def test_teacher_and_student_must_tokenize_alike(body: SentenceTransformer, teacher: SentenceTransformer) -> None:
    check_same_tokens(teacher, body, ["Ann won ."])
    teacher.tokenizer.add_tokens(["won"])
    difference = (
        r"tokenize 'Ann won \.' differently: the teacher's tokens are \[CLS\] .* won .*, the student's .*##n w "
    )
    with pytest.raises(ModelError, match=difference):
        check_same_tokens(teacher, body, ["Bob", "Ann won .", "won"])
    with pytest.raises(ModelError, match="differently"):
        train_questions(body, [replace(QUESTIONS[0], question="who won ?")], teacher=teacher, config=config())


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="stride: must be less than max_length, 64, got 64"):
        config(**{**QUICK, "stride": 64})
