"""Methods of the comparison, each trained and evaluated in a separate process.

Run by compare.py as: python benchmarks/methods.py NAME CASE.json RESULT.json
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from setfit import DistillationTrainer, SetFitModel, Trainer, TrainingArguments
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline

from setfit_kd import RunConfig, TeacherSignals, load, train_student, train_teacher
from setfit_kd.augment.edits import drop_uncertain
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.evaluation.metrics import measure_calibration, measure_quality
from setfit_kd.models.bodies import load_body, locate_model
from setfit_kd.models.encode import embed, predict_proba
from setfit_kd.models.heads import head_at_temperature, head_thresholds, new_head
from setfit_kd.models.io import new_model, save_model
from setfit_kd.models.static import DEFAULT_DIMENSION
from setfit_kd.run.inputs import RunData, load_run_data
from setfit_kd.run.stage_cache import StageCache
from setfit_kd.run.stages import Stages
from setfit_kd.student.kinds import locate_student
from setfit_kd.tasks.classification import MULTI_LABEL, SINGLE_LABEL
from setfit_kd.teacher.cross_fitting import cross_fit
from setfit_kd.teacher.scoring import refine_and_score
from setfit_kd.training.precision import resolve_precision

MAX_PAIRS = 10_000


class Trained(NamedTuple):
    """Result of a method: a function of n texts that returns (n, n_classes) probabilities, and thresholds of labels.

    Without thresholds, a text of a multi-label task gets the labels with at least 0.5, or else the most probable one.
    """

    predict: Callable[[list[str]], npt.NDArray[np.floating]]
    thresholds: npt.NDArray[np.floating] | None = None


@dataclass(frozen=True)
class Case:
    """Data and settings shared by all methods.

    Attributes:
        labeled, unlabeled, eval: Data sources, as in `setfit_kd.distill`.
        seed: Seed of the samples and of every training.
        shots: Labels per class.
        pool_size: Number of unlabeled texts.
        pair_steps: Training steps of 16 pairs for students that train on pairs; 500 in SetFit's guide.
        threads: Threads per method.
        tests: Maximum number of test texts; None means all.
        teacher, student: Names of the bodies.
        device: Device of all methods: ``cpu`` or ``cuda``.
        artifacts: Folders for models and signals that later methods use, by method.
        precision: Precision of setfit-kd's trainings.
        model2vec: Interpreter of an environment with model2vec[distill,train].
        label_column: Column of the labels.
        label_separator: Separator of several labels of a text.
    """

    labeled: str
    unlabeled: str
    eval: str
    seed: int
    shots: int
    pool_size: int
    pair_steps: int
    threads: int
    tests: int | None
    teacher: str
    student: str
    device: str
    artifacts: dict[str, str]
    precision: str = "auto"
    model2vec: str | None = None
    label_column: str = "label"
    label_separator: str | None = None

    @property
    def config(self) -> RunConfig:
        """Settings of setfit-kd: the defaults."""
        return RunConfig.of(
            teacher=self.teacher,
            student=self.student,
            seed=self.seed,
            shots=self.shots,
            pool_size=self.pool_size,
            device=self.device,
            precision=self.precision,
            cache=False,
            label_column=self.label_column,
            label_separator=self.label_separator,
        )

    def data(self) -> RunData:
        """Load labels, pool and test texts."""
        return load_run_data(self.config, labeled=self.labeled, unlabeled=self.unlabeled, eval=self.eval)

    def body(self, name: str) -> SentenceTransformer:
        """Load a new body: ``teacher`` or ``student``."""
        teacher = load_body(locate_model(self.teacher))
        teacher.to(self.device)
        if name == "teacher":
            return teacher
        return locate_student(self.student).prepare(teacher).create_body(teacher, [], teacher.device)

    def folder(self, method: str) -> Path:
        """Return the folder of a method's model; its signals are in the subfolder ``signals``."""
        return Path(self.artifacts[method])

    def signals(self) -> TeacherSignals:
        """Load the signals of the refined teacher."""
        return TeacherSignals.load(self.folder("refined_teacher") / "signals")


def baseline_head(data: RunData, C: float = 1) -> Any:  # noqa: N803 - scikit-learn's name
    head = new_head(data.labeled.task)
    return head.set_params(**{"C" if data.labeled.task is SINGLE_LABEL else "estimator__C": C})


def tfidf(_: Case, data: RunData) -> Trained:
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), baseline_head(data, C=10))
    model.fit(data.labeled.texts, data.labeled.labels)
    return Trained(model.predict_proba)


