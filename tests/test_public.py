"""Public names, lazy imports and import rules between packages."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest

import setfit_kd

PUBLIC = {
    "RunConfig",
    "RunResult",
    "TeacherSignals",
    "distill",
    "evaluate",
    "load",
    "score",
    "train_student",
    "train_teacher",
}
PACKAGE = Path(setfit_kd.__file__).parent


def test_public_names() -> None:
    assert len(setfit_kd.__all__) <= 10
    assert set(setfit_kd.__all__) == PUBLIC
    assert set(dir(setfit_kd)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_is_documented(name: str) -> None:
    value = getattr(setfit_kd, name)
    assert value.__name__ == name
    assert value.__doc__
    assert value.__module__.startswith("setfit_kd.")


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = setfit_kd.nonsense


HEAVY = ["torch", "setfit", "transformers", "sentence_transformers", "datasets", "sklearn", "pandas"]


@pytest.mark.parametrize(
    "statement",
    [
        "import setfit_kd",
        "import setfit_kd.cli",
        "import setfit_kd.export.publication",
        "from setfit_kd import RunConfig",
    ],
)
def test_import_does_not_load_heavy_packages(statement: str) -> None:
    program = f"{statement}\nimport sys\nprint(*(set(sys.modules) & set({HEAVY!r})))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert run.stdout.split() == []


def test_package_includes_py_typed() -> None:
    assert files("setfit_kd").joinpath("py.typed").is_file()


# Import rules between packages

BASE = {"errors", "utils", "config", "memory"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "runtime": set(),
    "utils": {"errors"},
    "config": {"errors", "utils"},
    "memory": {"errors"},
    "hub": {"errors", "utils", "config"},
    "losses": {"utils"},
    "data": BASE | {"hub"},
    "models": BASE | {"hub", "runtime"},
    "signals": BASE | {"data", "models"},
    "training": BASE | {"models"},
    "evaluation": BASE | {"data", "models"},
    "augment": BASE | {"data", "models", "signals", "runtime"},
    "finetune": BASE | {"data", "models", "losses", "training", "evaluation"},
    "teacher": BASE | {"data", "models", "losses", "training", "signals", "finetune"},
    "student": BASE | {"data", "models", "losses", "training", "signals"},
    "inference": {"errors", "utils", "models", "runtime"},
    "export": BASE | {"hub", "models", "runtime"},
    "run_folder": {"errors", "utils", "config"},
    "report": BASE | {"hub", "data", "evaluation", "run_folder"},
    "run": BASE
    | {"hub", "data", "models", "signals", "training", "evaluation", "augment", "teacher", "student", "run_folder"}
    | {"report"},
    "cli": BASE
    | {"hub", "data", "models", "signals", "evaluation", "finetune", "inference", "export", "run_folder", "report"}
    | {"run"},
    "__main__": {"cli"},
}
"""Packages that a package may import. No package imports a later one."""


@cache
def modules() -> dict[str, Path]:
    """Return the files of all modules by dotted name."""
    by_name = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        by_name[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return by_name


def imports(path: Path) -> Iterator[str]:
    """Yield every name of setfit_kd that a file imports, including imports in functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.startswith("setfit_kd."))


def imported_packages(module: str) -> set[str]:
    """Return the packages of setfit_kd that a module imports from."""
    return {name.split(".")[1] for name in imports(modules()[module])} & set(MAY_IMPORT)


def test_every_package_has_a_rule() -> None:
    assert set(MAY_IMPORT) == {name.split(".")[1] for name in modules() if "." in name}


def test_rules_allow_no_cycles() -> None:
    packages = list(MAY_IMPORT)
    for index, package in enumerate(packages):
        assert MAY_IMPORT[package] <= set(packages[:index])


@pytest.mark.parametrize("module", [name for name in modules() if "." in name])
def test_module_follows_import_rules(module: str) -> None:
    package = module.split(".")[1]
    assert imported_packages(module) - {package} <= MAY_IMPORT[package]


def test_import_checks_detect_imports() -> None:
    assert "run" in imported_packages("setfit_kd.cli.run")
    assert "losses" in imported_packages("setfit_kd.student.trainer")
    assert all(importlib.util.find_spec(name) for name in modules())
