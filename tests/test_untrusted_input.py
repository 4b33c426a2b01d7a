"""Malicious files and folders on the command line: no code runs, no hang, no full memory, no access outside."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import read_tree
from click.testing import CliRunner, Result
from conftest import FAST, newswire

from setfit_kd import distill
from setfit_kd.cli import main
from setfit_kd.export.bundle import export_bundle
from setfit_kd.export.publication import prepare_publication
from setfit_kd.models.io import load_folder
from setfit_kd.training.checkpoints import Checkpoints

MAX_BYTES = 2_000_000_000
SPARSE_BYTES = 40_000_000_000

pytestmark = pytest.mark.timeout(60)  # far above the duration of each test; reading a pipe would never end


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def invoke(*arguments: str | Path, stdin: str = "y\n1\nyes\n" * 20) -> Result:
    """Run a command and check that it ends without a traceback and within the memory limit."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_memory()
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    assert peak_memory() - before < MAX_BYTES
    return result


def assert_refused(*arguments: str | Path, **options: Any) -> str:
    """Run a command, check that it fails with a short error message, and return stderr."""
    result = invoke(*arguments, **options)
    assert result.exit_code in (1, 2), result.output
    assert "Error: " in result.stderr
    assert len(result.stderr) < 10_000
    return result.stderr


@pytest.fixture(scope="module")
def finished(tiny_teacher: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished run, shared by the tests; do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    models = {"teacher": str(tiny_teacher), "student": str(tiny_student)}
    distill(*["bundled:newswire"] * 3, **{**FAST, **models, "pool_size": 40, "baseline": False, "output_dir": folder})
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def shared_bundle(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    texts = [row["text"] for row in newswire("train")[:20]]
    export_bundle(load_folder(finished / "student"), folder, texts=texts, format="onnx", min_agreement=0.9)
    return folder


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_bundle, tmp_path / "bundle"))


# Code in model folders

SPY = "from pathlib import Path\nPath({path!r}).write_text('ran')\nfrom transformers import {name} as Spy\n"
CLASSIFIER_ARCHITECTURE = ["BertForSequenceClassification"]


def change_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def add_spies(folder: Path, evidence: Path) -> None:
    """Add Python files that record their execution, and refer to them in every configuration that can name code."""
    for file, name in (("spy_config", "BertConfig"), ("spy_model", "BertModel"), ("spy_tokenizer", "BertTokenizer")):
        (folder / f"{file}.py").write_text(SPY.format(path=str(evidence), name=name))
    models = ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForMaskedLM")
    names = {"AutoConfig": "spy_config.Spy", **dict.fromkeys(models, "spy_model.Spy")}
    tokenizer = {"AutoTokenizer": ["spy_tokenizer.Spy", "spy_tokenizer.Spy"], "AutoProcessor": "spy_tokenizer.Spy"}
    change_json(folder / "config.json", auto_map={**names, **tokenizer})
    change_json(folder / "tokenizer_config.json", auto_map=tokenizer)
    change_json(folder / "processor_config.json", auto_map=tokenizer, processor_class="Spy")


def known_types(folder: Path) -> None:
    """Keep the types of model and tokenizer."""


def unknown_model_type(folder: Path) -> None:
    change_json(folder / "config.json", model_type="spy")


