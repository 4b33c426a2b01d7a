"""Save and load SetFit models and transformer classifiers."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.errors import ModelError
from setfit_kd.memory.backoff import move_model
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import MODULES, BodySource, family_of, load_body, locate_model, transformer_label_names
from setfit_kd.models.heads import (
    HEAD_CONFIG,
    get_head,
    head_task,
    head_thresholds,
    load_head,
    new_head,
    save_head,
    set_head,
    set_thresholds,
)
from setfit_kd.tasks.classification import SINGLE_LABEL, Task
from setfit_kd.utils.atomic_io import atomic_folder, replace_files
from setfit_kd.utils.console import escape_markdown, quiet_libraries, short_class_name, truncate
from setfit_kd.utils.files import check_regular_file, read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

_PICKLED_HEAD = "model_head.pkl"
_SETFIT_CONFIG = "config_setfit.json"
_RETRAIN = "Train the model again."
_ENCODER = "SentenceTransformer"
_OTHER_MODELS = {
    "ForMaskedLM": ("a masked language model", "Fine-tune it on labels: setfit-kd finetune {} --labeled FILE"),
    "ForQuestionAnswering": ("a question answering model", 'Use it with: setfit-kd predict {} "QUESTION" "CONTEXT"'),
    _ENCODER: ("a sentence encoder", "Train a classifier with it: setfit-kd run --teacher {} --labeled FILE"),
}
"""Models that are no classifiers by the end of their architecture's name, and a command for each."""
# A run folder contains its config from the start, and its student once that is trained.
_RUN_MARKER, _STUDENT, _STUDENTS = "config.yaml", "student", "students"
BUNDLE = "bundle"
"""Subfolder of a student with its bundle, by which a few texts are classified without loading torch."""
_CARD = """---
library_name: setfit
pipeline_tag: text-classification
tags:
- setfit
- sentence-transformers
- text-classification
---

# {title}

A [SetFit](https://github.com/huggingface/setfit) model over {n_classes} classes: {classes}.

```python
from setfit import SetFitModel

model = SetFitModel.from_pretrained("path/to/this/folder")
model.predict(["..."])
```

The head is stored twice: as `model_head.pkl`, which SetFit reads, and as `head.safetensors` with `head.json`, which
`setfit_kd.load` reads without unpickling anything.
"""

_TRANSFORMER_CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags:
- text-classification
---

# {title}

A transformer for text classification over {n_classes} classes: {classes}.

```python
from transformers import pipeline

classify = pipeline("text-classification", model="path/to/this/folder")
classify("...", truncation=True{options})
```
"""


@dataclass(eq=False)
class LoadedClassifier:
    """The parts of a `SetFitModel` that prediction needs; importing SetFit takes seconds."""

    model_body: SentenceTransformer
    model_head: Any
    labels: list[str]
    normalize_embeddings: bool = False

    @property
    def has_differentiable_head(self) -> bool:
        """Whether the head is SetFit's torch module instead of a scikit-learn classifier."""
        return hasattr(self.model_head, "parameters")

    def to_setfit(self) -> SetFitModel:
        """Return a `SetFitModel` with the same parts."""
        model = new_model(self.model_body, self.labels, head_task(self.model_head))
        model.model_head, model.normalize_embeddings = self.model_head, self.normalize_embeddings
        return model


def new_model(body: SentenceTransformer, label_names: Sequence[str], task: Task = SINGLE_LABEL) -> SetFitModel:
    """Create a SetFit model from a body and an unfitted head for a task."""
    if family_of(body) == "transformer":
        features: Any = body[0]
        features.task = task
    with quiet_libraries():
        from setfit import SetFitModel

        options: Any = {"labels": list(label_names), "multi_target_strategy": task.multi_target_strategy}
        return SetFitModel(model_body=body, model_head=new_head(task), **options)


