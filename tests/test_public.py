"""The public face of the package, and which of its parts may know of which."""

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


def test_the_public_names_are_exactly_these() -> None:
    assert len(setfit_kd.__all__) <= 10
    assert set(setfit_kd.__all__) == PUBLIC
    assert set(dir(setfit_kd)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_public_name_can_be_had_and_explains_itself(name: str) -> None:
    value = getattr(setfit_kd, name)
    assert value.__name__ == name
    assert value.__doc__
    assert value.__module__.startswith("setfit_kd.")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = setfit_kd.nonsense


HEAVY = ["torch", "setfit", "transformers", "sentence_transformers", "datasets", "sklearn", "pandas"]


@pytest.mark.parametrize("statement", ["import setfit_kd", "import setfit_kd.cli", "from setfit_kd import RunConfig"])
def test_importing_is_light(statement: str) -> None:
    program = f"{statement}\nimport sys\nprint(*(set(sys.modules) & set({HEAVY!r})))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert run.stdout.split() == []


def test_the_package_ships_its_types() -> None:
    assert files("setfit_kd").joinpath("py.typed").is_file()


# Directions of import

GROUND = {"errors", "utils", "config", "memory"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "runtime": set(),
    "utils": {"errors"},
    "config": {"errors", "utils"},
    "memory": {"errors"},
    "hub": {"errors", "utils", "config"},
    "losses": {"utils"},
    "data": GROUND | {"hub"},
    "models": GROUND | {"hub", "runtime"},
    "signals": GROUND | {"data", "models"},
    "training": GROUND | {"models"},
    "evaluation": GROUND | {"data", "models"},
    "augment": GROUND | {"data", "models", "signals", "runtime"},
    "finetune": GROUND | {"data", "models", "losses", "training", "evaluation"},
    "teacher": GROUND | {"data", "models", "losses", "training", "signals", "finetune"},
    "student": GROUND | {"data", "models", "losses", "training", "signals"},
    "inference": {"errors", "utils", "models", "runtime"},
    "export": GROUND | {"hub", "models", "runtime"},
    "run_folder": {"errors", "utils", "config"},
    "report": GROUND | {"hub", "data", "evaluation", "run_folder"},
    "run": GROUND
    | {"hub", "data", "models", "signals", "training", "evaluation", "augment", "teacher", "student", "run_folder"}
    | {"report"},
    "cli": GROUND
    | {"hub", "data", "models", "signals", "evaluation", "finetune", "inference", "export", "run_folder", "report"}
    | {"run"},
    "__main__": {"cli"},
}
"""Packages that a package may import, lowest first: none imports one that comes after it."""

OPEN = {"utils", "training", "inference"}
"""Packages without a facade, whose modules are imported directly: some of them load torch and others must not."""


@cache
def modules() -> dict[str, Path]:
    by_name = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        by_name[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return by_name


def imports(path: Path) -> Iterator[str]:
    """Yield every name of setfit_kd that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.startswith("setfit_kd."))


def imported_packages(module: str) -> set[str]:
    """Packages of setfit_kd that a module imports from."""
    return {name.split(".")[1] for name in imports(modules()[module])} & set(MAY_IMPORT)


def test_each_package_has_a_rule() -> None:
    assert set(MAY_IMPORT) == {name.split(".")[1] for name in modules() if "." in name}


def test_the_rules_allow_no_cycles() -> None:
    packages = list(MAY_IMPORT)
    for number, package in enumerate(packages):
        assert MAY_IMPORT[package] <= set(packages[:number])


@pytest.mark.parametrize("module", [name for name in modules() if "." in name])
def test_a_module_imports_only_what_its_package_may(module: str) -> None:
    package = module.split(".")[1]
    assert imported_packages(module) - {package} <= MAY_IMPORT[package]


@pytest.mark.parametrize("module", [name for name in modules() if "." in name])
def test_other_packages_are_imported_through_their_facade(module: str) -> None:
    inner = {name for name in set(imports(modules()[module])) & set(modules()) if name.count(".") > 1}
    assert {name for name in inner if name.split(".")[1] not in {module.split(".")[1], *OPEN}} == set()


def test_the_import_checks_see_real_imports() -> None:
    assert "run" in imported_packages("setfit_kd.cli.run")
    assert "losses" in imported_packages("setfit_kd.student.trainer")
    assert all(importlib.util.find_spec(name) for name in modules())
