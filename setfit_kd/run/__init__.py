"""A whole run: stages, their cached results, and the pipeline that connects them."""

from setfit_kd.run.dry_run import plan
from setfit_kd.run.inputs import prepare_run
from setfit_kd.run.pipeline import RunResult, distill, resumed_config, run, student_paths

__all__ = ["RunResult", "distill", "plan", "prepare_run", "resumed_config", "run", "student_paths"]
