"""Trainer callbacks: evaluation with early stopping, and the progress bar."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from setfit_kd.utils.console import Advance

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

_STATE_FILE, _BEST_WEIGHTS_FILE = "early-stop.json", "early-stop.safetensors"


@dataclass
class EvaluationCallback(TrainerCallback, ABC):
    """Callback that evaluates the body at intervals, keeps the best weights and stops early.

    Attributes:
        body: The body being trained.
        patience: Consecutive evaluations without a better score before training stops; None disables early stopping.
        history: Step and score of each evaluation.
        best_score: The best score so far.
        best_weights: The weights with the best score.
        evaluations_since_best: Evaluations since the best score.
    """

    body: SentenceTransformer
    patience: int | None
    history: list[tuple[int, float]] = field(default_factory=list, kw_only=True)
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict, kw_only=True)
    best_score: float = field(default=-1.0, kw_only=True)
    evaluations_since_best: int = field(default=0, kw_only=True)

    @abstractmethod
    def is_due(self, step: int, args: Any, state: Any) -> bool:
        """Return whether to evaluate after this step; ``args`` and ``state`` are the trainer's."""

    @abstractmethod
    def measure(self, step: int) -> float:
        """Return the score of the current weights. It must be greater than -1; higher is better."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate if an evaluation is due, and stop training if patience has run out."""
        if not self.is_due(state.global_step, args, state):
            return
        self.evaluate(state.global_step)
        if self.evaluations_since_best:
            self.on_no_improvement(**kwargs)
        if self.patience is not None and self.evaluations_since_best >= self.patience:
            control.should_training_stop = True

    def on_no_improvement(self, **kwargs: Any) -> None:
        """Hook that is called after an evaluation without a better score, with the trainer's keyword arguments."""

    def evaluate(self, step: int) -> None:
        """Measure the score; keep the weights if it is the best so far."""
        score = self.measure(step)
        self.history.append((step, score))
        self.evaluations_since_best += 1
        if score > self.best_score:
            self.best_score, self.evaluations_since_best = score, 0
            self.best_weights = {
                name: value.detach().to("cpu", copy=True) for name, value in self.body.state_dict().items()
            }

    @property
    def best_step(self) -> int:
        """Step with the best score."""
        return max(self.history, key=itemgetter(1))[0]

    def save_state(self, folder: Path) -> None:
        """Write the history and the best weights to a checkpoint folder."""
        count = self.evaluations_since_best
        state = {"history": self.history, "best": self.best_score, "evaluations_since_best": count}
        (folder / _STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        save_file(self.best_weights, folder / _BEST_WEIGHTS_FILE)

    def load_state(self, folder: Path) -> None:
        """Load the state that `save_state` wrote."""
        state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
        self.history = [(step, score) for step, score in state["history"]]
        # Checkpoints of older versions have the second key.
        key = "evaluations_since_best" if "evaluations_since_best" in state else "looks_since_best"
        self.best_score, self.evaluations_since_best = state["best"], state[key]
        self.best_weights = load_file(folder / _BEST_WEIGHTS_FILE)

    def restore_best_weights(self) -> None:
        """Load the best weights into the body."""
        if self.best_weights:
            self.body.load_state_dict(self.best_weights)


class ProgressCallback(TrainerCallback):
    """Callback that advances a progress bar, and stops training if the loss is not finite."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Advance by the steps that a resumed training has already done."""
        self.advance(state.global_step)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Advance by one step."""
        self.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop training if the logged loss is not finite."""
        if not math.isfinite(kwargs["logs"].get("embedding_loss", 0.0)):  # the name that SetFit logs the loss under
            control.should_training_stop = True
