"""Training loop: inputs of the losses, trained models, errors, temporary files, log output and devices."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from synthetic import (
    BATCH_SIZE,
    LABEL_NAMES,
    POOL_SIZE,
    QUICK,
    equal_weights,
    few_labels,
    pool_signals,
    texts_and_labels,
    weights,
)

from setfit_kd import TeacherSignals, score, train_student, train_teacher
from setfit_kd.config.stages import StudentConfig, TeacherConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import ConfigError, DataError, TrainingError
from setfit_kd.finetune.train import finetune
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import embed, predict_proba
from setfit_kd.models.io import new_model
from setfit_kd.models.static import static_body
from setfit_kd.models.transformer import load_transformer
from setfit_kd.training.loop import inner_trainer_options
from setfit_kd.utils.console import quiet_libraries

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

    from setfit_kd.student.trainer import StudentTrainer

Floats = npt.NDArray[np.float32]

CPU = resolve_device("cpu")
OBJECTIVES = ["similarity", "pairs"]
LEARNING: dict[str, dict[str, Any]] = {
    "similarity": {"objective": "similarity", "epochs": 8},
    "pairs": {"objective": "pairs", "epochs": 2, "num_iterations": 8},
}


def cosines(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    product: npt.NDArray[np.float64] = unit @ unit.T
    return product


def pairwise_cosines(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(n * (n - 1) / 2,) cosines of all pairs of different rows."""
    return cosines(rows)[np.triu_indices(len(rows), 1)]


def student_trainer(
    folder: Path, body: SentenceTransformer, signals: TeacherSignals, **settings: Any
) -> StudentTrainer:
    from setfit_kd.student.trainer import StudentTrainer

    config = StudentConfig.of(**{**QUICK, **settings})
    return StudentTrainer(new_model(body, LABEL_NAMES), signals, None, config, CPU, str(folder))


# Inputs of the losses


def test_similarity_targets_are_teacher_cosines(student_body: SentenceTransformer, tmp_path: Path) -> None:
    signals = pool_signals()
    trainer = student_trainer(tmp_path, student_body, signals, objective="similarity")
    dataset, module = trainer.get_dataset(signals.texts, None, trainer.args)
    loss: Any = module
    assert list(dataset["sentence"]) == signals.texts
    expected = cosines(np.asarray(signals.embeddings))
    labels = np.array(dataset["label"])
    for rows in (labels, labels[[5, 0, 31, 5]]):
        targets: torch.Tensor = loss.targets(torch.tensor(rows))
        np.testing.assert_allclose(targets.numpy(), expected[np.ix_(rows, rows)], atol=1e-6)
    assert np.std(loss.targets(torch.tensor(labels)).numpy()) > 0.2