def save_model(
    model: SetFitModel,
    folder: str | Path,
    *,
    title: str = "Text classifier",
    add_files: Callable[[Path], None] = lambda _: None,
) -> None:
    """Save a model atomically, in a format that both `load` and SetFit's ``from_pretrained`` can read.

    A transformer is saved in the format of ``transformers`` instead. ``add_files`` writes more files into the folder.

    Raises:
        OutputError: If the folder already exists or cannot be written.
    """
    labels = list(model.labels or [])
    with atomic_folder(folder) as part, quiet_libraries(with_setfit=False):
        is_transformer = family_of(model.model_body) == "transformer"
        classes = escape_markdown(", ".join(map(short_class_name, labels)))
        card = _TRANSFORMER_CARD if is_transformer else _CARD
        options = "" if head_task(model.model_head) is SINGLE_LABEL else ", top_k=None"
        title = escape_markdown(truncate(title))
        card = card.format(title=title, n_classes=len(labels), classes=classes, options=options)
        (part / "README.md").write_text(card, encoding="utf-8")
        if not is_transformer:
            model.model_body.save_pretrained(str(part), create_model_card=False)
            config = {"labels": labels, "normalize_embeddings": model.normalize_embeddings}
            (part / _SETFIT_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        _write_head(model, part)
        add_files(part)


def replace_head(model: SetFitModel, folder: Path) -> None:
    """Replace the saved head in a folder that holds the same body."""
    with replace_files(folder) as part, quiet_libraries(with_setfit=False):
        _write_head(model, part)


def _write_head(model: SetFitModel, folder: Path) -> None:
    """Write the files of a head; those of a transformer hold its body, too."""
    import joblib

    if family_of(model.model_body) == "transformer":
        set_head(model.model_head, model.model_body)
        model.model_body[0].save(str(folder))
    else:
        joblib.dump(model.model_head, folder / _PICKLED_HEAD)
    if family_of(model.model_body) != "transformer" or head_thresholds(model.model_head) is not None:
        save_head(model.model_head, folder)


def classifier_folder(path: str | Path) -> Path:
    """Return the folder to load a classifier from: a run's student, a model folder, or a local copy from the hub.

    Raises:
        ModelError: If there is no such folder, it holds no model, or a run has no student or several students.
        UnavailableError: If the hub cannot be reached.
    """
    folder = Path(path)
    if (folder / _RUN_MARKER).is_file() and not (folder / "config.json").is_file():
        student = folder / _STUDENT
        if student.is_dir():
            return student
        names = sorted(student.name for student in (folder / _STUDENTS).glob("*") if student.is_dir())
        if names:
            message = f"The run {path} has {len(names)} students: {', '.join(names)}."
            raise ModelError(message, hint=f"Choose one, for example {path}/{_STUDENTS}/{names[0]}.")
        raise ModelError(f"The run {path} has no student yet.", hint="Finish the run first.")
    if not folder.exists() and "/" not in str(path) and not str(path).startswith("demo:"):
        message = f"No such file or folder: {path}"
        raise ModelError(message, hint="Check the path. Classifiers on the hub are named USER/NAME.")
    return locate_model(path)


def load(path: str | Path, *, device: str = "auto", trust_pickle: bool = False) -> SetFitModel:
    """Load a classifier: the student of a run folder, or a SetFit model or transformer from a folder or the hub.

    Args:
        path: Folder, or USER/NAME on the hub.
        device: See `RunConfig`.
        trust_pickle: Also load a head that is stored only as a pickle. A pickle can run arbitrary code.

    Raises:
        ConfigError: If the device is not available.
        ModelError: If there is no classifier, or its head is only a pickle and ``trust_pickle`` is not set.
        UnavailableError: If the hub cannot be reached.
    """
    return load_classifier(path, device=device, trust_pickle=trust_pickle).to_setfit()


def load_classifier(path: str | Path, *, device: str = "auto", trust_pickle: bool = False) -> LoadedClassifier:
    """Load a classifier for prediction, without SetFit; otherwise as `load`."""
    classifier = read_classifier(classifier_folder(path), trust_pickle=trust_pickle)
    move_model(classifier.model_body, resolve_device(device), phase="Loading model")
    return classifier


def load_folder(folder: Path) -> SetFitModel:
    """Load the SetFit model or transformer in a folder on the CPU, see `load`."""
    return read_classifier(folder).to_setfit()


def read_classifier(folder: Path, *, trust_pickle: bool = False) -> LoadedClassifier:
    """Load the classifier in a folder on the CPU, see `load_classifier`."""
    names = transformer_label_names(folder)
    if names is not None:
        if len(names) < 2:
            raise ModelError(f"The model in {folder} has a single output.", hint="Use a classifier.")
        body = BodySource(folder, "transformer").load(names)
        head, saved = get_head(body), load_head(folder)  # a transformer's saved head has its thresholds
        return LoadedClassifier(body, set_thresholds(head, head_thresholds(saved)) if saved else head, list(names))
    head = load_head(folder)
    if head is None:
        head = _unpickle_head(folder, trust_pickle)
    labels, normalize = _read_setfit_config(folder, head)
    body = load_body(folder)
    width, expected = body.get_embedding_dimension(), getattr(head, "n_features_in_", None)
    if None not in (width, expected) and width != expected:
        message = f"The body in {folder} must have {expected} dimensions to match its head, got {width}."
        raise ModelError(message, hint=_RETRAIN)
    return LoadedClassifier(body, head, labels, normalize)


def _unpickle_head(folder: Path, trust_pickle: bool) -> Any:
    import joblib

    if not (folder / _PICKLED_HEAD).is_file():
        raise no_classifier_error(folder)
    if not trust_pickle:
        message = f"The head in {folder} is a pickle, which can run arbitrary code."
        raise ModelError(message, hint="If you trust its author, add --trust-pickle (trust_pickle=True).")
    try:
        head = joblib.load(check_regular_file(folder / _PICKLED_HEAD))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"Cannot unpickle the head in {folder}: {reason}", hint=_RETRAIN) from error
    if isinstance(getattr(head, "classes_", None), list):  # several outputs or a chain
        message = f"The head in {folder} is a {type(head).__name__}, which is not supported."
        raise ModelError(message, hint='Train it with multi_target_strategy="one-vs-rest".')
    return head


