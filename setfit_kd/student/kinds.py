"""The bodies a student may have: a model, layers cut out of one, or a vector a token."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from setfit_kd.config import Family
from setfit_kd.errors import ConfigError
from setfit_kd.memory import move_model
from setfit_kd.models import (
    DEFAULT_DIMENSION,
    TRANSFORMER_PREFIX,
    BodySource,
    check_static_teacher,
    cut_layers,
    family_of,
    locate,
    locate_body,
    n_layers,
    static_body,
    to_distilbert,
    untrained_transformer,
)

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class PreparedStudent:
    """A student's body that only has to be made.

    Attributes:
        make: From the fine-tuned teacher's body, the pool's texts and a device to the student's body, untrained. There
            need be no teacher where ``reads`` is given.
        reads_texts: Whether the pool's texts, and a model that embeds its vocabulary, are needed in making it.
        reads: The body that it is made from; None where that is the fine-tuned teacher's.
        family: Which it is of.
    """

    make: Callable[[SentenceTransformer | None, Sequence[str], torch.device], SentenceTransformer]
    reads_texts: bool = False
    reads: SentenceTransformer | None = None
    family: Family = "setfit"


@dataclass(frozen=True)
class StudentSource:
    """Where a student's body comes from."""

    _prepare: Callable[[SentenceTransformer | None, Sequence[str], int], PreparedStudent]

    def prepare(
        self, teacher: SentenceTransformer | None, label_names: Sequence[str] = (), *, seed: int = 0
    ) -> PreparedStudent:
        """Load and check all that there is before the teacher, as it comes, is fine-tuned.

        Args:
            teacher: Its body; None where signals come from elsewhere.
            label_names: Names of the classes, for students of the transformer family.
            seed: Of what such a student has no weights for.

        Raises:
            ConfigError: It is made of the teacher, and there is none.
            ModelError: A body does not load, or does not have what is asked for.
        """
        return self._prepare(teacher, label_names, seed)


def _loaded(body: SentenceTransformer) -> PreparedStudent:
    """A student whose body needs nothing of the fine-tuned teacher."""
    return PreparedStudent(lambda *_: body, reads=body, family=family_of(body))


def _require_teacher(teacher: SentenceTransformer | None) -> SentenceTransformer:
    if teacher is None:
        raise ConfigError(
            "There is no teacher to make the student of.", hint="Name the model: layers:3@NAME, or static@NAME."
        )
    return teacher


def _model(source: BodySource) -> StudentSource:
    """A model of its own."""
    return StudentSource(lambda _, label_names, seed: _loaded(source.load(label_names, seed=seed)))


def _blank(folder: Path) -> StudentSource:
    """An untrained transformer."""
    return StudentSource(
        lambda teacher, label_names, seed: _loaded(untrained_transformer(folder, label_names, like=teacher, seed=seed))
    )


