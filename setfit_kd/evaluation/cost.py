"""Size and speed of a classifier."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from setfit_kd.models.bodies import family_of
from setfit_kd.models.io import save_model
from setfit_kd.utils.files import folder_megabytes

if TYPE_CHECKING:
    from setfit import SetFitModel


@dataclass(frozen=True)
class Cost:
    """Size and speed of a classifier.

    Attributes:
        parameters: Number of weights in body and head.
        megabytes: Size on disk of the saved model, in 10^6 bytes.
        texts_per_second: Texts classified per second, including tokenization, in batches sorted by length.
        device: Device on which the speed was measured.
    """

    parameters: int
    megabytes: float
    texts_per_second: float
    device: str


def count_parameters(model: SetFitModel) -> int:
    """Count the weights of body and head."""
    body: int = sum(parameter.numel() for parameter in model.model_body.parameters())
    if family_of(model.model_body) == "transformer":  # the body includes the head
        return body
    if model.has_differentiable_head:
        return body + int(sum(parameter.numel() for parameter in model.model_head.parameters()))
    head = model.model_head
    return body + sum(int(getattr(head, name).size) for name in ("coef_", "intercept_") if hasattr(head, name))


def model_megabytes(model: SetFitModel) -> float:
    """Measure the size on disk of an unsaved model, in 10^6 bytes."""
    with TemporaryDirectory(prefix="setfit-kd-") as scratch:
        folder = Path(scratch) / "model"
        save_model(model, folder)
        return folder_megabytes(folder)