def no_classifier_error(folder: Path) -> ModelError:
    """Return the error for a model without a head, which says what it is instead of a classifier."""
    names: list[str] = []
    if (folder / MODULES).is_file():
        is_setfit = any((folder / name).is_file() for name in (_SETFIT_CONFIG, _PICKLED_HEAD))
        names = [] if is_setfit else [_ENCODER]
    elif (folder / "config.json").is_file():
        names = read_json(folder / "config.json").get("architectures") or []
    for suffix, (kind, command) in _OTHER_MODELS.items():
        if any(str(name).endswith(suffix) for name in names):
            message = f"The model in {folder} is {kind}, not a classifier."
            return ModelError(message, hint=command.format(shlex.quote(str(folder))))
    message = f"The model in {folder} has no head: there is no {HEAD_CONFIG}."
    return ModelError(message, hint="Use a run folder or a SetFit model.")


def with_saved_head(model: SetFitModel, folder: Path) -> SetFitModel:
    """Combine the body of a model with the head saved in a folder."""
    result = copy.copy(model)
    result.model_head = load_head(folder)
    if result.model_head is None:
        raise ModelError(f"Found no head in {folder}.", hint=_RETRAIN)
    return result


def _read_setfit_config(folder: Path, head: Any) -> tuple[list[str], bool]:
    path = folder / _SETFIT_CONFIG
    try:
        config = read_json(path) if path.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, got {type(config).__name__}")
        saved, normalize = config.get("labels"), bool(config.get("normalize_embeddings", False))
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {path}: {error}", hint=_RETRAIN) from None
    classes = getattr(head, "classes_", None)
    names = [] if classes is None else [str(name) for name in classes]
    labels = saved or names
    matches = isinstance(labels, list) and (classes is None or len(labels) == len(names))
    if matches and classes is not None and all(isinstance(name, str) for name in classes):
        # String classes are matched by name: SetFit predicts them, regardless of the order of the labels.
        matches, labels = sorted(map(str, labels)) == sorted(names), names
    if not matches:
        message = f"The labels in {path} must match the classes of the head, {classes!s:.200}, got {saved!r:.200}."
        raise ModelError(message, hint=_RETRAIN)
    return labels, normalize
