"""Training of students and teachers: what they learn, reproducibility, prompts, errors, files and devices."""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from synthetic import BATCH_SIZE, LABEL_NAMES, POOL_SIZE, QUICK, equal_weights, few_labels, pool_signals, weights

from setfit_kd import TeacherSignals, score, train_student, train_teacher
from setfit_kd.config.stages import StudentConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import ConfigError, DataError, TrainingError
from setfit_kd.finetune.train import finetune
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import embed, predict_proba
from setfit_kd.models.static import static_body
from setfit_kd.models.transformer import load_transformer
from setfit_kd.student.distil import student_steps
from setfit_kd.utils.console import quiet_libraries

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

Floats = npt.NDArray[np.float32]


def pairwise_cosines(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(n * (n - 1) / 2,) cosines of all pairs of different rows."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True).astype(np.float64)
    cosines: npt.NDArray[np.float64] = (unit @ unit.T)[np.triu_indices(len(rows), 1)]
    return cosines


# Students


@pytest.mark.parametrize(
    "settings",
    [{"objective": "similarity", "epochs": 8}, {"objective": "pairs", "epochs": 2, "num_iterations": 8}],
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
    probabilities = predict_proba(student, signals.texts)
    assert (probabilities.argmax(axis=1) == signals.probabilities.argmax(axis=1)).mean() > 0.8
    assert len(student.loss_curve_) == student_steps(StudentConfig.of(**{**QUICK, **settings}), "setfit", POOL_SIZE)
    assert np.isfinite(student.loss_curve_).all()


@pytest.mark.parametrize(("remainder", "steps"), [(1, 2), (2, 3)])
def test_last_batch_of_one_text_is_dropped(tiny_student: Path, remainder: int, steps: int) -> None:
    n = 2 * BATCH_SIZE + remainder
    student = train_student(pool_signals(n), tiny_student, **QUICK)
    assert len(student.loss_curve_) == steps == student_steps(StudentConfig.of(**QUICK), "setfit", n)


# Teachers


@pytest.mark.parametrize(
    "settings",
    [{"teacher_steps": 12, "teacher_batch_size": 16}, {"teacher_objective": "pairs", "num_iterations": 4}],
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
    assert (predict_proba(teacher, labeled.texts).argmax(axis=1) == labeled.labels).mean() > 0.8

    signals = score(teacher, pool_signals().texts)
    assert signals.label_names == LABEL_NAMES
    np.testing.assert_allclose(np.asarray(signals.embeddings), embed(teacher.model_body, signals.texts), atol=1e-5)
    np.testing.assert_allclose(signals.probabilities, predict_proba(teacher, signals.texts), atol=1e-5)


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
        for name in {"dropout", "learning_rate"} & settings.keys():
            settings[f"teacher_{name}"] = settings.pop(name)
        pairs = {"teacher_objective": "pairs", "num_iterations": 1} if kind.startswith("pairs") else {}
        options = {"teacher_steps": 2, "teacher_batch_size": 8, "teacher_learning_rate": 1e-2, **pairs, **settings}
        return train_teacher(labeled, body, **{"device": "cpu", "precision": "fp32", **options})
    if kind == "transformer":
        settings = {"device": "cpu", "precision": "fp32", "epochs": 1, "batch_size": 8, **settings}
        return finetune(labeled, body, validation=labeled, **settings)
    texts = [prefix + text for text in signals.texts]
    signals = TeacherSignals(texts, signals.probabilities, LABEL_NAMES, signals.embeddings)
    objective = {"objective": "pairs"} if kind.startswith("pairs") else {}
    return train_student(signals, body, **{**QUICK, **objective, **settings})


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use a folder for all temporary files; it and the working directory must be empty after the test."""
    temporary, working = tmp_path / "temporary", tmp_path / "working-directory"
    for folder in (temporary, working):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))
    monkeypatch.chdir(working)
    yield
    assert [*temporary.iterdir(), *working.iterdir()] == []


KINDS = pytest.mark.parametrize("kind", ["student", "pairs student", "teacher", "pairs teacher"])


@pytest.mark.usefixtures("temporary_folder")
@KINDS
def test_training_is_reproducible_by_seed_leaves_no_files_and_prints_nothing(
    kind: str, tiny_student: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs: list[SetFitModel] = []
    for seed in (1, 1, 2):
        random.seed(len(runs))
        torch.manual_seed(len(runs))
        runs.append(train(kind, load_body(tiny_student), seed=seed))
    assert equal_weights(weights(runs[0]), weights(runs[1]))
    np.testing.assert_array_equal(runs[0].model_head.coef_, runs[1].model_head.coef_)
    assert runs[0].loss_curve_ == runs[1].loss_curve_
    assert not equal_weights(weights(runs[0]), weights(runs[2]))
    assert capfd.readouterr() == ("", "")


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
    assert student_body.device.type == "cpu"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("student", {"patience": 9, "epochs": 3, "batch_size": 8}),
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

    included, body = (make_body(kind, tiny_student, prompt=True, include_prompt=value) for value in (True, False))
    texts, seen, original_embed = pool_signals().texts, list[Floats](), BatchLoss.embed
    expected = embed(body, texts)

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
    ("settings", "error", "message"),
    [
        ({"epochs": 0}, ConfigError, "epochs"),
        ({"teacher_steps": 3}, ConfigError, "teacher_steps"),
        ({"device": "unknown"}, ConfigError, "device"),
        ({"labeled": {"text": ["a"], "label": ["weather"]}}, DataError, "'weather'"),
    ],
)
def test_invalid_settings_and_labels_raise_error(tiny_student: Path, settings: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        train_student(pool_signals(), tiny_student, **{**QUICK, **settings})


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
    kind: str, settings: Any, step: int, message: str, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, checkpoints = make_body(kind, tiny_student), Path("checkpoints")
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
        train(kind, body, **settings, checkpoints=checkpoints, checkpoint_seconds=1e-9)
    assert "--learning-rate" in (raised.value.hint or "")
    assert raised.value.exit_code == 1
    assert equal_weights(before, list(body.state_dict().values()))
    assert not checkpoints.exists()


def test_training_restores_the_verbosity_of_libraries(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import setfit
    import transformers

    def verbosity() -> tuple[int, bool, bool]:
        bars: Any = transformers.utils.logging
        return setfit.logging.get_verbosity(), bars.is_progress_bar_enabled(), datasets.is_progress_bar_enabled()

    monkeypatch.setattr(logging.getLogger("setfit"), "level", logging.INFO)
    before = (logging.INFO, True, True)
    assert verbosity() == before
    with quiet_libraries():
        with quiet_libraries():
            pass
        assert verbosity() == (logging.WARNING, False, False)
    assert verbosity() == before
    train("student", load_body(tiny_student))
    assert verbosity() == before