def frozen(case: Case, data: RunData) -> Trained:
    body = case.body("teacher")
    head = baseline_head(data, C=10).fit(embed(body, data.labeled.texts), data.labeled.labels)
    return Trained(lambda texts: head.predict_proba(embed(body, texts)))


def model2vec(case: Case, data: RunData) -> Trained:
    """model2vec's classifier on the labels, trained by another interpreter, since it needs an older transformers."""
    assert case.model2vec is not None
    assert data.evaluation is not None
    names, labels = data.labeled.label_names, data.labeled.labels
    lists = [[names[i] for i in np.flatnonzero(row)] for row in labels] if labels.ndim == 2 else None
    inputs: dict[str, Any] = {"texts": data.labeled.texts, "labels": lists or [names[label] for label in labels]}
    inputs |= {"body": str(locate_model(case.teacher)), "tests": data.evaluation.texts, "seed": case.seed}
    with tempfile.NamedTemporaryFile("w+", suffix=".json", encoding="utf-8") as file:
        json.dump(inputs, file)
        file.flush()
        command = [case.model2vec, str(Path(__file__).parent / "model2vec_recipe.py"), file.name]
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(command, check=True, env=variables)
        outputs = json.loads(Path(file.name).read_text(encoding="utf-8"))
    columns = [outputs["classes"].index(name) for name in names]
    row_of = {text: np.array(row)[columns] for text, row in zip(inputs["tests"], outputs["probabilities"], strict=True)}
    return Trained(lambda texts: np.array([row_of[text] for text in texts]))


def stock_arguments(case: Case, output_dir: str, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=output_dir,
        batch_size=16,
        num_epochs=1,
        seed=case.seed,
        show_progress_bar=False,
        report_to="none",
        save_strategy="no",
        **settings,
    )


def stock_teacher(case: Case, data: RunData, **sampling: Any) -> Trained:
    model = new_model(case.body("teacher"), data.labeled.label_names, data.labeled.task).to(case.device)
    model.model_head = baseline_head(data)
    dataset = Dataset.from_dict({"text": data.labeled.texts, "label": data.labeled.labels.astype(int).tolist()})
    with tempfile.TemporaryDirectory() as folder:
        arguments = stock_arguments(case, folder, **(sampling or {"num_iterations": 20}))
        Trainer(model, arguments, train_dataset=dataset, metric=lambda *_: {"accuracy": 0.0}).train()
    return trained(model)


def unique_teacher(case: Case, data: RunData) -> Trained | None:
    """SetFit's teacher on every pair once, if there are not too many."""
    n = len(data.labeled)
    return None if n * (n - 1) / 2 > MAX_PAIRS else stock_teacher(case, data, sampling_strategy="unique")


def teacher(case: Case, data: RunData) -> Trained:
    model = train_teacher(data.labeled, case.body("teacher"), config=case.config)
    predictions = cross_fit(data.labeled, partial(case.body, "teacher"), config=case.config)
    model.model_head = head_at_temperature(model.model_head, predictions.temperature)
    save_model(model, case.folder("teacher"))
    return trained(model)


def refined_teacher(case: Case, data: RunData) -> Trained:
    model = load(case.folder("teacher"), device=case.device)
    config, n = case.config, len(data.pool)
    augmented = Stages(config, data, StageCache(None)).augment(None)
    refined, signals = refine_and_score(model, data.labeled, data.pool, augmented=augmented, config=config)
    signals = drop_uncertain(signals, range(n, n + len(augmented)), min_confidence=config.augment_confidence)
    save_model(refined, case.folder("refined_teacher"))
    signals.save(case.folder("refined_teacher") / "signals")
    return trained(refined)


def labels_alone(case: Case, data: RunData) -> Trained:
    return trained(train_teacher(data.labeled, case.body("student"), config=case.config))


def stock_student(case: Case, data: RunData) -> Trained:
    refined = load(case.folder("refined_teacher"), device=case.device)
    model = new_model(case.body("student"), data.labeled.label_names, data.labeled.task).to(case.device)
    model.model_head = baseline_head(data)
    with tempfile.TemporaryDirectory() as folder:
        DistillationTrainer(
            teacher_model=refined,
            student_model=model,
            args=stock_arguments(case, folder, max_steps=case.pair_steps),
            train_dataset=Dataset.from_dict({"text": case.signals().texts}),
            metric=lambda *_: {"accuracy": 0.0},
        ).train()
    return trained(model)


