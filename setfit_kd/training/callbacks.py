"""Evaluation during training, with early stopping."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

_STATE_FILE, _BEST_WEIGHTS_FILE = "early-stop.json", "early-stop.safetensors"


@dataclass
class EvaluationCallback(TrainerCallback, ABC):
    """Callback that evaluates the body at intervals, keeps the best weights and stops early.

    Training stops after ``patience`` consecutive evaluations without a better score; None disables early stopping.
    ``history`` holds the step and the score of each evaluation.
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
        """Evaluate if it is due, keep the weights if they are the best, and stop if patience has run out."""
        if not self.is_due(state.global_step, args, state):
            return
        score = self.measure(state.global_step)
        self.history.append((state.global_step, score))
        self.evaluations_since_best += 1
        if score > self.best_score:
            self.best_score, self.evaluations_since_best = score, 0
            self.best_weights = {
                name: value.detach().to("cpu", copy=True) for name, value in self.body.state_dict().items()
            }
        else:
            self.on_no_improvement(**kwargs)
        if self.patience is not None and self.evaluations_since_best >= self.patience:
            control.should_training_stop = True

    def on_no_improvement(self, **kwargs: Any) -> None:
        """Hook that is called after an evaluation without a better score, with the trainer's keyword arguments."""

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
            step, score = max(self.history, key=itemgetter(1))
            logger.info("Restored the best weights: step %d of %d, score %.3f.", step, self.history[-1][0], score)
