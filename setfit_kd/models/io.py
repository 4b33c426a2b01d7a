"""Save and load SetFit models and transformer classifiers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.errors import ModelError
from setfit_kd.memory.backoff import move_model
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import BodySource, family_of, load_body, locate_model, transformer_label_names
from setfit_kd.models.heads import load_head, new_head, save_head
from setfit_kd.models.transformer_head import get_head, set_head, transformer_module
from setfit_kd.utils.atomic_io import atomic_folder, replace_files
from setfit_kd.utils.console import quiet_libraries
from setfit_kd.utils.escape import escape_markdown, short_class_name, truncate
from setfit_kd.utils.files import check_regular_file, read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

_PICKLED_HEAD = "model_head.pkl"
_SETFIT_CONFIG = "config_setfit.json"
# A run folder contains its config from the start, and its student once that is trained.
_RUN_MARKER, _STUDENT, _STUDENTS = "config.yaml", "student", "students"
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
classify("...", truncation=True)
```
"""


def new_model(body: SentenceTransformer, label_names: Sequence[str]) -> SetFitModel:
    """Create a SetFit model from a body and an unfitted logistic regression."""
    with quiet_libraries():
        from setfit import SetFitModel

        return SetFitModel(model_body=body, model_head=new_head(), labels=list(label_names))


