"""The rows of the comparison, each trained and tested in a process of its own.

Run by compare.py as: python benchmarks/contestants.py NAME CASE.json RESULT.json
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from setfit import DistillationTrainer, SetFitModel, Trainer, TrainingArguments
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from setfit_kd import RunConfig, TeacherSignals, load, train_student, train_teacher
from setfit_kd.data import LabeledSet
from setfit_kd.evaluation import measure_quality
from setfit_kd.models import embed, load_body, locate, new_model, predict_proba, save_model
from setfit_kd.run.data import RunData, load_run_data
from setfit_kd.student import locate_student, student_body
from setfit_kd.teacher import refine_and_score
from setfit_kd.training.precision import resolve_precision

Predict = Callable[[list[str]], "np.ndarray[Any, np.dtype[np.int64]]"]


@dataclass(frozen=True)
class Case:
    """One draw of labels and pool: what all contestants share.

    Attributes:
        labeled, unlabeled, eval: Sources, as `setfit_kd.distill` takes them.
        seed: Of the draws and of every training.
        shots: Labels a class.
        pool_size: Unlabeled texts.
        pair_steps: Steps of 16 pairs of the students that train on pairs; SetFit's guide has 500.
        threads: That each row may use.
        tests: Most test texts; None is all.
        teacher, student: Bodies.
        work: Folder for what later contestants take from earlier ones.
        precision: Of our own trainings.
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
    work: str
    precision: str = "auto"

    @property
    def config(self) -> RunConfig:
        """Our own settings: the defaults."""
        return RunConfig.of(
            teacher=self.teacher,
            student=self.student,
            seed=self.seed,
            shots=self.shots,
            pool_size=self.pool_size,
            device="cpu",
            precision=self.precision,
            cache=False,
        )

    def data(self) -> RunData:
        """Labels, pool and test texts."""
        return load_run_data(self.config, labeled=self.labeled, unlabeled=self.unlabeled, eval=self.eval)

    def body(self, name: str) -> SentenceTransformer:
        """A fresh body: ``teacher`` or ``student``."""
        teacher = load_body(locate(self.teacher))
        return teacher if name == "teacher" else student_body(locate_student(self.student), teacher=teacher)

    def kept(self, name: str) -> Path:
        """A folder that a contestant leaves for later ones."""
        return Path(self.work) / name


def tfidf(_: Case, data: RunData) -> Predict:
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10))
    model.fit(data.labeled.texts, data.labeled.labels)
    return lambda texts: model.predict(texts)


def frozen(case: Case, data: RunData) -> Predict:
    body = case.body("teacher")
    head = LogisticRegression(C=10, max_iter=1000).fit(embed(body, data.labeled.texts), data.labeled.labels)
    return lambda texts: head.predict(embed(body, texts))


def stock_arguments(case: Case, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=f"{case.work}/scratch",
        batch_size=16,
        num_epochs=1,
        seed=case.seed,
        show_progress_bar=False,
        report_to="none",
        save_strategy="no",
        **settings,
    )


def stock_teacher(case: Case, data: RunData) -> Predict:
    model = new_model(case.body("teacher"), data.labeled.label_names).to("cpu")
    model.model_head = LogisticRegression()
    dataset = Dataset.from_dict({"text": data.labeled.texts, "label": data.labeled.labels.tolist()})
    trainer = Trainer(
        model, stock_arguments(case, num_iterations=20), train_dataset=dataset, metric=lambda *_: {"accuracy": 0.0}
    )
    trainer.train()
    return classes_of(model)


def teacher(case: Case, data: RunData) -> Predict:
    model = train_teacher(data.labeled, case.body("teacher"), config=case.config)
    save_model(model, case.kept("teacher"))
    return classes_of(model)


def refined_teacher(case: Case, data: RunData) -> Predict:
    model = load(case.kept("teacher"), device="cpu")
    refined, signals = refine_and_score(model, data.labeled, data.pool, config=case.config)
    save_model(refined, case.kept("refined"))
    signals.save(case.kept("signals"))
    return classes_of(refined)


def labels_alone(case: Case, data: RunData) -> Predict:
    return classes_of(train_teacher(data.labeled, case.body("student"), config=case.config))


def stock_student(case: Case, data: RunData) -> Predict:
    refined = load(case.kept("refined"), device="cpu")
    model = new_model(case.body("student"), data.labeled.label_names).to("cpu")
    model.model_head = LogisticRegression()
    trainer = DistillationTrainer(
        teacher_model=refined,
        student_model=model,
        args=stock_arguments(case, max_steps=case.pair_steps),
        train_dataset=Dataset.from_dict({"text": TeacherSignals.load(case.kept("signals")).texts}),
        metric=lambda *_: {"accuracy": 0.0},
    )
    trainer.train()
    return classes_of(model)


def pairs_student(case: Case, data: RunData) -> Predict:
    signals = TeacherSignals.load(case.kept("signals"))
    each = max(1, -(-case.pair_steps * 16 // len(signals)))
    config = case.config.model_copy(  # as SetFit trains, but for the targets
        update={
            "objective": "pairs",
            "batch_size": 16,
            "num_iterations": each,
            "epochs": 1,
            "learning_rate": 2e-5,
            "precision": "fp32",
            "freeze_embeddings": False,
        }
    )
    return classes_of(train_student(signals, case.body("student"), labeled=data.labeled, config=config))


def student(case: Case, data: RunData) -> Predict:
    signals = TeacherSignals.load(case.kept("signals"))
    return classes_of(train_student(signals, case.body("student"), labeled=data.labeled, config=case.config))


def classes_of(model: SetFitModel) -> Predict:
    return lambda texts: predict_proba(model, texts).argmax(axis=1)


CONTESTANTS: dict[str, Callable[[Case, RunData], Predict]] = {
    contestant.__name__: contestant
    for contestant in (
        tfidf,
        frozen,
        stock_teacher,
        teacher,
        refined_teacher,
        labels_alone,
        stock_student,
        pairs_student,
        student,
    )
}
"""How each is trained; later ones may use what earlier ones kept."""
OWN_PRECISION = ("teacher", "labels_alone", "student")
"""Those that train in the precision that a probe finds faster; all others train in fp32, or not at all."""


class Passes:
    """Counts texts that pass through any body: those that gradients flow back through, and others."""

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


def compete(name: str, case: Case) -> dict[str, Any]:
    """Train one contestant and measure it."""
    data = case.data()
    tests = data.evaluation
    assert isinstance(tests, LabeledSet)
    if case.tests is not None and len(tests) > case.tests:
        tests = tests.take(np.sort(np.random.default_rng(0).permutation(len(tests))[: case.tests]))
    probed = resolve_precision("auto", case.body("student"), data.pool)
    case = replace(case, precision=probed.name)
    passes = Passes()
    started, used = time.perf_counter(), time.process_time()
    predict = CONTESTANTS[name](case, data)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    counted = {"training_passes": passes.training, "encoding_passes": passes.encoding}
    quality = measure_quality(np.asarray(predict(tests.texts)), tests.labels, tests.label_names)
    return {
        "accuracy": quality.accuracy,
        "macro_f1": quality.macro_f1,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_mb": round(peak),
        **counted,
        "precision": probed.name if name in OWN_PRECISION else "fp32",
        "tests": len(tests),
        "case": {name: value for name, value in asdict(case).items() if name in ("seed", "shots", "pool_size")},
    }


if __name__ == "__main__":
    contestant, case_file, result_file = sys.argv[1:]
    result = compete(contestant, Case(**json.loads(Path(case_file).read_text())))
    Path(result_file).write_text(json.dumps(result, indent=2) + "\n")
