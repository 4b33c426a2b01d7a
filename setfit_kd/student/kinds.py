"""Kinds of student bodies: a model, an untrained model, layers of a model, or static embeddings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from setfit_kd.config.base import Family
from setfit_kd.errors import ConfigError
from setfit_kd.memory.backoff import move_model
from setfit_kd.models.bodies import TRANSFORMER_PREFIX, BodySource, family_of, locate_body, locate_model
from setfit_kd.models.layers import cut_layers, n_layers, to_distilbert, untrained_transformer
from setfit_kd.models.static import DEFAULT_DIMENSION, check_static_teacher, static_body
from setfit_kd.utils.files import distinct_names

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

    from setfit_kd.models.token_model import TokenTask

_BLANK_PREFIX = "blank:"


@dataclass(frozen=True)
class PreparedStudent:
    """A student whose body is ready to be built.

    Attributes:
        source_body: The body that the student's is built from; None for the fine-tuned teacher's.
        family: Family of the student's body.
        build: Function of the source body and the pool's texts that returns the student's untrained body.
        needs_texts: Whether ``build`` uses the pool's texts and embeds a vocabulary.
    """

    source_body: SentenceTransformer | None
    family: Family = "setfit"
    build: Callable[[SentenceTransformer, Sequence[str]], SentenceTransformer] = lambda body, _: body
    needs_texts: bool = False

    def create_body(
        self, teacher: SentenceTransformer | None, texts: Sequence[str], device: torch.device
    ) -> SentenceTransformer:
        """Build the untrained body from the pool's texts and, without a ``source_body``, the fine-tuned teacher's body.

        A vocabulary is embedded on the device; the source body is moved to the CPU afterwards.
        """
        source = teacher if self.source_body is None else self.source_body
        assert source is not None
        if not self.needs_texts:
            return self.build(source, texts)
        move_model(source, device, phase="Creating student")
        try:
            return self.build(source, texts)
        finally:
            source.to("cpu")


def _layers(spec: re.Match[str], source: SentenceTransformer, is_teacher: bool) -> PreparedStudent:
    """Prepare a body with some layers of another."""
    layers = _layer_numbers(spec, source)
    cut = to_distilbert if spec[2] else cut_layers
    body = cut(source, layers)  # raises errors before anything is trained
    if is_teacher and family_of(source) == "transformer":  # copied after fine-tuning, together with the last layer
        return PreparedStudent(None, "transformer", lambda tuned, _: cut(tuned, layers))
    return PreparedStudent(body, family_of(body))


def _layer_numbers(spec: re.Match[str], source: SentenceTransformer) -> tuple[int, ...]:
    """Return the layers that are listed, or a number of them spread evenly."""
    numbers = tuple(map(int, spec[1].split(",")))
    return numbers if len(numbers) > 1 else spread_evenly(numbers[0], n_layers(source))


def _static(spec: re.Match[str], source: SentenceTransformer, is_teacher: bool) -> PreparedStudent:
    """Prepare static embeddings computed by the fine-tuned teacher or by another model."""
    dimension = int(spec[0] or DEFAULT_DIMENSION)
    check_static_teacher(source, dimension)
    build = partial(static_body, dimension=dimension)
    return PreparedStudent(None if is_teacher else source, build=build, needs_texts=True)


_Prepare: TypeAlias = Callable[[re.Match[str], "SentenceTransformer", bool], PreparedStudent]
_KINDS: dict[str, tuple[_Prepare, str, str, str]] = {
    "layers": (
        _layers,
        r"([1-9][0-9]{0,3}|[0-9]{1,4}(?:,[0-9]{1,4})+)(:distilbert)?",
        "layer numbers or a number of layers",
        "Write layers:0,2,5 or layers:3; for another model's layers, layers:3@NAME; for a DistilBERT with the layers "
        "of a BERT, layers:6:distilbert.",
    ),
    "static": (
        _static,
        r"(?!0*[01]?$)[0-9]{1,5}|",
        "a number of dimensions, at least 2",
        "Write static or static:256; for another model's embeddings, static:256@NAME.",
    ),
}
"""Kinds that are built from another body: a function of the specification, the body before fine-tuning and whether it
is the teacher's; the pattern of the specification; and what is expected and the hint, for errors."""


