"""Stages of a run: augment, train and score the teachers, train the students, evaluate."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.augment.edits import augment, drop_uncertain, load_texts, save_texts
from setfit_kd.augment.fill_mask import FillMask
from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import SignalsConfig, StudentConfig, TeacherConfig
from setfit_kd.config.values import CROSS_VALIDATED, parse_weights
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.data.splits import normalize
from setfit_kd.errors import TrainingError
from setfit_kd.evaluation.estimates import Estimate, estimate_student, estimate_teacher
from setfit_kd.evaluation.measure import Evaluation, evaluate, evaluate_ensemble
from setfit_kd.memory.backoff import move_model
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import content_hash, family_of
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.heads import (
    at_temperature,
    fit_temperature,
    head_at_temperature,
    head_thresholds,
    save_head,
    set_head,
)
from setfit_kd.models.io import BUNDLE, load_folder, replace_head, save_model, with_saved_head
from setfit_kd.models.thresholds import fit_thresholds, with_thresholds
from setfit_kd.run.inputs import RunData, RunInputs
from setfit_kd.run.search import Settings, Space, Trial, best_trial, search, student_space, teacher_space
from setfit_kd.run.stage_cache import Artifact, StageCache
from setfit_kd.run_folder.manifest import DIVERGED
from setfit_kd.run_folder.names import (
    AUGMENTED,
    CROSS_FITTED,
    EVALUATION,
    SEARCH,
    SIGNALS,
    STUDENT,
    TEACHER,
    TEACHER_SIGNALS,
    TEACHERS,
    baseline_path,
)
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.student.distil import (
    MIN_HELD_OUT,
    hold_out,
    labels_only_config,
    n_without_signals,
    rows_without_signals,
    train_student,
)
from setfit_kd.student.kinds import PreparedStudent, folder_names
from setfit_kd.tasks.classification import SINGLE_LABEL, is_equal
from setfit_kd.teacher.cross_fitting import FOLDS, MIN_LABELS_PER_CLASS, CrossFit, cross_fit
from setfit_kd.teacher.scoring import refine_and_score
from setfit_kd.teacher.train import steps_and_batch_size, train_teacher
from setfit_kd.utils.arrays import Floats, iter_chunks, sample_rows
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.files import fingerprint, hash_parts

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

logger = logging.getLogger(__name__)

_MAX_SAMPLE = 1000  # pool texts to calibrate a baseline on
_TRAINED_HEAD, _HEAD = "trained_head", "head"
"""Subfolder of the teacher with its head before refinement, and subfolder of the signals with the refined head."""


@dataclass(frozen=True)
class Teachers:
    """Result of the teacher stages.

    Attributes:
        signals: Signals of the teacher, or the weighted average of several.
        key: Fingerprint of the signals' inputs.
        thresholds: (n_classes,) decision thresholds of the teacher or ensemble; None for a single-label task.
        first: The teacher, or the first of several if a student is made from it.
        shares: With several teachers, the weight of each by its name; the weights sum to 1.
        evaluations: Evaluation of each teacher and, with several, of the ensemble, as returned by `Stages.evaluate`.
        estimate: Without an evaluation set, the estimated quality of the teacher or ensemble, if it is calibrated.
    """

    signals: TeacherSignals
    key: str
    thresholds: Floats | None = None
    first: SetFitModel | None = None
    shares: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    estimate: Estimate | None = None


class Stages:
    """Stages of a run. Each returns its result, on the CPU, or loads it if it was run before on the same inputs.

    Args:
        config: The settings, with device and precision resolved.
        data: Data of the run.
        cache: Cache of stage results.

    Attributes:
        config: The settings, including those found for the student by a search.
        teacher_config: The settings for the teachers, including those found by a search.
        trials: Trials of the searches for teacher and student.
    """

    def __init__(self, config: RunConfig, data: RunData, cache: StageCache) -> None:
        self.config, self.teacher_config, self.data, self.cache = config, config, data, cache
        self.device = resolve_device(config.device)
        self._exact = ["exact"] if config.exact else []  # not in the key of a training
        sets = enumerate(data.evaluations.items())
        self._evaluation_sets = {f"@{name}" if row else "": evaluation for row, (name, evaluation) in sets}
        self._labeled_key = _labeled_key(data.labeled)
        self.trials: dict[str, list[Trial]] = {}

    def augment(self, fill_mask: Path | None) -> list[str]:
        """Augment the pool, by default if it is small; texts of the evaluation sets are never created.

        Args:
            fill_mask: Folder of a masked language model that replaces words; None to use the other edits only.
        """
        data, config = self.data, self.config
        n = config.n_augmented(len(data.pool) + len(data.labeled))
        if not n:
            return []

        def run() -> list[str]:
            forbidden = [text for each in data.evaluations.values() for text in each.texts]
            batch_size = config.encode_batch_size or 32
            model = None if fill_mask is None else FillMask(fill_mask, device=self.device, batch_size=batch_size)
            return augment([*data.pool, *data.labeled.texts], n, seed=config.seed, forbidden=forbidden, fill=model)

        model_hash = fill_mask and hash_parts(
            file.read_bytes() for file in sorted(fill_mask.iterdir()) if file.is_file()
        )
        evaluation_keys = "".join(map(_labeled_key, data.evaluations.values()))
        key = fingerprint(self._labeled_key, data.pool, evaluation_keys, n, model_hash, config.seed)
        texts = self.cache.run_or_load(AUGMENTED, key, Artifact(save_texts, load_texts), run)
        if config.augment and len(texts) < n:
            logger.warning("Could create only %d of %d augmented texts.", len(texts), n)
        elif texts and not config.augment:
            logger.info("The pool is small: %d augmented texts are added (none with --augment 0).", len(texts))
        return texts

    def search_teacher(self, inputs: RunInputs) -> None:
        """Search for the settings of the teacher with the lowest log loss in cross-fitting, and use them."""
        labeled, config, name = self.data.labeled, self.config, self.config.teacher[0]
        if not config.search:
            return
        if labeled.counts.max() < MIN_LABELS_PER_CLASS:
            logger.warning("There are too few labels to search for settings of the teacher.")
            return
        body, load = inputs.bodies[name], partial(inputs.load_body, name, config.seed)
        body_hash = content_hash(body)
        steps, _ = steps_and_batch_size(config, labeled, family=family_of(body), device=self.device)

        def run(number: int, settings: Settings) -> Trial:
            trial_config = config.model_copy(update=settings)
            key = fingerprint(self._teacher_key(body_hash, trial_config), FOLDS)
            return self._run_or_load_trial(
                f"{TEACHER}-{number}", key, settings, lambda: cross_fit(labeled, load, config=trial_config).log_loss
            )

        best = self._search(TEACHER, teacher_space(config, body, steps), run)
        self.teacher_config = config.model_copy(update=best)

    def search_student(self, prepared: PreparedStudent, teachers: Teachers) -> None:
        """Search for the settings of the student that agrees most with the teacher on held-out texts, and use them."""
        config, labeled, signals = self.config, self.data.labeled, teachers.signals
        if not config.search:
            return
        n_appended = n_without_signals(signals, labeled, config, prepared.family)
        avoid = np.append(self._is_labeled(signals), np.ones(n_appended, bool))
        _, held_out = hold_out(len(avoid), config, avoid=avoid)
        held_out = held_out[held_out < len(signals)]
        if not len(held_out):
            logger.warning("There are too few pool texts to search for settings of the student.")
            return
        texts = [signals.texts[row] for row in held_out]
        targets = at_temperature(signals.probabilities[held_out], signals.temperature, signals.task)
        expected = signals.task.decide(targets, teachers.thresholds)
        body_key, body = self._student_body(config.student[0], prepared, teachers)

        def run(number: int, settings: Settings) -> Trial:
            name, trial_config = f"{STUDENT}-{number}", config.model_copy(update=settings)
            student_settings = StudentConfig.fingerprint_inputs(trial_config)
            key = fingerprint(teachers.key, self._labeled_key, body_key, student_settings)

            def disagreement() -> float:
                options: Any = {"checkpoints": self.cache.checkpoint_folder(_trial_path(name), key)}
                model = train_student(signals, copy.deepcopy(body()), labeled=labeled, config=trial_config, **options)
                probabilities = self._predict_proba(model, texts, "Comparing with teacher")
                predicted = signals.task.decide(probabilities, head_thresholds(model.model_head))
                return 1 - float(is_equal(predicted, expected).mean())

            return self._run_or_load_trial(name, key, settings, disagreement)

        self.config = config.model_copy(update=self._search(STUDENT, student_space(config, prepared), run))

    def _run_or_load_trial(self, name: str, key: str, settings: Settings, measure: Callable[[], float]) -> Trial:
        def run() -> Trial:
            logger.info("Trial %s: %s.", name, _describe(settings))
            try:
                return Trial(settings, measure())
            except TrainingError as error:
                logger.warning("Trial %s failed: %s", name, error.message)
                return Trial(settings, DIVERGED)

        trial = self.cache.run_or_load(_trial_path(name), key, Artifact(Trial.save, Trial.load), run)
        return Trial(settings, trial.loss)

    def _search(self, stage: str, space: Space, run: Callable[[int, Settings], Trial]) -> Settings:
        """Try settings of a stage; return the best."""
        self.trials[stage] = search(self.config.search, space, run, seed=self.config.seed)
        first, best = self.trials[stage][0], best_trial(self.trials[stage])
        change = f"loss {first.loss:.3f} to {best.loss:.3f}"
        logger.info("Best settings of the %s: %s (%s).", stage, _describe(best.settings), change)
        return best.settings

    def run_teachers(self, inputs: RunInputs, augmented: Sequence[str]) -> Teachers:
        """Train, score and evaluate all teachers, one at a time, and average the signals of several."""
        config, several = self.teacher_config, len(inputs.teachers) > 1
        pool_key = fingerprint(self.data.pool, list(augmented))
        keep_first = not several or any(student.source_body is None for student in inputs.students)
        first: SetFitModel | None = None
        all_signals: list[TeacherSignals] = []
        keys: list[str] = []
        accuracies: list[float | None] = []
        cross_fits: list[CrossFit] = []
        evaluations: dict[str, Evaluation] = {}
        for (name, source), folder in zip(inputs.teachers.items(), folder_names(config.teacher), strict=True):
            path = f"{TEACHERS}/{folder}" if several else TEACHER
            signals_path = f"{TEACHER_SIGNALS}/{folder}" if several else SIGNALS
            body = inputs.bodies.pop(name, None) or inputs.load_body(name, config.seed)
            key = self._teacher_key(content_hash(body), config)
            signals_key = fingerprint(key, pool_key, SignalsConfig.fingerprint_inputs(config), *self._exact)
            teacher = self._train_teacher(path, key, body, config)
            del body  # frees memory if the teacher was loaded
            if config.cross_fits(source.family):
                load = partial(inputs.load_body, name, config.seed)
                predictions = self._cross_fit(f"{CROSS_FITTED}/{folder}", key, load)
                accuracies.append(predictions.accuracy)
                self._warn_of_unrecognized(predictions)
            if config.calibrates(source.family):
                teacher.model_head = head_at_temperature(teacher.model_head, predictions.temperature)
                cross_fits.append(predictions.calibrated)
            teacher, signals = self._score(path, signals_path, signals_key, teacher, augmented, name)
            all_signals.append(signals)
            keys.append(signals_key)
            thresholds = head_thresholds(teacher.model_head)
            evaluations |= self.evaluate(path, teacher, signals_key, "" if several else signals_key, {})
            if keep_first and first is None:
                first = teacher
            del teacher
        signals, key, shares = all_signals[0], keys[0], {}
        if several:
            weights = _normalize_weights(config, accuracies)
            shares = dict(zip(config.teacher, weights, strict=True))
            logger.info("Weights of the teachers: %s.", ", ".join(f"{n} {share:.1%}" for n, share in shares.items()))
            signals, key = TeacherSignals.average(all_signals, weights), fingerprint(keys, weights)
            thresholds = self.thresholds(signals)
            temperatures, members = [signals.temperature for signals in all_signals], list(evaluations.values())
            for row, (suffix, evaluation_set) in enumerate(self._evaluation_sets.items()):
                on_set = members[row :: len(self._evaluation_sets)]  # each teacher was evaluated on all sets
                inputs_of_mean = on_set, weights, temperatures, signals.temperature
                evaluations[f"{TEACHER}{suffix}"] = self.cache.run_or_load(
                    f"{EVALUATION}/{TEACHER}{suffix}",
                    fingerprint(key, _labeled_key(evaluation_set), temperatures, signals.temperature),
                    Artifact(Evaluation.save, Evaluation.load),
                    partial(evaluate_ensemble, *inputs_of_mean, thresholds=thresholds),
                )
        if augmented:
            rows = range(len(self.data.pool), len(self.data.pool) + len(augmented))
            signals = drop_uncertain(signals, rows, min_confidence=config.augment_confidence)
            key = fingerprint(key, signals.texts)
        teachers = Teachers(signals, key, thresholds, first, shares, evaluations)
        if self.data.evaluation is None and len(cross_fits) == len(keys):
            return replace(teachers, estimate=self._estimate_teacher(cross_fits, teachers))
        return teachers

    def _warn_of_unrecognized(self, predictions: CrossFit) -> None:
        labeled, unrecognized = self.data.labeled, predictions.unrecognized
        if len(unrecognized):
            classes = [f"{labeled.label_names[c]} ({labeled.counts[c]} labels)" for c in unrecognized[:10]]
            classes += ["and others"] * (len(unrecognized) > 10)
            message = "No labeled text of these classes is recognized by a teacher trained on the others, or they have "
            message += "fewer than %d labels: %s. Add labels."
            logger.warning(message, MIN_LABELS_PER_CLASS, ", ".join(classes))

    def _estimate_teacher(self, cross_fits: Sequence[CrossFit], teachers: Teachers) -> Estimate | None:
        """Estimate the quality of a teacher, or of the weighted average of several."""
        signals, weights = teachers.signals, list(teachers.shares.values()) or None
        probabilities = np.average([each.probabilities for each in cross_fits], axis=0, weights=weights)
        held_out, task = CrossFit(probabilities, self.data.labeled.labels).predicted(), signals.task
        if not len(held_out.labels):
            return None
        pool = at_temperature(signals.probabilities[: len(self.data.pool)], signals.temperature, task)
        decided = task.decide(pool, teachers.thresholds)
        confidence = float(task.joint_probability(pool, decided).mean()) if len(pool) else None
        run = partial(
            estimate_teacher, held_out.probabilities, held_out.labels, confidence, thresholds=held_out.thresholds
        )
        return self._run_or_load_estimate(TEACHER, fingerprint(teachers.key, weights), run)

    def _run_or_load_estimate(self, path: str, key: str, run: Callable[[], Estimate]) -> Estimate:
        artifact = Artifact(Estimate.save, Estimate.load)
        return self.cache.run_or_load(f"{EVALUATION}/{path}", fingerprint("estimate", key), artifact, run)

    def estimate_student(self, path: str, model: SetFitModel, teachers: Teachers) -> Estimate:
        """Estimate the quality of a student without an evaluation set, on held-out pool texts if there are any."""
        signals, teacher = teachers.signals, teachers.estimate
        assert teacher is not None

        def run() -> Estimate:
            n_pool, is_labeled = len(self.data.pool), self._is_labeled(signals)
            _, held_out = hold_out(len(signals), self.config, avoid=is_labeled)
            rows = held_out[held_out < n_pool]  # the next ones are augmented, similar to texts it was trained on
            if len(rows) < MIN_HELD_OUT:
                rows = np.flatnonzero(~is_labeled[:n_pool])
            rows = rows if len(rows) else np.arange(len(signals))
            targets = at_temperature(signals.probabilities[rows], signals.temperature, signals.task)
            texts = [signals.texts[row] for row in rows]
            probabilities = self._predict_proba(model, texts, f"Estimating {path}")
            thresholds = {"thresholds": head_thresholds(model.model_head), "teacher_thresholds": teachers.thresholds}
            return estimate_student(teacher, probabilities, targets, **thresholds)

        return self._run_or_load_estimate(path, fingerprint(teachers.key, self.cache.key(path)), run)

    def thresholds(self, signals: TeacherSignals) -> Floats | None:
        """Choose the thresholds of a teacher from its signals for the pool; None for a single-label task."""
        if signals.task is SINGLE_LABEL:
            return None
        pool = signals.probabilities[: len(self.data.pool) or len(signals)]
        probabilities = at_temperature(pool, signals.temperature, signals.task)
        return fit_thresholds(probabilities, self.config.thresholds, label_names=signals.label_names)

    def _predict_proba(self, model: SetFitModel, texts: list[str], description: str) -> npt.NDArray[np.floating]:
        with _on_device(model, self.device, description):
            return predict_proba(model, texts, batch_size=self.config.encode_batch_size, description=description)

    def _student_body(
        self, name: str, prepared: PreparedStudent, teachers: Teachers
    ) -> tuple[str, Callable[[], SentenceTransformer]]:
        """Return the fingerprint of a student's untrained body, and a function that creates it when first called."""
        origin = teachers.key if prepared.source_body is None else content_hash(prepared.source_body)
        key = fingerprint(name, origin, fingerprint(self.data.pool) if prepared.needs_texts else "")
        teacher = None if teachers.first is None else teachers.first.model_body
        return key, cache(partial(prepared.create_body, teacher, self.data.pool, self.device))

    def _teacher_key(self, body_hash: str, config: RunConfig) -> str:
        return fingerprint(self._labeled_key, body_hash, TeacherConfig.fingerprint_inputs(config))

    def _train_teacher(self, path: str, key: str, body: SentenceTransformer, config: RunConfig) -> SetFitModel:
        """Train a teacher on the labels."""
        labeled = self.data.labeled
        _, batch_size = steps_and_batch_size(config, labeled, family=family_of(body), device=self.device)
        checkpoints = self.cache.checkpoint_folder(path, fingerprint(key, batch_size))

        def save(teacher: SetFitModel, folder: Path) -> None:
            save_model(teacher, folder, title="Teacher")
            _save_head(teacher, folder / _TRAINED_HEAD)

        def load(folder: Path) -> SetFitModel:
            return with_saved_head(load_folder(folder), folder / _TRAINED_HEAD)

        def run() -> SetFitModel:
            return _on_cpu(train_teacher(labeled, body, config=config, checkpoints=checkpoints))

        return self.cache.run_or_load(path, key, Artifact(save, load), run)

    def _cross_fit(self, path: str, key: str, load_body: Callable[[], SentenceTransformer]) -> CrossFit:
        """Predict the labeled texts by teachers that were trained on others of them."""
        labeled = self.data.labeled
        artifact = Artifact(CrossFit.save, partial(CrossFit.load, labeled=labeled))
        run = partial(cross_fit, labeled, load_body, config=self.teacher_config)
        return self.cache.run_or_load(path, fingerprint(key, FOLDS), artifact, run)

    def _score(
        self, path: str, signals_path: str, key: str, teacher: SetFitModel, augmented: Sequence[str], origin: str
    ) -> tuple[SetFitModel, TeacherSignals]:
        """Refine a teacher's head on the pool, and score the pool and the labeled texts."""

        def run() -> tuple[SetFitModel, TeacherSignals]:
            with _on_device(teacher, self.device, "Scoring pool"):
                options: Any = {"augmented": augmented, "config": self.config, "origin": origin}
                return refine_and_score(teacher, self.data.labeled, self.data.pool, **options)

        def save(result: tuple[SetFitModel, TeacherSignals], folder: Path) -> None:
            model, signals = result
            signals.save(folder)
            _save_head(model, folder / _HEAD)

        def load(folder: Path) -> tuple[SetFitModel, TeacherSignals]:
            return with_saved_head(teacher, folder / _HEAD), TeacherSignals.load(folder)

        refined, signals = self.cache.run_or_load(signals_path, key, Artifact(save, load), run)
        if family_of(refined.model_body) == "transformer":
            set_head(refined.model_head, refined.model_body)  # the last layer, which a student may copy
        if self.cache.folder is not None:
            replace_head(refined, self.cache.folder.path / path)
        return refined, signals

    def run_student(
        self, path: str, name: str, prepared: PreparedStudent, teachers: Teachers
    ) -> dict[str, SetFitModel]:
        """Distil a student and, if there is an evaluation set, train its baseline: the same without distillation.

        Args:
            path: Path of the student in the run folder.
            name: Name of the student in the settings.
            prepared: The student before training.
            teachers: Result of the teacher stages.

        Returns:
            The models by path: the baseline, if any, and the student.
        """
        config, data, signals = self.config, self.data, teachers.signals
        body_key, body = self._student_body(name, prepared, teachers)
        settings = StudentConfig.fingerprint_inputs(config)
        key = fingerprint(teachers.key, self._labeled_key, body_key, settings)
        train = partial(train_student, signals, labeled=data.labeled, config=config)
        models = {}

        def run(key: str, path: str, train: Callable[..., SetFitModel], title: str) -> SetFitModel:
            def save(model: SetFitModel, folder: Path) -> None:
                def add_bundle(part: Path) -> None:
                    if title == "Student" and config.bundle:
                        from setfit_kd.export.bundle import keep_bundle

                        keep_bundle(model, part / BUNDLE, texts=signals.texts)

                save_model(model, folder, title=title, add_files=add_bundle)

            checkpoints, files = self.cache.checkpoint_folder(path, key), Artifact(save, load_folder)
            return self.cache.run_or_load(
                path, key, files, lambda: _on_cpu(train(copy.deepcopy(body()), checkpoints=checkpoints))
            )

        student = run(key, path, train, "Student")
        if config.baseline and data.evaluation and len(data.labeled):
            if prepared.family == "transformer":
                rows, n_labeled = rows_without_signals(signals, data.labeled), len(data.labeled)
                config = labels_only_config(config, len(signals), len(rows), n_labeled=n_labeled)
            key = fingerprint(self._labeled_key, body_key, TeacherConfig.fingerprint_inputs(config))
            key = fingerprint(key, teachers.key)
            models[baseline_path(path)] = run(
                key, baseline_path(path), partial(self._train_baseline, config, signals), "Baseline"
            )
        return {**models, path: student}

    def _train_baseline(
        self, config: RunConfig, signals: TeacherSignals, body: SentenceTransformer, checkpoints: Path | None
    ) -> SetFitModel:
        """Train a baseline on the labels, and calibrate it to the teacher on the pool."""
        labeled = self.data.labeled
        model = train_teacher(labeled, body, config=config, description="Training baseline", checkpoints=checkpoints)
        rows = sample_rows(np.flatnonzero(~self._is_labeled(signals)), _MAX_SAMPLE, seed=[config.seed, 16])
        texts, size = [signals.texts[row] for row in rows], config.encode_batch_size
        probabilities = predict_proba(model, texts, batch_size=size, description="Calibrating baseline")
        targets = at_temperature(signals.probabilities[rows], signals.temperature, signals.task)
        temperature = fit_temperature(signals.task.to_logits(probabilities), targets, task=signals.task)
        head = head_at_temperature(model.model_head, temperature)
        calibrated = at_temperature(probabilities, temperature, signals.task)
        model.model_head = with_thresholds(head, calibrated, config.thresholds, label_names=signals.label_names)
        if family_of(body) == "transformer":
            set_head(model.model_head, body)
        return model

    def _is_labeled(self, signals: TeacherSignals) -> npt.NDArray[np.bool_]:
        """Return which of the n texts are labeled, as a mask (n,)."""
        labeled = set(map(normalize, self.data.labeled.texts))
        return np.array([normalize(text) in labeled for text in signals.texts], bool)

    def evaluate(
        self, path: str, model: SetFitModel, signals_key: str, key: str, teachers: Mapping[str, Evaluation]
    ) -> dict[str, Evaluation]:
        """Evaluate a model, including its size and speed: by ``path`` on the main set, by ``path@SET`` on the others.

        Args:
            path: Path of the model in the run folder.
            model: The model.
            signals_key, key: Fingerprints of the inputs of the signals and of the model.
            teachers: Evaluations of the teacher by path; none if the model is a teacher or there is no teacher.
        """
        config, evaluations = self.config, {}
        options: Any = {"encode_batch_size": config.encode_batch_size, "exact": config.exact}
        options["folder"] = None if self.cache.folder is None else self.cache.folder.path / path

        def run(data: LabeledSet, teacher: Evaluation | None, description: str) -> Evaluation:
            with _on_device(model, self.device, description):
                return evaluate(model, data, teacher=teacher, **options, description=description)

        artifact = Artifact(Evaluation.save, Evaluation.load)
        for suffix, data in self._evaluation_sets.items():
            name, inputs = f"{path}{suffix}", fingerprint(signals_key, key, _labeled_key(data), *self._exact)
            description = f"Evaluating {path}" + suffix.replace("@", " on ", 1)
            run_on_set = partial(run, data, teachers.get(f"{TEACHER}{suffix}"), description)
            evaluations[name] = self.cache.run_or_load(f"{EVALUATION}/{name}", inputs, artifact, run_on_set)
        return evaluations


