"""Kinds of student bodies: a model, layers of a model, or static embeddings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from setfit_kd.config.base import Family
from setfit_kd.errors import ConfigError
from setfit_kd.memory.backoff import move_model
from setfit_kd.models.bodies import TRANSFORMER_PREFIX, BodySource, family_of, locate_body, locate_model
from setfit_kd.models.layers import cut_layers, n_layers, to_distilbert, untrained_transformer
from setfit_kd.models.static import DEFAULT_DIMENSION, check_static_teacher, static_body

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class PreparedStudent:
    """A student whose body is ready to be built.

    Attributes:
        build: Function of the fine-tuned teacher's body, the pool's texts and a device that returns the student's
            untrained body. The teacher's body may be None if ``source_body`` is not None.
        needs_texts: Whether ``build`` uses the pool's texts and embeds a vocabulary.
        source_body: The body that the student's is built from; None for the fine-tuned teacher's.
        family: Family of the student's body.
    """

    build: Callable[[SentenceTransformer | None, Sequence[str], torch.device], SentenceTransformer]
    needs_texts: bool = False
    source_body: SentenceTransformer | None = None
    family: Family = "setfit"


@dataclass(frozen=True)
class StudentSource:
    """Source of a student's body."""

    _prepare: Callable[[SentenceTransformer | None, Sequence[str], int], PreparedStudent]

    def prepare(
        self, teacher: SentenceTransformer | None, label_names: Sequence[str] = (), *, seed: int = 0
    ) -> PreparedStudent:
        """Load and check everything that is available before the teacher is fine-tuned.

        Args:
            teacher: The teacher's body before fine-tuning; None if the signals come from elsewhere.
            label_names: Names of the classes, for students of the transformer family.
            seed: Random seed for weights that such a student's model does not have.

        Raises:
            ConfigError: If the student is built from the teacher and there is no teacher.
            ModelError: If a body cannot be loaded, or does not have the requested layers or dimensions.
        """
        return self._prepare(teacher, label_names, seed)


def _from_body(body: SentenceTransformer) -> PreparedStudent:
    """Prepare a student whose body does not depend on the fine-tuned teacher."""
    return PreparedStudent(lambda *_: body, source_body=body, family=family_of(body))


def _require_teacher(teacher: SentenceTransformer | None) -> SentenceTransformer:
    if teacher is None:
        raise ConfigError(
            "Cannot build the student from the teacher: this run has no teacher.",
            hint="Name a model, as in layers:3@NAME or static@NAME.",
        )
    return teacher


def _model(source: BodySource) -> StudentSource:
    """Source of a body loaded from a model."""
    return StudentSource(lambda _, label_names, seed: _from_body(source.load(label_names, seed=seed)))


def _blank(folder: Path) -> StudentSource:
    """Source of an untrained transformer."""
    return StudentSource(
        lambda teacher, label_names, seed: _from_body(
            untrained_transformer(folder, label_names, teacher=teacher, seed=seed)
        )
    )