def _layers(written: str, other: BodySource | None) -> StudentSource:
    """Layers cut out of the teacher or of another model: those named, or a number evenly spread.

    Of a SetFit teacher, as it comes; of a transformer, as it is fine-tuned, since its last layer goes along.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,3}|[0-9]{1,4}(?:,[0-9]{1,4})+)(:distilbert)?", written)
    if match is None:
        raise ConfigError(
            f"{'layers:' + written!r} does not name layers.",
            hint="Write them as in layers:0,2,5, or how many as in layers:3; of another model: layers:3@NAME; a BERT's "
            "as a DistilBERT: layers:6:distilbert.",
        )
    numbers = tuple(int(part) for part in match[1].split(","))
    cut = to_distilbert if match[2] else cut_layers

    def prepare(teacher: SentenceTransformer | None, label_names: Sequence[str], seed: int) -> PreparedStudent:
        whole = _require_teacher(teacher) if other is None else other.load(label_names, seed=seed)
        layers = numbers if len(numbers) > 1 else spread_evenly(numbers[0], n_layers(whole))
        body = cut(whole, layers)  # what cannot be cut is told before anything is trained
        if other is None and family_of(whole) == "transformer":
            return PreparedStudent(lambda tuned, *_: cut(_require_teacher(tuned), layers), family="transformer")
        return _loaded(body)

    return StudentSource(prepare)


def _static(written: str, other: BodySource | None) -> StudentSource:
    """A vector a token, taken from the fine-tuned teacher, or from another model."""
    if written and (not re.fullmatch(r"[0-9]{1,5}", written) or int(written) < 2):
        raise ConfigError(
            f"{'static:' + written!r} does not name a number of dimensions.",
            hint="Write static, or static:256; with another model's vectors: static:256@NAME.",
        )
    dimension = int(written) if written else DEFAULT_DIMENSION

    def prepare(teacher: SentenceTransformer | None, label_names: Sequence[str], seed: int) -> PreparedStudent:
        own = None if other is None else other.load(label_names, seed=seed)
        check_static_teacher(_require_teacher(teacher) if own is None else own, dimension)

        def make(
            fine_tuned: SentenceTransformer | None, texts: Sequence[str], device: torch.device
        ) -> SentenceTransformer:
            if own is None:
                return static_body(_require_teacher(fine_tuned), texts, dimension=dimension)
            move_model(own, device, phase="Making student")
            try:
                return static_body(own, texts, dimension=dimension)
            finally:
                own.to("cpu")

        return PreparedStudent(make, reads_texts=True, reads=own)

    return StudentSource(prepare)


_KINDS = {"layers": _layers, "static": _static}
_BLANK = "blank:"


def locate_student(name: str) -> StudentSource:
    """Where the student of this name comes from; finds or downloads models, and loads none.

    Args:
        name: A hub name or folder, after ``transformer:`` to be trained end to end; ``layers:0,2,5`` or ``layers:3``
            for layers of the teacher, ``layers:3:distilbert`` for a BERT's in a DistilBERT, ``static`` or
            ``static:256`` for a vector a token, each with ``@NAME`` to take them from another model; ``blank:CONFIG``
            for an untrained transformer.

    Raises:
        ConfigError: It is written wrongly.
        ModelError: A folder holds no model.
        UnavailableError: The hub cannot be reached.
    """
    match = re.fullmatch(rf"({'|'.join(_KINDS)})(?::([^@]*))?(?:@(.+))?", name)
    if name.startswith(_BLANK) and not Path(name).is_dir():
        return _blank(locate(name.removeprefix(_BLANK)))
    if match is None or Path(name).is_dir():
        return _model(locate_body(name))
    kind, written, other = match.groups()
    source = _KINDS[kind](written or "", None)  # what is written wrongly is told before anything is downloaded
    return source if other is None else _KINDS[kind](written or "", locate_body(other))


def spread_evenly(number: int, total: int) -> tuple[int, ...]:
    """``number`` of ``total`` layers, the first and the last among them: (3, 6) to (0, 2, 5).

    More than there are are asked for as they stand, to be refused where layers are cut.
    """
    if number > total:
        return tuple(range(number))
    return tuple(int(index) for index in np.linspace(0, total - 1, number).round())


def student_body(
    source: StudentSource, *, teacher: SentenceTransformer, texts: Sequence[str] = ()
) -> SentenceTransformer:
    """A student's body, untrained, on the CPU or where the teacher is.

    Args:
        source: What `locate_student` says.
        teacher: The teacher's body.
        texts: The pool, for the weights of a static body.

    Raises:
        ModelError: The body does not load, or does not have what is asked for.
    """
    return source.prepare(teacher).make(teacher, texts, teacher.device)


def folder_names(names: Sequence[str]) -> list[str]:
    """A folder's name for each of several students, no two alike."""
    found: list[str] = []  # no two alike where capitals make no difference to files, either
    for name in names:
        kind, _, model = name.partition("@") if name.startswith(tuple(_KINDS)) else ("", "", name)
        family, _, model = model.partition(":") if model.startswith((TRANSFORMER_PREFIX, _BLANK)) else ("", "", model)
        last = model.removeprefix("demo:").rstrip("/").rpartition("/")[2]
        parts = "-".join(part for part in (kind, family, last) if part)
        slug = base = re.sub(r"[^\w.-]+", "-", parts).strip(".-") or "student"
        number = 2
        while slug.lower() in map(str.lower, found):
            slug, number = f"{base}-{number}", number + 1
        found.append(slug)
    return found