def test_pair_targets_are_teacher_cosines(student_body: SentenceTransformer, tmp_path: Path) -> None:
    signals = pool_signals()
    trainer = student_trainer(tmp_path, student_body, signals, objective="pairs", num_iterations=5)
    dataset, _ = trainer.get_dataset(signals.texts, None, trainer.args)
    expected = cosines(np.asarray(signals.embeddings))
    row_of = {text: i for i, text in enumerate(signals.texts)}
    assert len(dataset) == 5 * POOL_SIZE
    for pair in dataset:
        left, right = row_of[pair["sentence_1"]], row_of[pair["sentence_2"]]
        assert left != right
        assert pair["label"] == pytest.approx(expected[left, right], abs=1e-5)
    assert np.std(dataset["label"]) > 0.2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_targets_reach_the_loss_in_training(
    student_body: SentenceTransformer, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from setfit_kd.losses.pairs import PairSimilarityLoss
    from setfit_kd.losses.similarity import SimilarityLoss

    signals = pool_signals()
    expected = cosines(np.asarray(signals.embeddings))
    texts = embed(student_body, signals.texts)
    seen: list[tuple[list[torch.Tensor], torch.Tensor]] = []
    for loss_class in (SimilarityLoss, PairSimilarityLoss):

        def record(
            self: Any, rows: list[torch.Tensor], labels: torch.Tensor, loss: Any = loss_class.compute_loss
        ) -> torch.Tensor:
            seen.append(([part.detach() for part in rows], labels))
            result: torch.Tensor = loss(self, rows, labels)
            return result

        monkeypatch.setattr(loss_class, "compute_loss", record)
    train_student(signals, student_body, **{**QUICK, "objective": objective, "learning_rate": 1e-30})

    assert seen
    for columns, labels in seen:
        rows = [np.linalg.norm(column.numpy()[:, None] - texts[None], axis=2).argmin(axis=1) for column in columns]
        if objective == "similarity":
            np.testing.assert_array_equal(rows[0], labels.numpy())
        else:
            np.testing.assert_allclose(labels.numpy(), expected[rows[0], rows[1]], atol=1e-5)


def test_setfit_distillation_dataset_has_constant_targets() -> None:
    """Check the reason for our own `get_dataset`."""
    from setfit.sampler import ContrastiveDistillationDataset

    signals = pool_signals()
    matrix = torch.tensor(cosines(np.asarray(signals.embeddings)))
    targets = [float(pair["label"]) for pair in ContrastiveDistillationDataset(signals.texts, matrix, num_iterations=5)]
    assert np.ptp(targets) < 1e-9, (
        "SetFit's distillation targets differ now: its own get_dataset may be sufficient, "
        "and the note on SetFit 1.2.0 in PairSimilarityLoss is out of date"
    )
    assert targets[0] == pytest.approx(1)


# Trained students


@pytest.fixture(scope="module")
def students(tiny_student: Path) -> dict[str, SetFitModel]:
    """Students trained with each objective, on signals loaded from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        pool_signals().save(Path(folder) / "signals")
        signals = TeacherSignals.load(Path(folder) / "signals")
    return {name: train_student(signals, tiny_student, **{**QUICK, **LEARNING[name]}) for name in OBJECTIVES}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_student_learns_geometry_of_teacher(
    students: dict[str, SetFitModel], student_body: SentenceTransformer, objective: str
) -> None:
    signals = pool_signals()
    teacher = pairwise_cosines(np.asarray(signals.embeddings))
    before = pairwise_cosines(embed(student_body, signals.texts))
    after = pairwise_cosines(embed(students[objective].model_body, signals.texts))
    assert after.std() > teacher.std() / 2
    assert np.mean((after - teacher) ** 2) < np.mean((before - teacher) ** 2) / 4
    assert np.corrcoef(after, teacher)[0, 1] > np.corrcoef(before, teacher)[0, 1] + 0.2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_student_classifies_into_teacher_classes(students: dict[str, SetFitModel], objective: str) -> None:
    from sklearn.linear_model import LogisticRegression

    student, signals = students[objective], pool_signals()
    assert tuple(student.labels) == LABEL_NAMES
    assert isinstance(student.model_head, LogisticRegression)
    probabilities = predict_proba(student, signals.texts)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (probabilities.argmax(axis=1) == signals.probabilities.argmax(axis=1)).mean() > 0.8


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_trained_body_is_in_evaluation_mode_without_gradients(students: dict[str, SetFitModel], objective: str) -> None:
    body = students[objective].model_body
    assert not any(module.training for module in body.modules())
    assert all(parameter.grad is None for parameter in body.parameters())
    assert body.device == CPU


def test_finish_training_resets_mode_and_gradients(student_body: SentenceTransformer, tmp_path: Path) -> None:
    from setfit_kd.training.loop import finish_training

    trainer = student_trainer(tmp_path, student_body, pool_signals())
    trainer.train_embeddings(trainer.signals.texts)
    student_body.train()
    for parameter in student_body.parameters():
        parameter.grad = torch.ones_like(parameter)
    finish_training(trainer, CPU)
    assert not any(module.training for module in student_body.modules())
    assert all(parameter.grad is None for parameter in student_body.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_student_is_reproducible_by_seed(tiny_student: Path, objective: str) -> None:
    signals = pool_signals()
    runs: list[tuple[list[torch.Tensor], Any]] = []
    for seed in (1, 1, 2):
        random.seed(len(runs))
        torch.manual_seed(len(runs))
        model = train_student(signals, tiny_student, **{**QUICK, "objective": objective, "seed": seed})
        runs.append((weights(model), model.model_head.coef_))
    assert equal_weights(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])
    assert not equal_weights(runs[0][0], runs[2][0])


@pytest.mark.parametrize(("remainder", "steps"), [(0, 2), (1, 2), (2, 3)])
def test_last_batch_of_one_text_is_dropped(
    student_body: SentenceTransformer, tmp_path: Path, remainder: int, steps: int
) -> None:
    from setfit_kd.student.steps import student_steps
    from setfit_kd.training.loop import step_losses

    signals = pool_signals(2 * BATCH_SIZE + remainder)
    trainer = student_trainer(tmp_path, student_body, signals)
    trainer.train_embeddings(signals.texts)
    losses = step_losses(trainer)
    assert len(losses) == steps == student_steps(trainer.config, len(signals))
    assert np.isfinite(losses).all()
    assert all(bool(parameter.isfinite().all()) for parameter in student_body.parameters())


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_setting_applies_to_training(
    student_body: SentenceTransformer, dropout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[bool] = []
    forward = torch.nn.Dropout.forward

    def record(self: torch.nn.Dropout, rows: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            modes.append(self.training)
        return forward(self, rows)

    monkeypatch.setattr(torch.nn.Dropout, "forward", record)
    student_settings: dict[str, Any] = {**QUICK, **({"dropout": True} if dropout else {})}
    teacher_settings: dict[str, Any] = {"teacher_steps": 1, **({"teacher_dropout": True} if dropout else {})}
    train_student(pool_signals(), student_body, **student_settings)
    assert set(modes) == {dropout}
    modes.clear()
    train_teacher(few_labels(), student_body, device="cpu", precision="fp32", **teacher_settings)
    assert set(modes) == {dropout}


# Head on soft and gold labels


def without_class(signals: TeacherSignals, label: int) -> TeacherSignals:
    probabilities = signals.probabilities.copy()
    probabilities[:, label] = 0
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return TeacherSignals(signals.texts, probabilities, signals.label_names, signals.embeddings)


def test_gold_weight_moves_predictions_towards_gold_labels(tiny_student: Path) -> None:
    signals, labeled = pool_signals(), few_labels()
    shifted = LabeledSet(labeled.texts, (labeled.labels + 1) % 4, LABEL_NAMES)
    with_gold = [
        predict_proba(train_student(signals, tiny_student, labeled=shifted, gold_weight=weight, **QUICK), shifted.texts)
        for weight in (0, 1, 50)
    ]
    without_gold = predict_proba(train_student(signals, tiny_student, **QUICK), shifted.texts)
    np.testing.assert_allclose(with_gold[0], without_gold, atol=1e-6)
    accuracies = [(probabilities.argmax(axis=1) == shifted.labels).mean() for probabilities in with_gold]
    assert accuracies[0] <= accuracies[1] <= accuracies[2]
    assert accuracies[0] < accuracies[2]


@pytest.mark.parametrize("label", [0, 1, 3])
def test_class_that_teacher_never_predicts_keeps_its_column(tiny_student: Path, label: int) -> None:
    signals = without_class(pool_signals(), label)
    student = train_student(signals, tiny_student, **QUICK)
    probabilities = predict_proba(student, signals.texts)
    assert probabilities.shape == (POOL_SIZE, 4)
    assert probabilities[:, label].max() < 0.2


def test_label_names_are_matched_to_teacher_classes(tiny_student: Path) -> None:
    texts, labels = texts_and_labels(16)
    rows = {"text": texts, "label": [LABEL_NAMES[label] for label in labels]}
    by_name, by_number = (
        train_student(pool_signals(), tiny_student, labeled=labeled, **QUICK) for labeled in (rows, few_labels())
    )
    np.testing.assert_array_equal(by_name.model_head.coef_, by_number.model_head.coef_)


# Errors


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_signals_without_embeddings_raise_error(tiny_student: Path, objective: str) -> None:
    signals = pool_signals()
    no_embeddings = TeacherSignals(signals.texts, signals.probabilities, LABEL_NAMES, origin="a rule")
    with pytest.raises(DataError, match="a rule have no embeddings"):
        train_student(no_embeddings, tiny_student, **{**QUICK, "objective": objective})


def test_pool_smaller_than_batch_raises_error(tiny_student: Path) -> None:
    with pytest.raises(DataError, match=r"one batch of 16 training texts, got 15[\s\S]*--batch-size 15"):
        train_student(pool_signals(15), tiny_student, **QUICK)


@pytest.mark.parametrize(
    ("labeled", "message"),
    [
        pytest.param(LabeledSet(["a"], np.array([0]), LABEL_NAMES[::-1]), "must be the teacher's", id="other order"),
        pytest.param(LabeledSet(["a"], np.array([0]), LABEL_NAMES[:2]), "must be the teacher's", id="fewer classes"),
        pytest.param({"text": ["a"], "label": ["weather"]}, "'weather'", id="unknown label"),
        pytest.param({"text": ["a"]}, "label", id="no labels"),
    ],
)
def test_labels_of_other_classes_raise_error(tiny_student: Path, labeled: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_student(pool_signals(), tiny_student, labeled=labeled, **QUICK)


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"learning_rate": -1.0}, {"unknown": 1}, {"teacher_steps": 3}])
def test_invalid_settings_raise_error(tiny_student: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        train_student(pool_signals(), tiny_student, **{**QUICK, **settings})


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 0, 0, 0], "label 'no', got 0"), ([0, 0, 0, 1], "label 'no', got 1")],
)
def test_too_few_labels_per_class_raise_error(tiny_teacher: Path, labels: list[int], message: str) -> None:
    labeled = LabeledSet(["a", "b", "c", "d"], np.array(labels), ("yes", "no"))
    with pytest.raises(DataError, match=message):
        train_teacher(labeled, tiny_teacher, device="cpu")


# Teacher


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"teacher_steps": 12, "teacher_batch_size": 16}, id="in-batch"),
        pytest.param({"teacher_objective": "pairs", "num_iterations": 4}, id="pairs"),
    ],
)
def test_teacher_learns_labels(tiny_teacher: Path, settings: dict[str, Any]) -> None:
    from sklearn.linear_model import LogisticRegression

    labeled = few_labels()
    same_class = (labeled.labels[:, None] == labeled.labels)[np.triu_indices(16, 1)]

    def contrast(body: SentenceTransformer) -> float:
        similarities = pairwise_cosines(embed(body, labeled.texts))
        return float(similarities[same_class].mean() - similarities[~same_class].mean())

    before = contrast(load_body(tiny_teacher))
    teacher = train_teacher(labeled, tiny_teacher, device="cpu", teacher_learning_rate=5e-3, **settings)
    assert contrast(teacher.model_body) > before + 0.2
    assert tuple(teacher.labels) == LABEL_NAMES
    assert isinstance(teacher.model_head, LogisticRegression)
    assert (predict_proba(teacher, labeled.texts).argmax(axis=1) == labeled.labels).mean() > 0.8
    assert not any(module.training for module in teacher.model_body.modules())
    assert all(parameter.grad is None for parameter in teacher.model_body.parameters())

    signals = score(teacher, pool_signals().texts)
    assert signals.label_names == LABEL_NAMES
    np.testing.assert_allclose(np.asarray(signals.embeddings), embed(teacher.model_body, signals.texts), atol=1e-5)
    np.testing.assert_allclose(signals.probabilities, predict_proba(teacher, signals.texts), atol=1e-5)


def test_teacher_is_reproducible_by_seed(tiny_teacher: Path) -> None:
    runs: list[list[torch.Tensor]] = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(runs))
        model = train_teacher(
            few_labels(), tiny_teacher, device="cpu", teacher_steps=2, teacher_batch_size=8, seed=seed
        )
        runs.append(weights(model))
    assert equal_weights(runs[0], runs[1])
    assert not equal_weights(runs[0], runs[2])


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("objective", ["in-batch", "pairs"])
def test_dropout_setting_applies_to_teacher_objectives(
    teacher_body: SentenceTransformer, objective: str, dropout: bool
) -> None:
    modes = set()
    hook = teacher_body[0].register_forward_pre_hook(
        lambda module, _: modes.add((module.training, torch.is_grad_enabled()))
    )
    settings: dict[str, Any] = {"teacher_steps": 2, "num_iterations": 1, "teacher_dropout": dropout}
    train_teacher(few_labels(), teacher_body, device="cpu", precision="fp32", teacher_objective=objective, **settings)
    hook.remove()
    assert modes == {(dropout, True), (False, False)}  # during training and while fitting the head


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_depends_on_seed(tiny_teacher: Path, dropout: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setfit_kd.losses.contrastive.balanced_batches", lambda *_, **__: [list(range(8))] * 2)
    settings: dict[str, Any] = {"teacher_steps": 2, "teacher_learning_rate": 1e-3, "teacher_dropout": dropout}
    first, second = (
        train_teacher(few_labels(), tiny_teacher, device="cpu", precision="fp32", seed=seed, **settings)
        for seed in (1, 2)
    )
    assert equal_weights(weights(first), weights(second)) is not dropout


def test_loaded_body_is_trained_in_place(teacher_body: SentenceTransformer) -> None:
    before = [parameter.clone() for parameter in teacher_body.parameters()]
    teacher = train_teacher(few_labels(), teacher_body, device="cpu", teacher_steps=2, teacher_batch_size=8)
    assert teacher.model_body is teacher_body
    assert not equal_weights(before, list(teacher_body.parameters()))


@pytest.mark.parametrize(
    "settings", [{"teacher_steps": 3, "teacher_batch_size": 8}, {"teacher_objective": "pairs", "num_iterations": 1}]
)
def test_number_of_steps_is_known_before_training(
    teacher_body: SentenceTransformer, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from setfit_kd.teacher.steps import teacher_steps
    from setfit_kd.teacher.trainer import TeacherTrainer
    from setfit_kd.training.loop import step_losses

    config, labeled = TeacherConfig.of(device="cpu", **settings), few_labels()
    trainer = TeacherTrainer(new_model(teacher_body, LABEL_NAMES), labeled, config, CPU, str(tmp_path))
    trainer.train_embeddings(labeled.texts, labeled.labels.tolist())
    assert len(step_losses(trainer)) == teacher_steps(config, labeled)


def test_scoring_no_texts_raises_error(students: dict[str, SetFitModel]) -> None:
    with pytest.raises(DataError, match="no texts"):
        score(students["pairs"], [])


# Bodies with a default prompt

PROMPT = "bank shares: "


def make_body(kind: str, folder: Path, *, prompt: bool, include_prompt: bool = True) -> SentenceTransformer:
    """Load a body for this kind of training, with the same weights each time."""
    body = load_transformer(folder, LABEL_NAMES) if kind.startswith("transformer") else load_body(folder)
    if kind == "static student":
        body = static_body(body, pool_signals().texts, dimension=8)
    if prompt:
        body.prompts, body.default_prompt_name = {"classify": PROMPT}, "classify"
        body.set_pooling_include_prompt(include_prompt)
    return body


def train(kind: str, body: SentenceTransformer, *, prefix: str = "", **settings: Any) -> SetFitModel:
    """Train a body on texts with a prefix."""
    if kind.endswith("teacher"):
        labeled = few_labels()
        labeled = LabeledSet([prefix + text for text in labeled.texts], labeled.labels, LABEL_NAMES)
        rate = settings.pop("learning_rate", 1e-2)
        teacher_settings = {
            "device": "cpu",
            "precision": "fp32",
            "teacher_steps": 2,
            "teacher_batch_size": 8,
            **settings,
        }
        return train_teacher(labeled, body, teacher_learning_rate=rate, **teacher_settings)
    if kind == "transformer":
        settings = {"device": "cpu", "precision": "fp32", "epochs": 1, "batch_size": 8, **settings}
        return finetune(few_labels(), body, validation=few_labels(), **settings)
    signals = pool_signals()
    texts = [prefix + text for text in signals.texts]
    signals = TeacherSignals(texts, signals.probabilities, LABEL_NAMES, signals.embeddings)
    return train_student(signals, body, **{**QUICK, "learning_rate": 1e-2, **settings})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("student", {"patience": 9, "epochs": 3, "batch_size": 8}),
        ("student", {"objective": "pairs", "micro_batch_size": 4}),
        ("static student", {}),
        ("transformer student", {"objective": "soft-labels"}),
        ("teacher", {}),
        ("transformer teacher", {}),
    ],
)
def test_default_prompt_is_used_in_training(kind: str, settings: dict[str, Any], tiny_student: Path) -> None:
    prompted = train(kind, make_body(kind, tiny_student, prompt=True), **settings)
    prefixed = train(kind, make_body(kind, tiny_student, prompt=False), prefix=PROMPT, **settings)
    assert equal_weights(weights(prompted), weights(prefixed))
    np.testing.assert_array_equal(prompted.model_head.coef_, prefixed.model_head.coef_)


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_prompt_excluded_from_pooling_is_excluded_in_training(
    kind: str, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from setfit_kd.losses.base import BatchLoss

    included, body = (
        make_body(kind, tiny_student, prompt=True, include_prompt=include_prompt) for include_prompt in (True, False)
    )
    texts = pool_signals().texts
    expected = embed(body, texts)
    seen: list[Floats] = []
    original_embed = BatchLoss.embed

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        rows = original_embed(*args, **kwargs)
        seen.append(rows.detach().numpy())
        return rows

    monkeypatch.setattr(BatchLoss, "embed", record)
    train(kind, body, learning_rate=1e-30)
    distances = np.linalg.norm(np.concatenate(seen)[:, None] - expected[None], axis=2)
    assert distances.min(axis=1).max() < 1e-4
    assert np.linalg.norm(embed(included, texts) - expected, axis=1).min() > 1e-2


# Divergence


LOSS, WEIGHTS = "the loss is nan", "the weights are not finite"


@pytest.mark.parametrize(
    ("kind", "settings", "step", "message"),
    [
        ("student", {}, 1, f"{LOSS} after step 2"),
        ("student", {}, 2, f"{WEIGHTS} after step 2"),
        ("student", {"patience": 9, "batch_size": 8}, 1, f"{WEIGHTS} after step 2"),  # in an evaluation step
        ("teacher", {"teacher_steps": 4}, 1, f"{LOSS} after step 2"),
        ("teacher", {"teacher_steps": 4}, 4, f"{WEIGHTS} after step 4"),
        ("transformer", {}, 1, f"{WEIGHTS} after step 2"),
    ],
)
def test_divergence_raises_error_and_restores_body(
    kind: str,
    settings: dict[str, Any],
    step: int,
    message: str,
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = make_body(kind, tiny_student, prompt=False)
    before = [value.clone() for value in body.state_dict().values()]
    original_step, steps = torch.optim.AdamW.step, 0

    def diverge(optimizer: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:  # the effect of an infinite gradient
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))
        return original_step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", diverge)
    with pytest.raises(TrainingError, match=f"ing.*: {message}") as raised:
        train(kind, body, **settings, checkpoints=tmp_path / "checkpoints", checkpoint_seconds=1e-9)
    assert "--learning-rate" in (raised.value.hint or "")
    assert raised.value.exit_code == 1
    assert equal_weights(before, list(body.state_dict().values()))
    assert not (tmp_path / "checkpoints").exists()


# Temporary files and output


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder for all temporary files, which must be empty after the test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))
    (tmp_path / "working-directory").mkdir()
    monkeypatch.chdir(tmp_path / "working-directory")
    yield folder
    assert list((tmp_path / "working-directory").iterdir()) == []
    assert [path.name for path in folder.iterdir()] == []


@pytest.mark.usefixtures("temporary_folder")
def test_student_training_leaves_no_files(tiny_student: Path) -> None:
    train_student(pool_signals(), tiny_student, **QUICK)


@pytest.mark.usefixtures("temporary_folder")
@pytest.mark.parametrize("objective", ["in-batch", "pairs"])
def test_teacher_training_leaves_no_files(tiny_teacher: Path, objective: str) -> None:
    settings: dict[str, Any] = {"teacher_objective": objective, "num_iterations": 1, "teacher_steps": 1}
    train_teacher(few_labels(), tiny_teacher, device="cpu", **settings)


@pytest.mark.usefixtures("temporary_folder")
def test_failed_training_leaves_no_files(tiny_student: Path) -> None:
    signals = pool_signals()
    no_embeddings = TeacherSignals(signals.texts, signals.probabilities, LABEL_NAMES)
    with pytest.raises(DataError):
        train_student(no_embeddings, tiny_student, **QUICK)


def test_training_prints_nothing(tiny_student: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_student(pool_signals(), tiny_student, **QUICK)
    train_teacher(few_labels(), tiny_student, device="cpu", teacher_steps=1)
    assert capfd.readouterr() == ("", "")


def verbosity_levels() -> tuple[Any, ...]:
    import datasets
    import setfit
    import transformers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    logging: Any = transformers.utils.logging
    return (
        setfit.logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        datasets.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )


@pytest.fixture
def verbose_libraries() -> Iterator[None]:
    """Turn on the log messages and progress bars of the libraries."""
    import datasets
    import setfit
    import transformers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logging: Any = transformers.utils.logging
    level, bars = setfit.logging.get_verbosity(), are_progress_bars_disabled()
    setfit.logging.set_verbosity_info()
    logging.enable_progress_bar()
    datasets.enable_progress_bars()
    enable_progress_bars()
    yield
    setfit.logging.set_verbosity(level)
    if bars:
        disable_progress_bars()


@pytest.mark.usefixtures("verbose_libraries")
def test_quiet_libraries_restores_verbosity(tiny_student: Path) -> None:
    before = verbosity_levels()
    with quiet_libraries():
        inside = verbosity_levels()
    assert inside == (30, False, False, True)
    assert verbosity_levels() == before
    train_student(pool_signals(), tiny_student, **QUICK)
    assert verbosity_levels() == before
    with pytest.raises(DataError):
        train_student(
            TeacherSignals(["a"] * BATCH_SIZE, np.full((BATCH_SIZE, 4), 0.25, np.float32), LABEL_NAMES),
            tiny_student,
            **QUICK,
        )
    assert verbosity_levels() == before


def test_quiet_libraries_can_be_nested() -> None:
    with quiet_libraries():
        inside = verbosity_levels()
        with quiet_libraries():
            pass
        assert verbosity_levels() == inside


# Devices


def test_inner_trainer_uses_the_cpu(student_body: SentenceTransformer, tmp_path: Path) -> None:
    inner = student_trainer(tmp_path, student_body, pool_signals()).st_trainer
    assert inner.args.use_cpu
    assert inner.args.device == CPU
    assert not inner.args.dataloader_pin_memory
    assert inner.model.device == CPU


def test_inner_trainer_options_restores_setfit_after_error() -> None:
    import setfit.trainer

    def fail() -> None:
        with inner_trainer_options(CPU):
            assert setfit.trainer.SentenceTransformerTrainingArguments is not original
            raise RuntimeError("failed inside")

    original = setfit.trainer.SentenceTransformerTrainingArguments
    with pytest.raises(RuntimeError, match="failed inside"):
        fail()
    assert setfit.trainer.SentenceTransformerTrainingArguments is original


def test_unknown_device_raises_error(tiny_student: Path) -> None:
    with pytest.raises(ConfigError, match="device"):
        train_student(pool_signals(), tiny_student, **{**QUICK, "device": "unknown"})
