"""Bundle in the folder of a student, and packages that predict loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import invoke, truncate_file
from conftest import FAST
from predictions import LABELS, predict_ok

from setfit_kd import distill
from setfit_kd.utils.files import folder_megabytes

TEXT = "Rain stops play on the third day"
SETTINGS: dict[str, Any] = {**FAST, "bundle": True, "student": "layers:1", "baseline": False, "pool_size": 50}


@pytest.fixture(scope="module")
def finished_run(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    distill(*["bundled:newswire"] * 3, output_dir=folder, teacher=str(tiny_teacher), **SETTINGS)
    return folder


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def probabilities(*arguments: str | Path, stdin: str | None = None) -> dict[str, float]:
    row: dict[str, Any] = json.loads(predict_ok(*arguments, stdin=stdin).stdout)
    return {str(name): float(value) for name, value in row["probabilities"].items()}


def test_bundle_agrees_with_torch_and_is_not_part_of_the_model(run: Path) -> None:
    by_bundle, by_torch = probabilities(run, TEXT), probabilities(run, TEXT, "--exact")
    np.testing.assert_allclose(list(by_bundle.values()), list(by_torch.values()), atol=2e-6)
    pushed = invoke("push", run, "me/news", "--dry-run").output
    assert "model.safetensors" in pushed
    assert "bundle" not in pushed
    shutil.rmtree(run / "student/bundle")
    megabytes = json.loads((run / "metrics.json").read_text())["student"]["megabytes"]
    assert megabytes == pytest.approx(folder_megabytes(run / "student"), abs=0.1)


def test_bundle_is_used_for_arguments_unless_torch_is_requested(run: Path, bundle: Path) -> None:
    shutil.rmtree(run / "student/bundle")
    shutil.copytree(bundle, run / "student/bundle")  # has other labels
    Path("in.txt").write_text(TEXT)
    assert list(probabilities(run, TEXT)) == list(probabilities(run / "student", TEXT)) == list(LABELS)
    for arguments in ([TEXT, "--exact"], ["--input", "in.txt"], []):
        assert set(probabilities(run, *arguments, stdin=TEXT)).isdisjoint(set(LABELS) - {"Sports"})
    assert "'mps' is not available" in invoke("predict", run, TEXT, "--device", "mps").stderr


def test_torch_replaces_an_unusable_bundle(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model = predict_ok(run, TEXT, "--exact"), run / "student/bundle/model.onnx"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        assert predict_ok(run, TEXT).output == expected.output
    for damage in (truncate_file, Path.unlink):
        damage(model)
        result = predict_ok(run, TEXT)
        assert result.stdout == expected.stdout
        assert "The bundle of the student is not used: " in result.stderr


def test_only_students_of_the_first_seed_have_a_bundle(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    several: dict[str, Any] = {"student": ["layers:1", "static:8"], "baseline": True, "seeds": 2}
    for name, settings in {"several": several, "failed": {}, "off": {"bundle": False}}.items():
        if name == "failed":
            monkeypatch.setattr("setfit_kd.export.bundle.write_graph", lambda *_, **__: 1 / 0)
        sources, models = ["bundled:newswire"] * 3, {"teacher": str(tiny_teacher)}
        distill(*sources, output_dir=name, **{**SETTINGS, **models, **settings})
        assert ("The student has no bundle" in caplog.text) == (name == "failed")
        caplog.clear()
    folders = [Path("several/students/layers-1"), Path("several/students/static-8")]
    assert sorted(Path().rglob("bundle")) == [folder / "bundle" for folder in folders]
    by_bundle, by_torch = (probabilities(folders[1], TEXT, *flags) for flags in ([], ["--exact"]))
    np.testing.assert_allclose(list(by_bundle.values()), list(by_torch.values()), atol=1e-3)
    assert predict_ok("failed", TEXT).output == predict_ok("off", TEXT).output


@pytest.mark.parametrize(
    ("flag", "loaded", "not_loaded"),
    [("--exact", "torch", {"setfit", "evaluate"}), ("-q", "onnxruntime", {"torch", "sklearn"})],
)
def test_predict_loads_few_packages(run: Path, flag: str, loaded: str, not_loaded: set[str]) -> None:
    program = "import sys, atexit, setfit_kd.cli as cli\natexit.register(lambda: print(*sys.modules))\ncli.main()"
    command = [sys.executable, "-c", program, "predict", str(run), TEXT, flag]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1].split()
    assert loaded in names
    assert not_loaded.isdisjoint(names)
