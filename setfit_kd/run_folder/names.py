"""Names of the files and folders in a run folder."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from setfit_kd.config import RunConfig

CONFIG, METRICS, RUN, LOG = "config.yaml", "metrics.json", "run.json", "run.log"
TEACHER, BASELINE, STUDENT, SIGNALS = "teacher", "baseline", "student", "signals"
TEACHERS, BASELINES, STUDENTS = "teachers", "baselines", "students"
AUGMENTED, SCORED, WEIGHED = "augmented", "scored", "weighed"
"""Texts that were made; what each of several teachers says, and how often it is right on labels held out from it."""
SEEDS = "seeds"
EVALUATION, CHECKPOINTS = "evaluation", "checkpoints"
REPORT_HTML, REPORT_MARKDOWN = "report.html", "report.md"
RESULTS = (METRICS, REPORT_HTML, REPORT_MARKDOWN)
"""What is made of the stages' results at the end."""
_MODELS = (TEACHER, TEACHERS, BASELINE, BASELINES, STUDENT, STUDENTS)
_CONTENTS = (CONFIG, RUN, LOG, *RESULTS, *_MODELS, AUGMENTED, SIGNALS, SCORED, WEIGHED, EVALUATION, CHECKPOINTS, SEEDS)
_ARTIFACT_PATH = re.compile(
    rf"({EVALUATION}/)?({TEACHER}|{BASELINE}|{STUDENT}|({TEACHERS}|{BASELINES}|{STUDENTS})/\w[\w.-]*)"
    rf"|{AUGMENTED}|{SIGNALS}|({SCORED}|{WEIGHED})/\w[\w.-]*"
)


def _check_artifact_path(name: str) -> str:
    if _ARTIFACT_PATH.fullmatch(name) is None:
        raise ValueError(f"it tells of {name!r}, which no run has")
    return name


ArtifactPath = Annotated[str, AfterValidator(_check_artifact_path)]
"""A name that a run keeps something under in its folder; none leads out of it."""


def baseline_path(student: str) -> str:
    """What a student's baseline is called in the run's folder."""
    group, _, slug = student.partition("/")
    return f"{BASELINES}/{slug}" if group == STUDENTS else BASELINE


def reference_models(student: str, evaluated: Collection[str]) -> dict[str, str]:
    """What a student is compared with among what was evaluated: names in the folder, by what they are to it."""
    others = {TEACHER: TEACHER, BASELINE: baseline_path(student)}
    return {called: name for called, name in others.items() if name in evaluated}


def default_folder(config: RunConfig) -> Path:
    """Where a run goes that names no folder: ``runs/`` and the name of its labeled texts."""
    name = Path((config.labeled or "").removeprefix("bundled:")).stem
    return Path("runs") / (re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run")