def unknown_tokenizer_class(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", tokenizer_class="Spy")


DRY_RUN = ("run", "--preset", "newswire", "--device", "cpu", "--dry-run")
COMMANDS: dict[str, Callable[[Path, Path], tuple[Any, ...]]] = {
    "teacher": lambda model, safe: (*DRY_RUN, "--teacher", model, "--student", safe),
    "transformer teacher": lambda model, safe: (*DRY_RUN, "--teacher", f"transformer:{model}", "--student", safe),
    "student": lambda model, safe: (*DRY_RUN, "--teacher", safe, "--student", model),
    "transformer student": lambda model, safe: (*DRY_RUN, "--teacher", safe, "--student", f"transformer:{model}"),
    "layers": lambda model, safe: (*DRY_RUN, "--teacher", safe, "--student", f"layers:1@{model}"),
    "static": lambda model, safe: (*DRY_RUN, "--teacher", safe, "--student", f"static:8@{model}"),
    "blank": lambda model, safe: (*DRY_RUN, "--teacher", safe, "--student", f"blank:{model}"),
    "augment": lambda model, safe: (*DRY_RUN, "--teacher", safe, "--student", safe, "--augment", "9",
                                    "--augment-model", model),
    "finetune": lambda model, _: ("finetune", model, "--labeled", "few.jsonl", "--output-dir", "out", "--steps", "1",
                                  "--device", "cpu"),
    "predict": lambda model, _: ("predict", model, "--device", "cpu"),
    "evaluate": lambda model, _: ("evaluate", model, "--eval", "bundled:newswire", "--device", "cpu"),
    "export": lambda model, _: ("export", model, "--output-dir", "out"),
    "push": lambda model, _: ("push", model, "me/news", "--dry-run"),
}  # fmt: skip


@pytest.mark.parametrize("change_types", [known_types, unknown_model_type, unknown_tokenizer_class])
@pytest.mark.parametrize("is_classifier", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_code_in_model_folder_never_runs(
    command: str,
    is_classifier: bool,
    change_types: Callable[[Path], None],
    finished: Path,
    tiny_student: Path,
    tmp_path: Path,
) -> None:
    """Answers of consent are available on stdin, among the texts to classify."""
    uses_head = command in ("predict", "evaluate", "export", "push")
    if is_classifier and command in ("layers", "static", "student", "teacher"):
        pytest.skip("same as without is_classifier")
    model = Path(shutil.copytree(finished / "student" if uses_head else tiny_student, tmp_path / "model"))
    if is_classifier:  # a transformers folder
        (model / "modules.json").unlink()
        change_json(model / "config.json", architectures=CLASSIFIER_ARCHITECTURE)
    rows = newswire("train")[:40]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    add_spies(model, tmp_path / "evidence")
    change_types(model)
    result = invoke(*COMMANDS[command](model, tiny_student))
    assert not (tmp_path / "evidence").exists()
    assert result.exit_code == 0 or str(model) in result.stderr  # refused because of the model, not of the flags


@pytest.mark.parametrize("path", ["../elsewhere", "/elsewhere", 7])
@pytest.mark.parametrize("command", ["teacher", "transformer teacher", "predict", "push"])
def test_modules_outside_the_folder_are_refused(command: str, path: Any, finished: Path, tiny_student: Path) -> None:
    model = Path(shutil.copytree(finished / "student", "model"))
    shutil.copytree(finished / "student", "elsewhere")
    modules = json.loads((model / "modules.json").read_text())
    modules[0]["path"] = str(Path("elsewhere").resolve()) if path == "/elsewhere" else path
    (model / "modules.json").write_text(json.dumps(modules))
    assert "modules.json points to" in assert_refused(*COMMANDS[command](model, tiny_student))


# Symbolic links in run folders

LINKED = (
    "seeds", "students", "student", "evaluation", "evaluation/student", "checkpoints", ".student.0123abcd", "signals",
    "student/README.md", "run.log", "run.json", "report.html", "metrics.json", ".lock",
)  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
def test_links_in_run_folder_are_not_followed(name: str, run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "folder" / "7").mkdir(parents=True)
    (outside / "folder" / "README.md").write_text("mine")
    (outside / "folder" / ".new.0123abcd").mkdir()
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    content = path.read_bytes() if path.is_file() else b""
    (outside / "file").write_bytes(content)
    path.unlink(missing_ok=True)
    is_file = ("." in Path(name).name[1:] and not name.endswith("0123abcd")) or name == ".lock"
    path.symlink_to(outside / ("file" if is_file else "folder"))
    before = read_tree(outside)
    for command in (
        ("run", "--resume", run, "--epochs", "2"),
        (*DRY_RUN[:-1], "--teacher", "x", "--output-dir", run, "--overwrite"),
        ("report", run),
    ):
        assert assert_refused(*command)
        assert read_tree(outside) == before
    assert "is a symbolic link" in assert_refused("run", "--resume", run)


def test_links_to_run_folder_are_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(run)
    (run / "notes").symlink_to(tmp_path / "elsewhere")  # files that do not belong to the run are ignored
    assert invoke("report", tmp_path / "linked").exit_code == 0
    assert invoke("run", "--resume", tmp_path / "linked").exit_code == 0
    assert (run / "notes").is_symlink()


# Uploads


def test_push_excludes_links_and_recreates_the_pickled_head(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    student = run / "student"
    for name in ("README.md", "vocab.txt"):
        (student / name).unlink(missing_ok=True)
        (student / name).symlink_to(tmp_path / "secret")
    os.mkfifo(student / "merges.txt")
    assert "merges.txt" in assert_refused("push", run, "me/news", "--dry-run")
    (student / "merges.txt").unlink()
    (student / "model_head.pkl").write_bytes(b"replaced")
    publication = prepare_publication(run, "me/news")
    assert {"README.md", "vocab.txt"} <= set(publication.skipped)
    assert {"README.md", "vocab.txt"}.isdisjoint(publication.files)
    assert "secret" not in str(publication.files)
    import io

    import joblib

    pickled = publication.files["model_head.pkl"]
    assert isinstance(pickled, bytes)
    head, expected = joblib.load(io.BytesIO(pickled)), load_folder(student).model_head
    assert np.array_equal(head.coef_, expected.coef_)
    assert np.array_equal(head.classes_, expected.classes_)


# Files that never end or do not fit in memory


def make_sparse(path: Path) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(SPARSE_BYTES)


def make_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link_to_zeros(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


BAD_FILES = [make_sparse, make_pipe, link_to_zeros]
MODEL_FILES = ["config.json", "modules.json", "tokenizer.json", "tokenizer_config.json", "config_setfit.json",
               "head.json", "head.safetensors", "model.safetensors", "1_Pooling/config.json", "README.md"]  # fmt: skip


@pytest.mark.parametrize("replace", BAD_FILES)
@pytest.mark.parametrize("name", MODEL_FILES)
def test_model_files_must_be_regular(name: str, replace: Callable[[Path], None], finished: Path) -> None:
    model = Path(shutil.copytree(finished / "student", "model"))
    replace(model / name)
    assert_refused("predict", model, "some text", "--device", "cpu")


@pytest.mark.parametrize("replace", BAD_FILES)
@pytest.mark.parametrize("name", ["manifest.json", "labels.json", "tokenizer.json", "model.onnx"])
def test_bundle_files_must_be_regular(name: str, replace: Callable[[Path], None], bundle: Path) -> None:
    replace(bundle / name)
    assert_refused("predict", bundle, "some text")


@pytest.mark.parametrize("replace", BAD_FILES)
@pytest.mark.parametrize(
    "name", ["run.json", "config.yaml", "signals/texts.jsonl", "signals/signals.json", "signals/embeddings.npy",
             "evaluation/texts.jsonl", "evaluation/student/measured.json", "evaluation/student/probabilities.npy"]
)  # fmt: skip
def test_run_files_must_be_regular(name: str, replace: Callable[[Path], None], run: Path) -> None:
    replace(run / name)
    if name.startswith("signals"):
        assert_refused("export", run, "--output-dir", "bundle")
    else:
        assert_refused("report", run)


@pytest.mark.parametrize("replace", BAD_FILES)
def test_config_file_must_be_regular(replace: Callable[[Path], None]) -> None:
    replace(Path("settings.yaml"))
    assert_refused("run", "--config", "settings.yaml")


YAML_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [
        YAML_BOMB,
        "epochs: " + "[" * 20_000,
        "epochs: " + "9" * 200_000,
        "x" * 200_000 + ": 1",
        "epochs: " + "1:" * 90_000,
    ],
    ids=["aliases", "nesting", "digits", "name", "base 60"],
)
def test_expanding_config_file_is_refused(content: str) -> None:
    Path("settings.yaml").write_text(content)
    assert_refused("run", "--config", "settings.yaml", "--device", "cpu")


def replace_in_bundle(bundle: Path, name: str, content: bytes) -> None:
    """Replace a file of a bundle and its hash in the manifest."""
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def looping_graph(op_type: str) -> bytes:
    """Return an ONNX graph with a loop of 2^62 iterations."""
    from onnx import TensorProto, helper

    iterations = helper.make_tensor("many", TensorProto.INT64, [], [1 << 62])
    condition = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, 4])
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("Identity", ["state"], ["next"])],
        "body",
        [helper.make_tensor_value_info("round", TensorProto.INT64, []),
         helper.make_tensor_value_info("go", TensorProto.BOOL, []), state],
        [helper.make_tensor_value_info("goes", TensorProto.BOOL, []),
         helper.make_tensor_value_info("next", TensorProto.FLOAT, [1, 4])],
    )  # fmt: skip
    start = helper.make_tensor("start", TensorProto.FLOAT, [1, 4], [0.25] * 4)
    nodes = [
        helper.make_node("Constant", [], ["n"], value=iterations),
        helper.make_node("Constant", [], ["c"], value=condition),
        helper.make_node("Constant", [], ["s"], value=start),
        helper.make_node(op_type, ["n", "c", "s"], ["probabilities"], body=body),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "t"]) for name in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph(nodes, "graph", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("op_type", ["Loop", "Scan"])
def test_endless_graph_is_refused(op_type: str, bundle: Path) -> None:
    replace_in_bundle(bundle, "model.onnx", looping_graph(op_type))
    assert "contains loops" in assert_refused("predict", bundle, "some text")


PANICKING_POST_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[NONE]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}
"""Post-processor with a missing token, on which the tokenizers library panics."""


