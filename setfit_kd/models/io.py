"""Whole SetFit models on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.errors import ModelError
from setfit_kd.memory import move_model, resolve_device
from setfit_kd.models.bodies import BodySource, family_of, load_body, locate, transformer_classes
from setfit_kd.models.heads import load_head, new_head, save_head
from setfit_kd.models.transformer_head import get_head, set_head, transformer_module
from setfit_kd.utils.atomic_io import atomic_folder, replace_files
from setfit_kd.utils.console import quiet_libraries
from setfit_kd.utils.escape import class_name, markdown, truncate
from setfit_kd.utils.files import check_regular_file, read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

_PICKLED_HEAD = "model_head.pkl"
_SETFIT_CONFIG = "config_setfit.json"
# A run writes its settings first and its student as soon as it is trained.
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
    """A SetFit model of a body and an unfitted logistic regression."""
    with quiet_libraries():
        from setfit import SetFitModel

        return SetFitModel(model_body=body, model_head=new_head(), labels=list(label_names))


def save_model(model: SetFitModel, folder: str | Path, *, title: str = "Text classifier") -> None:
    """Write a model so that both `load` and SetFit's ``from_pretrained`` read it; whole or not at all.

    Raises:
        OutputError: The folder exists already or cannot be written.
    """
    labels = list(model.labels or [])
    with atomic_folder(folder) as part, quiet_libraries():
        is_transformer = family_of(model.model_body) == "transformer"
        classes = markdown(", ".join(map(class_name, labels)))
        card = _TRANSFORMER_CARD if is_transformer else _CARD
        card = card.format(title=markdown(truncate(title)), n_classes=len(labels), classes=classes)
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
    """The folder that a classifier is read from: of a run, its student's; of the hub, the local copy.

    Raises:
        ModelError: A run has no student, or several; or the folder holds no model.
        UnavailableError: The hub cannot be reached.
    """
    folder = Path(path)
    if (folder / _RUN_MARKER).is_file() and not (folder / "config.json").is_file():
        several = sorted(student.name for student in (folder / _STUDENTS).glob("*") if student.is_dir())
        student = folder / _STUDENT
        if several and not student.is_dir():
            raise ModelError(
                f"The run {path} has {len(several)} students: {', '.join(several)}.",
                hint=f"Name one, as in {path}/{_STUDENTS}/{several[0]}.",
            )
        if not student.is_dir():
            raise ModelError(f"The run {path} has no student yet.", hint="Let the run end first.")
        return student
    return locate(path)


def load(path: str | Path, *, device: str = "auto", trust_pickle: bool = False) -> SetFitModel:
    """Load a classifier: the student of a run folder, or a SetFit model or transformer, in a folder or on the hub.

    Args:
        path: Folder or hub name.
        device: As in `RunConfig`.
        trust_pickle: Also load a head that is stored as a pickle only. A pickle runs code of whoever made it.

    Raises:
        ConfigError: There is no such device.
        ModelError: There is no classifier, or only a pickled head and ``trust_pickle`` is not set.
        UnavailableError: The hub cannot be reached.
    """
    model = load_folder(classifier_folder(path), trust_pickle=trust_pickle)
    move_model(model.model_body, resolve_device(device), phase="Loading model")
    return model


def load_folder(folder: Path, *, trust_pickle: bool = False) -> SetFitModel:
    """Load the classifier in exactly this folder, on the CPU: a SetFit model or a transformer.

    Raises:
        ModelError: As `load`.
    """
    import joblib

    names = transformer_classes(folder)
    if names is not None:
        if len(names) < 2:
            raise ModelError(f"The model in {folder} gives one number, not classes.", hint="Give a classifier.")
        model = new_model(BodySource(folder, "transformer").load(names), names)
        model.model_head = get_head(model.model_body)
        return model
    head = load_head(folder)
    if head is None:
        if not (folder / _PICKLED_HEAD).is_file():
            raise ModelError(
                f"The model in {folder} has no head, so it is no classifier.", hint="Give a run or a SetFit model."
            )
        if not trust_pickle:
            raise ModelError(
                f"The head in {folder} is a pickle, which runs code of whoever made it.",
                hint="If you trust its maker, add --trust-pickle (trust_pickle=True).",
            )
        try:
            head = joblib.load(check_regular_file(folder / _PICKLED_HEAD))
        except Exception as error:
            raise ModelError(
                f"The head in {folder} cannot be unpickled ({type(error).__name__}: {error}).", hint="Train it again."
            ) from error
    # As scikit-learn's one-vs-rest and SetFit's own head say it; multi-output and chained ones have lists of classes.
    if (
        getattr(head, "multilabel_", False)
        or getattr(head, "multitarget", False)
        or (isinstance(getattr(head, "classes_", None), list))
    ):
        raise ModelError(
            f"The head in {folder} gives a text several labels, which is not supported.",
            hint="Give a classifier with one label per text.",
        )
    labels, normalize = _read_setfit_config(folder, head)
    model = new_model(load_body(folder), labels)
    width, expected = model.model_body.get_embedding_dimension(), getattr(head, "n_features_in_", None)
    if None not in (width, expected) and width != expected:
        raise ModelError(
            f"The head in {folder} takes {expected} features, its body gives {width}.", hint="Train the model again."
        )
    model.model_head, model.normalize_embeddings = head, normalize
    return model


def with_saved_head(model: SetFitModel, folder: Path) -> SetFitModel:
    """A model with the same body, and the head that is kept in a folder.

    Raises:
        ModelError: There is no such head.
    """
    head = load_head(folder)
    if head is None:
        raise ModelError(f"There is no head in {folder}.", hint="Train the model again.")
    other = new_model(model.model_body, model.labels or ())
    other.model_head, other.normalize_embeddings = head, model.normalize_embeddings
    return other


def replace_head(model: SetFitModel, folder: Path) -> None:
    """Put a model's head in the place of the one that is saved in a folder with the same body.

    Raises:
        OutputError: It cannot be written.
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
    """The names of the classes, and whether embeddings are normalised."""
    file = folder / _SETFIT_CONFIG
    config: Any = {}
    if file.is_file():
        try:
            config = read_json(file)
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} cannot be read ({error}).", hint="Train the model again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} does not hold settings.", hint="Train the model again.")
    classes = getattr(head, "classes_", None)
    labels = config.get("labels") or [str(name) for name in ([] if classes is None else classes)]
    matches = isinstance(labels, list)
    if matches and classes is not None:
        # Classes that are names are matched by name: SetFit answers with them, whatever the order of the labels.
        by_name = all(isinstance(name, str) for name in classes)
        matches = sorted(map(str, labels)) == sorted(classes) if by_name else len(labels) == len(classes)
        labels = [str(name) for name in classes] if by_name else labels
    if not matches:
        raise ModelError(
            f"{file} names the labels {config.get('labels')!r:.200}, the head has the classes {classes!s:.200}.",
            hint="Train the model again.",
        )
    return labels, bool(config.get("normalize_embeddings", False))
