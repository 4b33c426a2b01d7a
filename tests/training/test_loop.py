"""Training of students and teachers: what they learn, reproducibility, prompts, errors, files and devices."""

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
from sklearn.linear_model import LogisticRegression
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
from setfit_kd.config.stages import StudentConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import ConfigError, DataError, TrainingError
from setfit_kd.finetune.train import finetune
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import embed, predict_proba
from setfit_kd.models.io import new_model
from setfit_kd.models.static import static_body
from setfit_kd.models.transformer import load_transformer
from setfit_kd.student.distil import student_steps
from setfit_kd.utils.console import quiet_libraries

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

    from setfit_kd.student.trainer import StudentTrainer

Floats = npt.NDArray[np.float32]

CPU = resolve_device("cpu")
OBJECTIVES = ["similarity", "pairs"]


def cosines(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    product: npt.NDArray[np.float64] = unit @ unit.T
    return product


def pairwise_cosines(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(n * (n - 1) / 2,) cosines of all pairs of different rows."""
    return cosines(rows)[np.triu_indices(len(rows), 1)]


def student_trainer(folder: Path, body: SentenceTransformer, n: int = POOL_SIZE) -> StudentTrainer:
    from setfit_kd.student.trainer import StudentTrainer

    model = new_model(body, LABEL_NAMES)
    return StudentTrainer(model, pool_signals(n), None, StudentConfig.of(**QUICK), CPU, str(folder))


# Students


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


@pytest.mark.parametrize(
    "settings",
    [{"objective": "similarity", "epochs": 8}, {"objective": "pairs", "epochs": 2, "num_iterations": 8}],
    ids=OBJECTIVES,
)
def test_student_learns_geometry_and_classes_of_the_teacher(
    settings: dict[str, Any], tiny_student: Path, tmp_path: Path
) -> None:
    signals = pool_signals()
    signals.save(tmp_path / "signals")
    student = train_student(TeacherSignals.load(tmp_path / "signals"), tiny_student, **{**QUICK, **settings})
    teacher = pairwise_cosines(np.asarray(signals.embeddings))
    before = pairwise_cosines(embed(load_body(tiny_student), signals.texts))
    after = pairwise_cosines(embed(student.model_body, signals.texts))
    assert after.std() > teacher.std() / 2
    assert np.mean((after - teacher) ** 2) < np.mean((before - teacher) ** 2) / 4
    assert np.corrcoef(after, teacher)[0, 1] > np.corrcoef(before, teacher)[0, 1] + 0.2

    assert tuple(student.labels) == LABEL_NAMES
    assert isinstance(student.model_head, LogisticRegression)
    probabilities = predict_proba(student, signals.texts)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (probabilities.argmax(axis=1) == signals.probabilities.argmax(axis=1)).mean() > 0.8
    assert len(student.loss_curve_) == student_steps(StudentConfig.of(**{**QUICK, **settings}), "setfit", POOL_SIZE)
    assert np.isfinite(student.loss_curve_).all()


@pytest.mark.parametrize(("remainder", "steps"), [(0, 2), (1, 2), (2, 3)])
def test_last_batch_of_one_text_is_dropped(
    student_body: SentenceTransformer, tmp_path: Path, remainder: int, steps: int
) -> None:
    n = 2 * BATCH_SIZE + remainder
    trainer = student_trainer(tmp_path, student_body, n)
    trainer.train_body()
    assert len(trainer.inner.losses) == steps == student_steps(trainer.config, "setfit", n)


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


def test_class_that_teacher_never_predicts_keeps_its_column(tiny_student: Path) -> None:
    signals = pool_signals()
    probabilities = signals.probabilities.copy()
    probabilities[:, 1] = 0
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    signals = TeacherSignals(signals.texts, probabilities, signals.label_names, signals.embeddings)
    predicted = predict_proba(train_student(signals, tiny_student, **QUICK), signals.texts)
    assert predicted.shape == (POOL_SIZE, 4)
    assert predicted[:, 1].max() < 0.2


def test_label_names_are_matched_to_teacher_classes(tiny_student: Path) -> None:
    texts, labels = texts_and_labels(16)
    rows = {"text": texts, "label": [LABEL_NAMES[label] for label in labels]}
    by_name, by_number = (
        train_student(pool_signals(), tiny_student, labeled=labeled, **QUICK) for labeled in (rows, few_labels())
    )
    np.testing.assert_array_equal(by_name.model_head.coef_, by_number.model_head.coef_)


# Teachers


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"teacher_steps": 12, "teacher_batch_size": 16}, id="in-batch"),
        pytest.param({"teacher_objective": "pairs", "num_iterations": 4}, id="pairs"),
    ],
)
def test_teacher_learns_labels(tiny_teacher: Path, settings: dict[str, Any]) -> None:
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

    signals = score(teacher, pool_signals().texts)
    assert signals.label_names == LABEL_NAMES
    np.testing.assert_allclose(np.asarray(signals.embeddings), embed(teacher.model_body, signals.texts), atol=1e-5)
    np.testing.assert_allclose(signals.probabilities, predict_proba(teacher, signals.texts), atol=1e-5)


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_depends_on_seed(tiny_teacher: Path, dropout: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setfit_kd.teacher.trainer.balanced_batches", lambda *_, **__: [list(range(8))] * 2)
    settings: dict[str, Any] = {"teacher_steps": 2, "teacher_learning_rate": 1e-3, "teacher_dropout": dropout}
    first, second = (
        train_teacher(few_labels(), tiny_teacher, device="cpu", precision="fp32", seed=seed, **settings)
        for seed in (1, 2)
    )
    assert equal_weights(weights(first), weights(second)) is not dropout


# Both

PROMPT = "bank shares: "


def make_body(kind: str, folder: Path, *, prompt: bool = False, include_prompt: bool = True) -> SentenceTransformer:
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
    signals, labeled = pool_signals(), few_labels()
    if kind.endswith("teacher"):
        labeled = LabeledSet([prefix + text for text in labeled.texts], labeled.labels, LABEL_NAMES)
        renamed = {f"teacher_{name}" if name in ("dropout", "learning_rate") else name: value
                   for name, value in settings.items()}  # fmt: skip
        pairs = {"teacher_objective": "pairs", "num_iterations": 1} if kind.startswith("pairs") else {}
        options = {"teacher_steps": 2, "teacher_batch_size": 8, "teacher_learning_rate": 1e-2, **pairs, **renamed}
        return train_teacher(labeled, body, **{"device": "cpu", "precision": "fp32", **options})
    if kind == "transformer":
        settings = {"device": "cpu", "precision": "fp32", "epochs": 1, "batch_size": 8, **settings}
        return finetune(labeled, body, validation=labeled, **settings)
    texts = [prefix + text for text in signals.texts]
    signals = TeacherSignals(texts, signals.probabilities, LABEL_NAMES, signals.embeddings)
    objective = {"objective": "pairs"} if kind.startswith("pairs") else {}
    return train_student(signals, body, **{**QUICK, **objective, **settings})


KINDS = pytest.mark.parametrize("kind", ["student", "pairs student", "teacher", "pairs teacher"])


@KINDS
def test_training_is_reproducible_by_seed(kind: str, tiny_student: Path) -> None:
    runs: list[SetFitModel] = []
    for seed in (1, 1, 2):
        random.seed(len(runs))
        torch.manual_seed(len(runs))
        runs.append(train(kind, load_body(tiny_student), seed=seed))
    assert equal_weights(weights(runs[0]), weights(runs[1]))
    np.testing.assert_array_equal(runs[0].model_head.coef_, runs[1].model_head.coef_)
    assert runs[0].loss_curve_ == runs[1].loss_curve_
    assert not equal_weights(weights(runs[0]), weights(runs[2]))


@KINDS
@pytest.mark.parametrize("dropout", [False, True])
def test_loaded_body_is_trained_in_place_with_or_without_dropout(
    kind: str, dropout: bool, student_body: SentenceTransformer
) -> None:
    before, modes = [parameter.clone() for parameter in student_body.parameters()], set()
    hook = student_body[0].register_forward_pre_hook(
        lambda module, _: modes.add((module.training, torch.is_grad_enabled()))
    )
    model = train(kind, student_body, dropout=dropout)
    hook.remove()
    assert modes == {(dropout, True), (False, False)}  # during training and while fitting the head
    assert model.model_body is student_body
    assert not equal_weights(before, list(student_body.parameters()))
    assert not any(module.training for module in student_body.modules())
    assert all(parameter.grad is None for parameter in student_body.parameters())
    assert student_body.device == CPU


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("student", {"patience": 9, "epochs": 3, "batch_size": 8}),
        ("pairs student", {"micro_batch_size": 4}),
        ("static student", {}),
        ("transformer student", {"objective": "soft-labels"}),
        ("teacher", {}),
        ("transformer teacher", {}),
    ],
)
def test_default_prompt_is_used_in_training(kind: str, settings: dict[str, Any], tiny_student: Path) -> None:
    prompted = train(kind, make_body(kind, tiny_student, prompt=True), **settings)
    prefixed = train(kind, make_body(kind, tiny_student), prefix=PROMPT, **settings)
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


# Errors


def test_pool_smaller_than_batch_raises_error(tiny_student: Path) -> None:
    with pytest.raises(DataError, match=r"one batch of 16 training texts, got 15[\s\S]*--batch-size 15"):
        train_student(pool_signals(15), tiny_student, **QUICK)


@pytest.mark.parametrize(
    ("labeled", "message"), [({"text": ["a"], "label": ["weather"]}, "'weather'"), ({"text": ["a"]}, "label")]
)
def test_invalid_labels_raise_error(tiny_student: Path, labeled: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_student(pool_signals(), tiny_student, labeled=labeled, **QUICK)


@pytest.mark.parametrize(
    "settings", [{"epochs": 0}, {"learning_rate": -1.0}, {"unknown": 1}, {"teacher_steps": 3}, {"device": "unknown"}]
)
def test_invalid_settings_raise_error(tiny_student: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        train_student(pool_signals(), tiny_student, **{**QUICK, **settings})


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 0, 0, 0], "label 'no', got 0"), ([0, 0, 0, 1], "label 'no', got 1")]
)
def test_too_few_labels_per_class_raise_error(tiny_teacher: Path, labels: list[int], message: str) -> None:
    labeled = LabeledSet(["a", "b", "c", "d"], np.array(labels), ("yes", "no"))
    with pytest.raises(DataError, match=message):
        train_teacher(labeled, tiny_teacher, device="cpu")


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
    body = make_body(kind, tiny_student)
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


# Temporary files, output and devices


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
@KINDS
def test_training_leaves_no_files_and_prints_nothing(
    kind: str, tiny_student: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(kind, load_body(tiny_student))
    assert capfd.readouterr() == ("", "")


def test_training_restores_the_verbosity_of_libraries(tiny_student: Path) -> None:
    import datasets
    import setfit
    import transformers

    logging: Any = transformers.utils.logging

    def verbosity() -> tuple[int, bool, bool]:
        bars = (logging.is_progress_bar_enabled(), datasets.is_progress_bar_enabled())
        return (setfit.logging.get_verbosity(), *bars)

    level, before = setfit.logging.get_verbosity(), (20, True, True)
    setfit.logging.set_verbosity_info()
    try:
        with quiet_libraries():
            with quiet_libraries():
                pass
            assert verbosity() == (30, False, False)
        assert verbosity() == before
        train("student", load_body(tiny_student))
        assert verbosity() == before
    finally:
        setfit.logging.set_verbosity(level)


def test_inner_trainer_uses_the_cpu(student_body: SentenceTransformer, tmp_path: Path) -> None:
    inner = student_trainer(tmp_path, student_body).inner
    assert inner.args.use_cpu
    assert inner.args.device == inner.model.device == CPU
    assert not inner.args.dataloader_pin_memory