def save_model(model: SetFitModel, folder: str | Path, *, title: str = "Text classifier") -> None:
    """Save a model atomically, in a format that both `load` and SetFit's ``from_pretrained`` can read.

    A transformer is saved in the format of ``transformers`` instead.

    Raises:
        OutputError: If the folder already exists or cannot be written.
    """
    labels = list(model.labels or [])
    with atomic_folder(folder) as part, quiet_libraries():
        is_transformer = family_of(model.model_body) == "transformer"
        classes = escape_markdown(", ".join(map(short_class_name, labels)))
        card = _TRANSFORMER_CARD if is_transformer else _CARD
        card = card.format(title=escape_markdown(truncate(title)), n_classes=len(labels), classes=classes)
        (part / "README.md").write_text(card, encoding="utf-8")
        if is_transformer:
            _write_transformer(model, part)
            return
        model.model_body.save_pretrained(str(part), create_model_card=False)
        config = {"labels": labels, "normalize_embeddings": model.normalize_embeddings}
        (part / _SETFIT_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        _write_heads(model, part)


def _write_transformer(model: SetFitModel, folder: Path) -> None:
    set_head(model.model_head, model.model_body)
    transformer_module(model.model_body).save(str(folder))


def classifier_folder(path: str | Path) -> Path:
    """Return the folder to load a classifier from: a run's student, a model folder, or a local copy from the hub.

    Raises:
        ModelError: If a run has no student or several students, or the folder holds no model.
        UnavailableError: If the hub cannot be reached.
    """
    folder = Path(path)
    if (folder / _RUN_MARKER).is_file() and not (folder / "config.json").is_file():
        names = sorted(student.name for student in (folder / _STUDENTS).glob("*") if student.is_dir())
        student = folder / _STUDENT
        if names and not student.is_dir():
            raise ModelError(
                f"The run {path} has {len(names)} students: {', '.join(names)}.",
                hint=f"Choose one, for example {path}/{_STUDENTS}/{names[0]}.",
            )
        if not student.is_dir():
            raise ModelError(f"The run {path} has no student yet.", hint="Finish the run first.")
        return student
    return locate_model(path)


def load(path: str | Path, *, device: str = "auto", trust_pickle: bool = False) -> SetFitModel:
    """Load a classifier: the student of a run folder, or a SetFit model or transformer from a folder or the hub.

    Args:
        path: Folder or hub name.
        device: See `RunConfig`.
        trust_pickle: Also load a head that is stored only as a pickle. A pickle can run arbitrary code.

    Raises:
        ConfigError: If the device is not available.
        ModelError: If there is no classifier, or its head is only a pickle and ``trust_pickle`` is not set.
        UnavailableError: If the hub cannot be reached.
    """
    model = load_folder(classifier_folder(path), trust_pickle=trust_pickle)
    move_model(model.model_body, resolve_device(device), phase="Loading model")
    return model


def load_folder(folder: Path, *, trust_pickle: bool = False) -> SetFitModel:
    """Load the SetFit model or transformer in this folder on the CPU.

    Raises:
        ModelError: See `load`.
    """
    import joblib

    names = transformer_label_names(folder)
    if names is not None:
        if len(names) < 2:
            raise ModelError(f"The model in {folder} has a single output.", hint="Use a classifier.")
        model = new_model(BodySource(folder, "transformer").load(names), names)
        model.model_head = get_head(model.model_body)
        return model
    head = load_head(folder)
    if head is None:
        if not (folder / _PICKLED_HEAD).is_file():
            raise ModelError(f"The model in {folder} has no head.", hint="Use a run folder or a SetFit model.")
        if not trust_pickle:
            raise ModelError(
                f"The head in {folder} is a pickle, which can run arbitrary code.",
                hint="If you trust its author, add --trust-pickle (trust_pickle=True).",
            )
        try:
            head = joblib.load(check_regular_file(folder / _PICKLED_HEAD))
        except Exception as error:
            raise ModelError(
                f"Cannot unpickle the head in {folder}: {type(error).__name__}: {error}", hint="Train the model again."
            ) from error
    # scikit-learn's one-vs-rest and SetFit's own head set the first two; multi-output heads and chains have lists.
    if (
        getattr(head, "multilabel_", False)
        or getattr(head, "multitarget", False)
        or (isinstance(getattr(head, "classes_", None), list))
    ):
        raise ModelError(
            f"The head in {folder} predicts several labels per text, which is not supported.",
            hint="Use a classifier with one label per text.",
        )
    labels, normalize = _read_setfit_config(folder, head)
    model = new_model(load_body(folder), labels)
    width, expected = model.model_body.get_embedding_dimension(), getattr(head, "n_features_in_", None)
    if None not in (width, expected) and width != expected:
        raise ModelError(
            f"The body in {folder} must have {expected} dimensions to match its head, got {width}.",
            hint="Train the model again.",
        )
    model.model_head, model.normalize_embeddings = head, normalize
    return model


def with_saved_head(model: SetFitModel, folder: Path) -> SetFitModel:
    """Combine the body of a model with the head saved in a folder.

    Raises:
        ModelError: If the folder has no head.
    """
    head = load_head(folder)
    if head is None:
        raise ModelError(f"Found no head in {folder}.", hint="Train the model again.")
    result = new_model(model.model_body, model.labels or ())
    result.model_head, result.normalize_embeddings = head, model.normalize_embeddings
    return result


def replace_head(model: SetFitModel, folder: Path) -> None:
    """Replace the saved head in a folder that holds the same body.

    Raises:
        OutputError: If the folder cannot be written.
    """
    with replace_files(folder) as part, quiet_libraries():
        if family_of(model.model_body) == "transformer":
            _write_transformer(model, part)
        else:
            _write_heads(model, part)


def _write_heads(model: SetFitModel, folder: Path) -> None:
    import joblib

    joblib.dump(model.model_head, folder / _PICKLED_HEAD)
    save_head(model.model_head, folder)


def _read_setfit_config(folder: Path, head: Any) -> tuple[list[str], bool]:
    """Read the label names and whether embeddings are normalized."""
    path = folder / _SETFIT_CONFIG
    config: Any = {}
    if path.is_file():
        try:
            config = read_json(path)
        except (OSError, ValueError) as error:
            raise ModelError(f"Cannot read {path}: {error}", hint="Train the model again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold an object, got {type(config).__name__}.", hint="Train the model again.")
    classes = getattr(head, "classes_", None)
    labels = config.get("labels") or [str(name) for name in ([] if classes is None else classes)]
    matches = isinstance(labels, list)
    if matches and classes is not None:
        # String classes are matched by name: SetFit predicts them, regardless of the order of the labels.
        by_name = all(isinstance(name, str) for name in classes)
        matches = sorted(map(str, labels)) == sorted(classes) if by_name else len(labels) == len(classes)
        labels = [str(name) for name in classes] if by_name else labels
    if not matches:
        raise ModelError(
            f"The labels in {path} must match the classes of the head, {classes!s:.200}, got "
            f"{config.get('labels')!r:.200}.",
            hint="Train the model again.",
        )
    return labels, bool(config.get("normalize_embeddings", False))
