"""Names of the files and folders in a run folder."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from setfit_kd.config.run import RunConfig

CONFIG_FILE, METRICS_FILE, RUN_FILE, LOG_FILE = "config.yaml", "metrics.json", "run.json", "run.log"
TEACHER, BASELINE, STUDENT, SIGNALS = "teacher", "baseline", "student", "signals"
TEACHERS, BASELINES, STUDENTS = "teachers", "baselines", "students"
AUGMENTED = "augmented"
TEACHER_SIGNALS = "scored"
"""Signals of each of several teachers."""
CROSS_FITTED = "cross_fitted"
"""Predictions of each teacher for the labeled texts, by cross-fitting."""
SEARCH = "search"
"""Trials of the search for settings."""
STAGE_KINDS = {
    TEACHERS: TEACHER,
    CROSS_FITTED: "calibration",
    TEACHER_SIGNALS: SIGNALS,
    STUDENTS: STUDENT,
    BASELINES: BASELINE,
}
"""Kind of the stages in a group."""
SEEDS = "seeds"
EVALUATION, CHECKPOINTS = "evaluation", "checkpoints"
REPORT_HTML = "report.html"
RESULTS = (METRICS_FILE, REPORT_HTML)
"""Files written at the end from the results of all stages."""
_FILES = (CONFIG_FILE, RUN_FILE, LOG_FILE, *RESULTS)
_MODELS = (TEACHER, TEACHERS, BASELINE, BASELINES, STUDENT, STUDENTS)
_SIGNALS = (SIGNALS, TEACHER_SIGNALS, CROSS_FITTED)
ALL_NAMES = (*_FILES, *_MODELS, AUGMENTED, *_SIGNALS, EVALUATION, CHECKPOINTS, SEEDS, SEARCH)
_STAGE_PATH = re.compile(
    rf"({EVALUATION}/)?({TEACHER}|{BASELINE}|{STUDENT}|({TEACHERS}|{BASELINES}|{STUDENTS})/\w[\w.-]*)(@\w[\w.-]*)?"
    rf"|{AUGMENTED}|{SIGNALS}|({TEACHER_SIGNALS}|{CROSS_FITTED})/\w[\w.-]*"
    rf"|{SEARCH}/({TEACHER}|{STUDENT})-[0-9]+"
)
"""Folder of a stage: ``student``, ``evaluation/students/NAME``, ``evaluation/student@SET`` (not the main set), ..."""


def _check_stage_path(name: str) -> str:
    if _STAGE_PATH.fullmatch(name) is None:
        raise ValueError(f"unknown stage {name!r}")
    return name


StagePath = Annotated[str, AfterValidator(_check_stage_path)]
"""Path of a stage's result relative to the run folder; it never leads out of the folder."""


def baseline_path(student_path: str) -> str:
    """Return the path of a student's baseline in the run folder."""
    group, _, slug = student_path.partition("/")
    return f"{BASELINES}/{slug}" if group == STUDENTS else BASELINE


def reference_models(student_path: str, evaluated: Collection[str]) -> dict[str, str]:
    """Map ``teacher`` and ``baseline`` to the models to compare a student with, if they were evaluated."""
    paths = {TEACHER: TEACHER, BASELINE: baseline_path(student_path)}
    return {role: path for role, path in paths.items() if path in evaluated}


def default_folder(config: RunConfig) -> Path:
    """Return the default output folder of a run: ``runs/`` and the name of the labeled data."""
    name = Path((config.labeled or "").removeprefix("bundled:").removesuffix(".gz")).stem
    return Path("runs") / (re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run")