def _normalize_weights(config: RunConfig, accuracies: Sequence[float | None]) -> list[float]:
    """Return the weights of the teachers, which sum to 1."""
    weights = [1.0] * len(config.teacher)
    if config.teacher_weights == CROSS_VALIDATED:
        if any(accuracy is None for accuracy in accuracies) or not any(accuracies):
            logger.warning("There are too few labels to cross-validate the teachers: they are weighted equally.")
        else:
            weights = [accuracy or 0.0 for accuracy in accuracies]
    elif config.teacher_weights is not None:
        weights = parse_weights(config.teacher_weights)
    return [weight / sum(weights) for weight in weights]


def fingerprint_signals(signals: TeacherSignals) -> str:
    """Fingerprint everything in signals that affects the training of a student; their origin does not."""
    content = [np.ascontiguousarray(signals.probabilities).tobytes()]
    if signals.embeddings is not None:
        content += [np.ascontiguousarray(part).tobytes() for part in iter_chunks(signals.embeddings)]
    names, task = list(signals.label_names), signals.task.name
    return fingerprint(signals.texts, names, signals.temperature, hash_parts(content), task)


def _labeled_key(data: LabeledSet) -> str:
    return fingerprint(data.texts, data.labels.tolist(), list(data.label_names))


def _describe(settings: Settings) -> str:
    return ", ".join(
        f"{name} {value if isinstance(value, int) else f'{value:.3g}'}" for name, value in settings.items()
    )


def _trial_path(name: str) -> str:
    return f"{SEARCH}/{name}"


def _on_cpu(model: SetFitModel) -> SetFitModel:
    model.model_body.to("cpu")
    return model


@contextmanager
def _on_device(model: SetFitModel, device: torch.device, phase: str) -> Iterator[None]:
    """Context manager that moves a model to a device, and back to the CPU to free the device's memory."""
    move_model(model.model_body, device, phase=phase)
    try:
        yield
    finally:
        _on_cpu(model)


def _save_head(model: SetFitModel, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        save_head(model.model_head, temporary)