class StudentSource(NamedTuple):
    """Source of a student's body, from `locate_student`.

    Attributes:
        model: The model to load, or the folder of the config of an untrained transformer; None for the teacher.
        kind, spec: The kind and its specification; None for the model itself.
    """

    model: BodySource | Path | None
    kind: str | None = None
    spec: re.Match[str] | None = None

    def prepare(
        self, teacher: SentenceTransformer | None, label_names: Sequence[str] = (), *, seed: int = 0
    ) -> PreparedStudent:
        """Load and check everything that is available before the teacher is fine-tuned.

        Args:
            teacher: The teacher's body before fine-tuning; None if the signals come from elsewhere.
            label_names, seed: Classes, and random seed for missing weights, of students of the transformer family.

        Raises:
            ConfigError: If the student is built from the teacher and there is no teacher.
            ModelError: If a body cannot be loaded, or does not have the requested layers or dimensions.
        """
        if isinstance(self.model, Path):
            source = untrained_transformer(self.model, label_names, teacher=teacher, seed=seed)
        elif self.model is not None:
            source = self.model.load(label_names, seed=seed)
        elif teacher is not None:
            source = teacher
        else:
            raise ConfigError(
                "There is no teacher to build the model from.",
                hint="Name a model, as in layers:3@NAME or static@NAME.",
            )
        if self.kind is None or self.spec is None:
            return PreparedStudent(source, family_of(source))
        return _KINDS[self.kind][0](self.spec, source, self.model is None)


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
    match = None if Path(name).is_dir() else re.fullmatch(rf"({'|'.join(_KINDS)})(?::([^@]*))?(?:@(.+))?", name)
    if match is None:
        is_blank = name.startswith(_BLANK_PREFIX) and not Path(name).is_dir()
        return StudentSource(locate_model(name.removeprefix(_BLANK_PREFIX)) if is_blank else locate_body(name))
    kind, text, model = match.groups("")
    _, pattern, expected, hint = _KINDS[kind]
    spec = re.fullmatch(pattern, text)
    if spec is None:
        raise ConfigError(f"Expected {expected}, got {f'{kind}:{text}'!r}.", hint=hint)
    return StudentSource(locate_body(model) if model else None, kind, spec)


def create_token_body(
    name: str, task: TokenTask, *, teacher: SentenceTransformer | None = None, seed: int = 0
) -> SentenceTransformer:
    """Create the body of a transformer with an output for each token, see `load_token_model`.

    Args:
        name: As in `locate_student`, but without ``static`` and ``:distilbert``.
        task: What the head is for.
        teacher: The teacher's body, for its layers; they are copied.
        seed: Random seed of untrained weights.

    Raises:
        SetFitKDError: As `locate_student` and `StudentSource.prepare`.
    """
    from setfit_kd.models.token_model import load_token_model, untrained_token_model

    source = locate_student(name)
    if source.kind == "static" or (source.spec and source.spec.re.groups > 1 and source.spec[2]):
        raise ConfigError(f"{name} has no output for each token.", hint="Use a transformer, or layers:0,2,5 of one.")
    if isinstance(source.model, Path):
        return untrained_token_model(source.model, task, teacher=teacher, seed=seed)
    if source.model is None and teacher is None:
        raise ConfigError(f"Cannot build {name} without a teacher.", hint="Name a model, as in layers:3@NAME.")
    body = teacher if source.model is None else load_token_model(source.model.folder, task, seed=seed)
    assert body is not None
    return body if source.spec is None else cut_layers(body, _layer_numbers(source.spec, body))


def spread_evenly(number: int, total: int) -> tuple[int, ...]:
    """Choose ``number`` of ``total`` layers at equal distances, with the first and the last: (3, 6) to (0, 2, 5)."""
    if number > total:
        return tuple(range(number))  # which cutting the layers rejects
    return tuple(int(index) for index in np.linspace(0, total - 1, number).round())


def folder_names(names: Sequence[str]) -> list[str]:
    """Derive a distinct folder name for each of several students or teachers."""
    parts = []
    for name in names:
        pattern = rf"((?:{'|'.join(_KINDS)})[^@]*)?@?(?:({TRANSFORMER_PREFIX}|{_BLANK_PREFIX}))?(?:demo:)?(.*)"
        match = re.fullmatch(pattern, name, re.DOTALL)
        kind, family, model = match.groups("") if match else ("", "", name)
        parts.append("-".join(filter(None, (kind, family.rstrip(":"), model.rstrip("/").rpartition("/")[2]))))
    return distinct_names(parts, "student")