def test_panicking_tokenizer_is_an_error(bundle: Path, finished: Path, tiny_student: Path) -> None:
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    replace_in_bundle(
        bundle, "tokenizer.json", json.dumps({**tokenizer, "post_processor": PANICKING_POST_PROCESSOR}).encode()
    )
    assert "PanicException" in assert_refused("predict", bundle, "some text")
    model = Path(shutil.copytree(finished / "student", "model"))
    change_json(model / "tokenizer.json", post_processor=PANICKING_POST_PROCESSOR)
    for command in ("predict", "evaluate"):
        assert "The tokenizer failed" in assert_refused(*COMMANDS[command](model, tiny_student))


def test_failing_graph_is_an_error(bundle: Path) -> None:
    from onnx import TensorProto, helper

    node = helper.make_node("Reshape", ["input_ids", "shape"], ["flat"])
    cast = helper.make_node("Cast", ["flat"], ["probabilities"], to=TensorProto.FLOAT)
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [977, 4])
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "t"]) for name in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([node, cast], "graph", inputs, [output], [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    replace_in_bundle(bundle, "model.onnx", model.SerializeToString())
    assert "The bundle cannot be used" in assert_refused("predict", bundle, "some text")


@pytest.mark.parametrize("replace", BAD_FILES)
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_data_set_files_must_be_regular(name: str, replace: Callable[[Path], None], tiny_student: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(newswire("train")[:8]).save_to_disk("data")
    if name.endswith("arrow") and replace is make_sparse:
        pytest.skip("Arrow files of any size are memory-mapped and read up to the first invalid record")
    replace(Path("data") / name)
    models = ("--teacher", tiny_student, "--student", tiny_student)
    assert "Cannot load data as a data set" in assert_refused(
        *DRY_RUN, *models, "--labeled", "data", "--unlabeled", "data"
    )


def test_overlapping_tensors_are_refused(bundle: Path) -> None:
    """Five thousand tensors that share half a megabyte would take 10 GB in float32."""
    size = 1 << 19
    entry = {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}
    header = json.dumps({f"t{number}": entry for number in range(5000)}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(size)
    change_json(bundle / "manifest.json", kind="static")
    for name in ("embeddings.safetensors", "head.safetensors"):
        replace_in_bundle(bundle, name, content)
    assert "overlap" in assert_refused("predict", bundle, "some text")


def test_messages_are_bounded(run: Path, bundle: Path) -> None:
    replace_in_bundle(bundle, "labels.json", json.dumps(["x" * 3_000_000]).encode())
    assert_refused("predict", bundle, "some text")
    change_json(run / "student" / "config_setfit.json", labels=["x" * 3_000_000])
    assert_refused("predict", run, "some text", "--device", "cpu")
    manifest = json.loads((run / "run.json").read_text())
    manifest["stages"]["x" * 3_000_000] = manifest["stages"]["student"]
    (run / "run.json").write_text(json.dumps(manifest))
    assert_refused("run", "--resume", run)


# Values of the wrong type


@pytest.mark.parametrize(
    ("key", "value"),
    [("stages", []), ("stages", {"student": 7}), ("stages", {"student": {"inputs": 7}}),
     ("format", None), ("device", 7), ("precision", "bf16"), ("precision", {"name": []}), ("finished", {})],
)  # fmt: skip
def test_run_json_with_wrong_types_is_refused(key: str, value: Any, run: Path) -> None:
    change_json(run / "run.json", **{key: value})
    assert "run.json" in assert_refused("run", "--resume", run)


def test_weights_with_nan_are_refused(finished: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = Path(shutil.copytree(finished / "student", "model"))
    for name in ("head.safetensors", "model.safetensors"):
        weights = load_file(model / name)
        next(iter(weights.values())).flat[0] = np.nan
        save_file(weights, model / name, metadata={"format": "pt"})
        for command in ("predict", "export", "push", "teacher"):
            if command != "teacher" or name.startswith("model"):
                assert "not all finite" in assert_refused(*COMMANDS[command](model, finished / "teacher"))
        shutil.copyfile(finished / "student" / name, model / name)


def test_evaluation_with_nan_is_refused(run: Path) -> None:
    file = run / "evaluation" / "student" / "probabilities.npy"
    probabilities = np.load(file)
    probabilities[0] = np.nan
    np.save(file, probabilities)
    assert "must be finite" in assert_refused("report", run)


def test_hub_name_with_space_is_refused_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "'my model'" in assert_refused("predict", "my model", "some text")


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_checkpoint_with_pickle_is_removed(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker file holds matching hashes, which an attacker can compute."""
    import pickle

    from synthetic import raise_at_step

    class Spy:
        def __reduce__(self) -> Any:
            return Path.write_text, (tmp_path / "evidence", "ran")

    command = ("run", "--resume", run, "--epochs", "3", "--checkpoint-seconds", "1e-9")
    with monkeypatch.context() as patch:
        raise_at_step(patch, 2, KeyboardInterrupt)
        assert invoke(*command).exit_code == 130
    (checkpoint,) = (run / "checkpoints").glob("*/checkpoint-*")
    (checkpoint / name).write_bytes(pickle.dumps(Spy()))
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in checkpoint.iterdir()
        if path.name != "whole.json"
    }
    (checkpoint / "whole.json").write_text(json.dumps(hashes))
    assert "It was removed" in assert_refused(*command)
    assert not (tmp_path / "evidence").exists()
    assert invoke(*command).exit_code == 0


def test_checkpoint_that_names_a_device_is_removed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "whole.json").write_text(json.dumps({"/dev/zero": "0"}))
    assert Checkpoints(tmp_path, seconds=1).latest() is None
    assert not checkpoint.exists()
