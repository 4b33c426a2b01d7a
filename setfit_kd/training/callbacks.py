"""Looks at how a training goes: the best weights are kept, and where it gets no better it may end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import TrainerCallback

from setfit_kd.utils.console import Advance

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from setfit_kd.config import StageConfig

    Config = TypeVar("Config", bound=StageConfig)

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_STATE, _BEST_WEIGHTS = "early-stop.json", "early-stop.safetensors"


@dataclass
class EvaluationCallback(TrainerCallback, ABC):
    """Measures a body from time to time.

    Attributes:
        body: What is trained.
        patience: Looks without a better figure before training stops; None never stops it.
        history: Step and figure of each look.
        best: The best figure.
        best_weights: The weights that had it.
        evaluations_since_best: Looks since then.
    """

    body: SentenceTransformer
    patience: int | None
    history: list[tuple[int, float]] = field(default_factory=list, kw_only=True)
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict, kw_only=True)
    best: float = field(default=-1.0, kw_only=True)
    evaluations_since_best: int = field(default=0, kw_only=True)

    @abstractmethod
    def is_due(self, step: int, args: Any, state: Any) -> bool:
        """Whether a look comes after a step; arguments and state as the trainer hands them over."""

    @abstractmethod
    def measure(self, step: int) -> float:
        """The figure, the higher the better, above -1."""

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look where a look is due."""
        if not self.is_due(state.global_step, args, state):
            return
        self.look(state.global_step)
        if self.evaluations_since_best:
            self.on_no_improvement(**given)
        if self.patience is not None and self.evaluations_since_best >= self.patience:
            control.should_training_stop = True

    def on_no_improvement(self, **given: Any) -> None:
        """What to do where a look brought nothing better, with what the trainer hands over."""

    def look(self, step: int) -> None:
        """Measure; keep the weights if they are the best so far."""
        figure = self.measure(step)
        self.history.append((step, figure))
        self.evaluations_since_best += 1
        if figure > self.best:
            self.best, self.evaluations_since_best = figure, 0
            self.best_weights = {
                name: value.detach().to("cpu", copy=True) for name, value in self.body.state_dict().items()
            }

    @property
    def best_step(self) -> int:
        """The step after which the figure was the best."""
        return max(self.history, key=itemgetter(1))[0]

    def save_state(self, folder: Path) -> None:
        """Write what has been seen, and the best weights, into a checkpoint's folder."""
        about = {"history": self.history, "best": self.best, "evaluations_since_best": self.evaluations_since_best}
        (folder / _STATE).write_text(json.dumps(about), encoding="utf-8")
        save_file(self.best_weights, folder / _BEST_WEIGHTS)

    def load_state(self, folder: Path) -> None:
        """Take up what `save_state` wrote."""
        about = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        self.history = [(step, figure) for step, figure in about["history"]]
        self.best, self.evaluations_since_best = about["best"], about["evaluations_since_best"]
        self.best_weights = load_file(folder / _BEST_WEIGHTS)

    def restore(self) -> None:
        """Put the best weights back."""
        if self.best_weights:
            self.body.load_state_dict(self.best_weights)


class ProgressCallback(TrainerCallback):
    """Hands each finished step to a progress bar, and stops at a loss that is not finite."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Begin where a checkpoint has brought the training."""
        self.advance(state.global_step)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Advance by one step."""
        self.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop where the loss, which has been read for the log, is not finite."""
        if not math.isfinite(kwargs["logs"].get("embedding_loss", 0.0)):
            control.should_training_stop = True
