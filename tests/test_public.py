"""Public names, lazy imports and import rules between packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest

import setfit_kd

PUBLIC = {"RunConfig", "RunResult", "TeacherSignals", "distill", "evaluate", "load", "score", "train_student",
          "train_teacher"}  # fmt: skip
PACKAGE = Path(setfit_kd.__file__).parent


def test_public_names_are_documented() -> None:
    assert set(setfit_kd.__all__) == PUBLIC
    assert set(dir(setfit_kd)) >= PUBLIC
    for name in PUBLIC:
        value = getattr(setfit_kd, name)
        assert value.__name__ == name
        assert value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = setfit_kd.nonsense
    assert files("setfit_kd").joinpath("py.typed").is_file()


HEAVY = {"torch", "setfit", "transformers", "sentence_transformers", "datasets", "sklearn", "pandas"}


@pytest.mark.parametrize(
    "statement",
    [
        "import setfit_kd, setfit_kd.export.publication; setfit_kd.RunConfig",
        "from setfit_kd.cli import main; main(['run', '--help'])",
        "from setfit_kd.cli import main; main(['run', '--epochs', '0'])",
        "from setfit_kd.cli import main; main(['run', '--labeled', 'few.xlsx'])",
        "from setfit_kd.cli import main; main(['run', '--labeled', 'few.csv', '--text-column', 'headline'])",
        "from setfit_kd.cli import main; main(['run', '--output-dir', '.'])",
        "from setfit_kd.cli import main; main(['predict', '--help'])",
        "from setfit_kd.cli import main; main(['pretrain', 'x', '--texts', 'few.xlsx', '--output-dir', 'out'])",
    ],
)
def test_heavy_packages_are_not_loaded(statement: str) -> None:
    for name in ("few.csv", "few.xlsx"):
        Path(name).write_text("text,label\na,b\n")
    program = f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\nprint(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(PACKAGE.parent)})
    loaded = run.stderr.splitlines()[-1].split()
    assert "setfit_kd" in loaded
    assert HEAVY.isdisjoint(loaded)


# Import rules between packages

BASE = {"errors", "utils", "config", "memory", "tasks"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "runtime": set(),
    "utils": {"errors"},
    "tasks": set(),
    "config": {"errors", "utils"},
    "memory": {"errors"},
    "distributed": {"errors", "utils"},
    "hub": {"errors", "utils", "config"},
    "losses": {"utils", "memory"},
    "data": BASE | {"hub", "runtime"},
    "models": BASE | {"distributed", "hub", "runtime"},
    "signals": BASE | {"data", "models"},
    "training": BASE | {"distributed", "models", "losses"},
    "evaluation": BASE | {"data", "models", "runtime"},
    "augment": BASE | {"data", "models", "signals", "runtime"},
    "run_folder": {"errors", "utils", "config"},
    "finetune": BASE | {"data", "models", "losses", "training", "evaluation"},
    "teacher": BASE | {"data", "models", "losses", "training", "signals", "finetune"},
    "student": BASE | {"data", "models", "losses", "training", "signals"},
    "mlm": BASE | {"data", "models", "losses", "training", "student"},
    "encoder": BASE | {"data", "models", "losses", "training", "signals", "student"},
    "qa": BASE | {"data", "models", "losses", "training", "evaluation", "runtime"},
    "inference": BASE | {"models", "runtime", "qa"},
    "scale": BASE | {"data", "models", "runtime", "inference"},
    "export": BASE | {"hub", "models", "runtime", "qa"},
    "report": BASE | {"hub", "data", "evaluation", "run_folder"},
    "run": BASE
    | {"hub", "data", "models", "signals", "training", "evaluation", "augment", "teacher", "student", "run_folder"}
    | {"export", "report", "qa", "mlm"},
    "cli": BASE
    | {
        "distributed",
        "hub",
        "data",
        "models",
        "signals",
        "evaluation",
        "finetune",
        "mlm",
        "encoder",
        "inference",
        "scale",
        "export",
        "qa",
    }
    | {"report", "run", "run_folder", "runtime"},
    "__main__": {"cli"},
}
"""Packages that a package may import. No package imports a later one."""


@cache
def modules() -> dict[str, Path]:
    """Return the files of all modules by dotted name."""
    names = {path: path.relative_to(PACKAGE.parent).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def imported_packages(module: str) -> set[str]:
    """Return the packages of setfit_kd that a module imports from, including imports in functions."""
    names = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.split(".")[1] for name in names if name.startswith("setfit_kd.")} & set(MAY_IMPORT)


def test_every_package_has_a_rule_without_cycles() -> None:
    packages = list(MAY_IMPORT)
    assert set(packages) == {name.split(".")[1] for name in modules() if "." in name}
    for index, package in enumerate(packages):
        assert MAY_IMPORT[package] <= set(packages[:index])


def test_modules_follow_import_rules() -> None:
    for module in modules():
        package = module.partition(".")[2].partition(".")[0]
        forbidden = imported_packages(module) - {package} - MAY_IMPORT.get(package, set(MAY_IMPORT))
        assert not forbidden, f"{module} must not import {forbidden}"
    assert "run" in imported_packages("setfit_kd.cli.run")
    assert "losses" in imported_packages("setfit_kd.student.trainer")