def pairs_student(case: Case, data: RunData) -> Trained:
    signals = case.signals()
    num_iterations = max(1, -(-case.pair_steps * 16 // len(signals)))
    config = case.config.model_copy(  # SetFit's settings
        update={
            "objective": "pairs",
            "batch_size": 16,
            "num_iterations": num_iterations,
            "epochs": 1,
            "learning_rate": 2e-5,
            "precision": "fp32",
            "freeze_embeddings": False,
        }
    )
    return trained(train_student(signals, case.body("student"), labeled=data.labeled, config=config))


def student(case: Case, data: RunData) -> Trained:
    return trained(train_student(case.signals(), case.body("student"), labeled=data.labeled, config=case.config))


def static_student(case: Case, data: RunData) -> Trained:
    refined = load(case.folder("refined_teacher"), device=case.device).model_body
    dimension = min(DEFAULT_DIMENSION, refined.get_embedding_dimension() or DEFAULT_DIMENSION)
    prepared = locate_student(f"static:{dimension}").prepare(case.body("teacher"))
    body = prepared.create_body(refined, data.pool, refined.device)
    return trained(train_student(case.signals(), body, labeled=data.labeled, config=case.config))


def trained(model: SetFitModel) -> Trained:
    return Trained(partial(predict_proba, model), head_thresholds(model.model_head))


METHODS: dict[str, Callable[[Case, RunData], Trained | None]] = {
    method.__name__: method
    for method in (
        tfidf,
        frozen,
        model2vec,
        stock_teacher,
        unique_teacher,
        teacher,
        refined_teacher,
        labels_alone,
        stock_student,
        pairs_student,
        student,
        static_student,
    )
}
"""Training functions by name, in order: later methods use artifacts of earlier ones."""
PROBED_PRECISION = ("teacher", "labels_alone", "student", "static_student")
"""Methods that train in the precision that a probe finds fastest; the others train in fp32 or not at all."""


class PassCounter:
    """Counter of the texts in all forward passes, with and without gradients."""

    def __init__(self) -> None:
        self.training = self.encoding = 0
        original = SentenceTransformer.forward

        def forward(body: Any, features: dict[str, Any], **kwargs: Any) -> Any:
            n = next(len(value) for value in features.values() if isinstance(value, torch.Tensor))
            if torch.is_grad_enabled():
                self.training += n
            else:
                self.encoding += n
            return original(body, features, **kwargs)

        SentenceTransformer.forward = forward  # type: ignore[method-assign, assignment]


def cpu_time() -> float:
    """Return the CPU seconds of this process and of those it has started."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def run_method(name: str, case: Case) -> dict[str, Any]:
    """Train and evaluate one method."""
    data = case.data()
    tests = data.evaluation
    assert isinstance(tests, LabeledSet)
    if case.tests is not None and len(tests) > case.tests:
        tests = tests.take(np.sort(np.random.default_rng(0).permutation(len(tests))[: case.tests]))
    probed = resolve_precision("auto", case.body("student"), data.pool)
    case = replace(case, precision=probed.name)
    passes = PassCounter()
    started, cpu_started = time.perf_counter(), cpu_time()
    result = METHODS[name](case, data)
    if result is None:
        return {}
    seconds, cpu_seconds = time.perf_counter() - started, cpu_time() - cpu_started
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    counts = {"training_passes": passes.training, "encoding_passes": passes.encoding}
    probabilities = np.asarray(result.predict(tests.texts))
    predicted = tests.task.decide(probabilities, result.thresholds)
    if tests.task is MULTI_LABEL and result.thresholds is None:
        predicted |= probabilities == probabilities.max(axis=1, keepdims=True)
    quality = measure_quality(predicted, tests.labels, tests.label_names, probabilities=probabilities)
    others = {"micro_f1": quality.micro_f1, "average_precision": quality.average_precision}
    return {
        "accuracy": quality.accuracy,
        "macro_f1": quality.macro_f1,
        **({} if quality.micro_f1 is None else others),
        "ece": measure_calibration(probabilities, tests.labels).ece,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_mb": round(peak),
        **counts,
        "precision": probed.name if name in PROBED_PRECISION else "fp32",
        "tests": len(tests),
    }


if __name__ == "__main__":
    method_name, case_file, result_file = sys.argv[1:]
    result = run_method(method_name, Case(**json.loads(Path(case_file).read_text())))
    Path(result_file).write_text(json.dumps(result, indent=2) + "\n")
