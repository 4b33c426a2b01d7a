"""Search for settings: try several, and keep those with the lowest loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from setfit_kd.config.run import RunConfig
from setfit_kd.errors import UnavailableError
from setfit_kd.models.bodies import family_of, is_static
from setfit_kd.student.kinds import PreparedStudent
from setfit_kd.utils.json_artifact import JsonArtifact

if TYPE_CHECKING:
    from optuna import Trial as OptunaTrial
    from sentence_transformers import SentenceTransformer

Settings: TypeAlias = dict[str, Any]

_N_RANDOM = 4  # first trials, before the estimator


class Space(NamedTuple):
    """Settings to start with, and a function that chooses others with the methods of an Optuna trial."""

    start: Settings
    sample: Callable[[OptunaTrial], Settings]


@dataclass(frozen=True)
class Trial(JsonArtifact):
    """Settings that were tried, and their loss; lower is better."""

    file_name = "trial.json"
    settings: Settings
    loss: float


def check_search() -> None:
    """Raise an `UnavailableError` if Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        message = "The search needs optuna."
        raise UnavailableError(message, hint="Run `pip install 'setfit-kd[search]'`.") from None


def search(n: int, space: Space, run: Callable[[int, Settings], Trial], *, seed: int) -> list[Trial]:
    """Try n settings: first those to start with, then a few at random.

    The others are chosen by a tree-structured Parzen estimator (Bergstra et al., 2011, "Algorithms for Hyper-Parameter
    Optimization") from the losses so far, and are the same whenever the losses are.

    Args:
        n: Number of trials.
        space: The space to search.
        run: Function that tries settings, given the number of the trial.
        seed: Random seed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=_N_RANDOM))
    study.enqueue_trial(space.start)
    trials = []
    for number in range(n):
        optuna_trial = study.ask()
        trials.append(run(number, space.sample(optuna_trial)))
        study.tell(optuna_trial, trials[-1].loss)
    return trials


def best_trial(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the lowest loss; the earliest of several."""
    return min(trials, key=lambda trial: trial.loss)


def teacher_space(config: RunConfig, body: SentenceTransformer, steps: int) -> Space:
    """Return the space of a teacher's settings.

    Args:
        config: The settings.
        body: The teacher's body.
        steps: Its number of training steps.
    """
    from setfit_kd.teacher.trainer import LEARNING_RATE
    from setfit_kd.training.loop import resolve_learning_rate

    family = family_of(body)
    rate = resolve_learning_rate(config.with_family_defaults(family).teacher_learning_rate, body, default=LEARNING_RATE)
    start: Settings = {"teacher_steps": steps, "teacher_learning_rate": rate}
    if family == "setfit" and config.teacher_objective == "pairs":  # the number of pairs determines the steps
        del start["teacher_steps"]

    def sample(trial: OptunaTrial) -> Settings:
        settings: Settings = {}
        if "teacher_steps" in start:
            settings["teacher_steps"] = trial.suggest_int("teacher_steps", max(steps // 2, 1), 8 * steps, log=True)
        name = "teacher_learning_rate"
        return {**settings, name: trial.suggest_float(name, rate / 4, rate * 4, log=True)}

    return Space(start, sample)


def student_space(config: RunConfig, prepared: PreparedStudent) -> Space:
    """Return the space of a student's settings."""
    from setfit_kd.student.trainer import LEARNING_RATE
    from setfit_kd.training.loop import STATIC_LEARNING_RATE

    source = prepared.source_body
    is_static_body = prepared.needs_texts or (source is not None and is_static(source))
    rate = config.with_family_defaults(prepared.family).learning_rate
    rate = rate or (STATIC_LEARNING_RATE if is_static_body else LEARNING_RATE)

    def sample(trial: OptunaTrial) -> Settings:
        return {
            "epochs": trial.suggest_int("epochs", 1, 4 * config.epochs, log=True),
            "learning_rate": trial.suggest_float("learning_rate", rate / 4, rate * 4, log=True),
        }

    return Space({"epochs": config.epochs, "learning_rate": rate}, sample)
