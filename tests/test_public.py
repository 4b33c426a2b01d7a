"""The public face of the package, and which of its parts may know of which."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
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


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Every name of ours that a file imports, however deep inside a function."""
    return set(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            named = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in named if name.startswith("setfit_kd."))


def rooms(module: str) -> set[str]:
    """The parts of the package, such as ``data``, that a module imports from."""
    return {name.split(".")[1] for name in imports(modules()[module])} & {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()
    }


GROUND = {"temperature", "errors", "escape", "files", "hashing", "config", "quiet", "progress", "memory", "arrays"}
STAGE = GROUND | {"data", "models", "objectives", "signals", "training", "precision"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "escape": set(),
    "quiet": set(),
    "progress": set(),
    "files": {"errors"},
    "hashing": set(),
    "config": {"errors", "files"},
    "memory": {"errors"},
    "arrays": {"errors", "files"},
    "precision": {"errors", "files", "memory"},
    "objectives": {"arrays"},
    "signals": {"errors", "files", "arrays", "temperature"},
    "temperature": set(),
    "hub": GROUND,
    "models": GROUND | {"hub", "runtime"},
    "runtime": set(),
    "classifiers": {"errors", "progress", "runtime", "models"},
    "predictions": {"classifiers", "errors", "escape", "files", "quiet", "runtime"},
    "speed": {"errors", "files", "classifiers"},
    "export": GROUND | {"models", "runtime"},
    "data": GROUND | {"hub", "signals"},
    "checkpoints": {"errors", "files", "memory"},
    "training": {"checkpoints", "config", "errors", "memory", "models", "precision", "progress"},
    "looks": set(),
    "finetune": STAGE | {"evaluation", "looks"},
    "teacher": STAGE | {"finetune"},
    "student": STAGE | {"looks", "runtime"},
    "evaluation": STAGE,
    "runfolder": GROUND,
    "journal": {"errors", "memory", "runfolder", "training"},
    "stages": STAGE | {"hashing", "teacher", "student", "evaluation", "runfolder", "journal"},
    "widening": STAGE | {"runfolder", "journal", "stages"},
    "teaching": STAGE | {"teacher", "student", "evaluation", "runfolder", "journal", "stages"},
    "report": GROUND | {"hub", "data", "evaluation", "runfolder"},
    "publish": {"errors", "hub", "models"},
    "pipeline": STAGE
    | {"hub", "student", "teacher", "evaluation", "runfolder", "journal", "stages", "teaching", "widening", "report"},
    "planning": {"config", "memory", "teacher", "student", "pipeline"},
    "cli": STAGE
    | {
        "hub",
        "teacher",
        "finetune",
        "evaluation",
        "runfolder",
        "pipeline",
        "planning",
        "classifiers",
        "predictions",
        "speed",
        "export",
        "report",
        "publish",
    },
    "__main__": {"cli"},
}
"""Which rooms a room may import from: data moves one way, and no two rooms know each other."""


def test_every_room_has_its_rule() -> None:
    assert set(MAY_IMPORT) == {name.split(".")[1] for name in modules() if "." in name}


@pytest.mark.parametrize("module", [name for name in modules() if "." in name])
def test_imports_go_one_way_and_not_into_insides(module: str) -> None:
    room = module.split(".")[1]
    assert rooms(module) - {room} <= MAY_IMPORT[room]
    insides = {name for name in imports(modules()[module]) & set(modules()) if name.count(".") > 1}
    assert {name for name in insides if name.split(".")[1] != room} == set()


def test_the_rules_above_look_at_real_modules() -> None:
    assert "pipeline" in rooms("setfit_kd.cli.run")
    assert "objectives" in rooms("setfit_kd.student.trainer")
    assert all(importlib.util.find_spec(name) for name in modules())