def _layers(spec: str, model: BodySource | None) -> StudentSource:
    """Source of a body with some layers of the teacher or of another model: listed, or a number spread evenly.

    The layers of a SetFit teacher are copied before fine-tuning; those of a transformer after it, together with the
    last layer.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,3}|[0-9]{1,4}(?:,[0-9]{1,4})+)(:distilbert)?", spec)
    if match is None:
        raise ConfigError(
            f"Expected layer numbers or a number of layers, got {'layers:' + spec!r}.",
            hint="Write layers:0,2,5 or layers:3; for another model's layers, layers:3@NAME; for a DistilBERT with the "
            "layers of a BERT, layers:6:distilbert.",
        )
    numbers = tuple(int(part) for part in match[1].split(","))
    cut = to_distilbert if match[2] else cut_layers

    def prepare(teacher: SentenceTransformer | None, label_names: Sequence[str], seed: int) -> PreparedStudent:
        source = _require_teacher(teacher) if model is None else model.load(label_names, seed=seed)
        layers = numbers if len(numbers) > 1 else spread_evenly(numbers[0], n_layers(source))
        body = cut(source, layers)  # raises errors before anything is trained
        if model is None and family_of(source) == "transformer":
            return PreparedStudent(lambda tuned, *_: cut(_require_teacher(tuned), layers), family="transformer")
        return _from_body(body)

    return StudentSource(prepare)


def _static(spec: str, model: BodySource | None) -> StudentSource:
    """Source of static embeddings computed by the fine-tuned teacher or by another model."""
    if spec and (not re.fullmatch(r"[0-9]{1,5}", spec) or int(spec) < 2):
        raise ConfigError(
            f"Expected a number of dimensions, at least 2, got {'static:' + spec!r}.",
            hint="Write static or static:256; for another model's embeddings, static:256@NAME.",
        )
    dimension = int(spec) if spec else DEFAULT_DIMENSION

    def prepare(teacher: SentenceTransformer | None, label_names: Sequence[str], seed: int) -> PreparedStudent:
        source_body = None if model is None else model.load(label_names, seed=seed)
        check_static_teacher(_require_teacher(teacher) if source_body is None else source_body, dimension)

        def build(tuned: SentenceTransformer | None, texts: Sequence[str], device: torch.device) -> SentenceTransformer:
            if source_body is None:
                return static_body(_require_teacher(tuned), texts, dimension=dimension)
            move_model(source_body, device, phase="Creating student")
            try:
                return static_body(source_body, texts, dimension=dimension)
            finally:
                source_body.to("cpu")

        return PreparedStudent(build, needs_texts=True, source_body=source_body)

    return StudentSource(prepare)


_KINDS = {"layers": _layers, "static": _static}
_BLANK_PREFIX = "blank:"


def locate_student(name: str) -> StudentSource:
    """Find the source of a student by its name; download models if necessary, but do not load them.

    Args:
        name: A hub name or folder, with the prefix ``transformer:`` to train it end to end; ``layers:0,2,5`` or
            ``layers:3`` for layers of the teacher, ``layers:3:distilbert`` for a DistilBERT with layers of a BERT,
            ``static`` or ``static:256`` for static embeddings, each with ``@NAME`` to use another model than the
            teacher; or ``blank:CONFIG`` for an untrained transformer.

    Raises:
        ConfigError: If the name is malformed.
        ModelError: If a folder does not contain a model.
        UnavailableError: If the hub cannot be reached.
    """
    match = re.fullmatch(rf"({'|'.join(_KINDS)})(?::([^@]*))?(?:@(.+))?", name)
    if name.startswith(_BLANK_PREFIX) and not Path(name).is_dir():
        return _blank(locate_model(name.removeprefix(_BLANK_PREFIX)))
    if match is None or Path(name).is_dir():
        return _model(locate_body(name))
    kind, spec, model = match.groups()
    source = _KINDS[kind](spec or "", None)  # raises errors in the spec before anything is downloaded
    return source if model is None else _KINDS[kind](spec or "", locate_body(model))


def spread_evenly(number: int, total: int) -> tuple[int, ...]:
    """Choose ``number`` of ``total`` layers at equal distances, including the first and the last: (3, 6) to (0, 2, 5).

    If ``number`` is larger than ``total``, return the indices 0 to ``number`` - 1, which cutting the layers rejects.
    """
    if number > total:
        return tuple(range(number))
    return tuple(int(index) for index in np.linspace(0, total - 1, number).round())


def build_student_body(
    source: StudentSource, *, teacher: SentenceTransformer, texts: Sequence[str] = ()
) -> SentenceTransformer:
    """Build a student's untrained body, on the CPU or on the teacher's device.

    Args:
        source: The source, from `locate_student`.
        teacher: The teacher's body.
        texts: The pool, to weight the tokens of static embeddings.

    Raises:
        ModelError: If the body cannot be loaded, or does not have the requested layers or dimensions.
    """
    return source.prepare(teacher).build(teacher, texts, teacher.device)


def folder_names(names: Sequence[str]) -> list[str]:
    """Derive a distinct folder name for each of several students or teachers."""
    slugs: list[str] = []
    for name in names:
        kind, _, model = name.partition("@") if name.startswith(tuple(_KINDS)) else ("", "", name)
        has_prefix = model.startswith((TRANSFORMER_PREFIX, _BLANK_PREFIX))
        family, _, model = model.partition(":") if has_prefix else ("", "", model)
        last = model.removeprefix("demo:").rstrip("/").rpartition("/")[2]
        parts = "-".join(part for part in (kind, family, last) if part)
        slug = base = re.sub(r"[^\w.-]+", "-", parts).strip(".-") or "student"
        number = 2
        while slug.lower() in map(str.lower, slugs):  # some file systems ignore case
            slug, number = f"{base}-{number}", number + 1
        slugs.append(slug)
    return slugs
