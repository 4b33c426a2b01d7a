"""The bodies a student may have: a model, layers cut out of one, or a vector a token."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from setfit_kd.errors import ConfigError
from setfit_kd.memory import place
from setfit_kd.models import cut_layers, is_static, load_body, locate, n_layers, n_tokens
from setfit_kd.student.static import DEFAULT_DIMENSION, check_teacher, static_body

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class PreparedStudent:
    """A student's body that only has to be made.

    Attributes:
        make: From the fine-tuned teacher's body and the pool's texts to the student's body, untrained.
        passes: Texts that pass through the teacher, or another model, in making it.
        reads: The body that it is made from; None where that is the fine-tuned teacher's.
        is_static: Whether it is a vector a token: its batches are never split into micro-batches.
    """

    make: Callable[[SentenceTransformer, Sequence[str]], SentenceTransformer]
    passes: int = 0
    reads: SentenceTransformer | None = None
    is_static: bool = False


class StudentSource(Protocol):
    """Where a student's body comes from."""

    def prepare(self, teacher: SentenceTransformer) -> PreparedStudent:
        """Load and check all that there is before the teacher, as it comes, is fine-tuned.

        Raises:
            ModelError: A body does not load, or does not have what is asked for.
        """


@dataclass(frozen=True)
class _Model:
    """A model of its own."""

    folder: Path

    def prepare(self, teacher: SentenceTransformer) -> PreparedStudent:
        body = load_body(self.folder)
        return PreparedStudent(lambda *_: body, reads=body, is_static=is_static(body))


@dataclass(frozen=True)
class _Layers:
    """Layers cut out of the teacher as it comes, or of another model: those named, or a number evenly spread."""

    layers: tuple[int, ...] | int
    folder: Path | None

    def prepare(self, teacher: SentenceTransformer) -> PreparedStudent:
        whole = teacher if self.folder is None else load_body(self.folder)
        layers = self.layers if isinstance(self.layers, tuple) else spread_evenly(self.layers, n_layers(whole))
        body = cut_layers(whole, layers)
        return PreparedStudent(lambda *_: body, reads=body)


@dataclass(frozen=True)
class _Static:
    """A vector a token, taken from the fine-tuned teacher, or from another model."""

    dimension: int
    folder: Path | None

    def prepare(self, teacher: SentenceTransformer) -> PreparedStudent:
        other = None if self.folder is None else load_body(self.folder)
        check_teacher(teacher if other is None else other, self.dimension)

        def make(fine_tuned: SentenceTransformer, texts: Sequence[str]) -> SentenceTransformer:
            if other is not None:
                place(other, fine_tuned.device, phase="Making student")
            return static_body(fine_tuned if other is None else other, texts, dimension=self.dimension)

        return PreparedStudent(make, n_tokens(teacher if other is None else other), reads=other, is_static=True)


def _layers(written: str, folder: Path | None) -> StudentSource:
    if not re.fullmatch(r"[1-9][0-9]{0,3}|[0-9]{1,4}(,[0-9]{1,4})+", written):
        raise ConfigError(
            f"{'layers:' + written!r} does not name layers.",
            hint="Write them as in layers:0,2,5, or how many as in layers:3; of another model: layers:3@NAME.",
        )
    numbers = tuple(int(part) for part in written.split(","))
    return _Layers(numbers[0] if len(numbers) == 1 else numbers, folder)


def _static(written: str, folder: Path | None) -> StudentSource:
    if written and (not re.fullmatch(r"[0-9]{1,5}", written) or int(written) < 2):
        raise ConfigError(
            f"{'static:' + written!r} does not name a number of dimensions.",
            hint="Write static, or static:256; with another model's vectors: static:256@NAME.",
        )
    return _Static(int(written) if written else DEFAULT_DIMENSION, folder)


_KINDS: dict[str, Callable[[str, Path | None], StudentSource]] = {"layers": _layers, "static": _static}


def locate_student(name: str) -> StudentSource:
    """Where the student of this name comes from; finds or downloads models, and loads none.

    Args:
        name: A hub name or folder; ``layers:0,2,5`` or ``layers:3`` for layers of the teacher, ``static`` or
            ``static:256`` for a vector a token, either with ``@NAME`` to take them from another model.

    Raises:
        ConfigError: It is written wrongly.
        ModelError: A folder holds no model.
        UnavailableError: The hub cannot be reached.
    """
    match = re.fullmatch(rf"({'|'.join(_KINDS)})(?::([^@]*))?(?:@(.+))?", name)
    if match is None or Path(name).is_dir():
        return _Model(locate(name))
    kind, written, other = match.groups()
    source = _KINDS[kind](written or "", None)  # what is written wrongly is told before anything is downloaded
    return source if other is None else _KINDS[kind](written or "", locate(other))


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
    return source.prepare(teacher).make(teacher, texts)


def slugs(names: Sequence[str]) -> list[str]:
    """A folder's name for each of several students, no two alike."""
    found: list[str] = []  # no two alike where capitals make no difference to files, either
    for name in names:
        kind, _, model = name.partition("@") if name.startswith(tuple(_KINDS)) else ("", "", name)
        last = model.removeprefix("demo:").rstrip("/").rpartition("/")[2]
        slug = base = re.sub(r"[^\w.-]+", "-", f"{kind}-{last}").strip(".-") or "student"
        number = 2
        while slug.lower() in map(str.lower, found):
            slug, number = f"{base}-{number}", number + 1
        found.append(slug)
    return found
