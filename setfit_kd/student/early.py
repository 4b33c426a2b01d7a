"""Early stopping on agreement with the teacher, for which no labels are needed."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from setfit_kd.arrays import at_most
from setfit_kd.models import embed, fit_head, settled_c
from setfit_kd.progress import shown_on
from setfit_kd.signals import TeacherSignals
from setfit_kd.student.steps import MOST_HELD_OUT, held_out_texts, looks_in_pass

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

_STATE, _BEST_WEIGHTS = "early-stop.json", "early-stop.safetensors"


def hold_out(
    n: int, *, seed: int, spared: npt.NDArray[np.bool_] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows to train on and rows to hold out of a pool of n texts, both sorted; ``spared`` ones are held out last."""
    count = held_out_texts(n)
    order = np.random.default_rng([seed, 6]).permutation(n)
    if spared is not None:
        order = np.concatenate([order[~spared[order]], order[spared[order]]])
    return np.sort(order[count:]), np.sort(order[:count])


def soft_agreement(teacher: npt.NDArray[np.floating], student: npt.NDArray[np.floating]) -> float:
    """Mean probability that two (n, n_classes) distributions share, 0 to 1: one minus their total variation.

    Smoother than the share of equal classes, and so the better guide where few texts are held out.
    """
    return float(np.minimum(teacher, student).sum(axis=1).mean())


@dataclass
class AgreementStop(TrainerCallback):
    """Stops training once the student agrees no better with the teacher, and keeps its best weights.

    At each look a head is fitted on a sample of the training texts and compared with the teacher on held-out ones.

    Attributes:
        body: The student's body, in training.
        signals: The teacher's signals.
        training_rows, held_out_rows: Rows of the signals, see `hold_out`.
        patience: Looks without a better agreement before training stops.
        head_c, balance: As in `RunConfig`.
        encode_batch_size: Texts a forward pass.
        seed: Of the sample.
        history: Step and agreement of each look.
    """

    body: SentenceTransformer
    signals: TeacherSignals
    training_rows: npt.NDArray[np.int64]
    held_out_rows: npt.NDArray[np.int64]
    patience: int
    head_c: float | str
    balance: bool
    encode_batch_size: int
    seed: int
    history: list[tuple[int, float]] = field(default_factory=list)
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    best: float = -1.0
    looks_since_best: int = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the end of a pass and, in a long one, at equal distances within it."""
        steps_per_pass = max(1, round(state.max_steps / args.num_train_epochs))
        looks = looks_in_pass(steps_per_pass)
        if state.global_step * looks % steps_per_pass < looks:
            self.look(state.global_step)
            control.should_training_stop = control.should_training_stop or self.looks_since_best >= self.patience

    def look(self, step: int) -> None:
        """Measure the agreement; keep the weights if it is the best so far."""
        sample = at_most(self.training_rows, MOST_HELD_OUT, seed=[self.seed, 9])
        rows = np.concatenate([sample, self.held_out_rows])
        with shown_on(None):
            embeddings = embed(
                self.body,
                [self.signals.texts[row] for row in rows],
                batch_size=self.encode_batch_size,
                description="Comparing with teacher",
            )
        head = fit_head(
            embeddings[: len(sample)],
            self.signals.probabilities[sample],
            C=settled_c(self.head_c),
            balance=self.balance,
        )
        student = head.predict_proba(embeddings[len(sample) :])
        agreement = soft_agreement(self.signals.probabilities[self.held_out_rows], student)
        self.history.append((step, agreement))
        logger.debug("Step %d: agreement with the teacher %.4f on held-out texts.", step, agreement)
        self.looks_since_best += 1
        if agreement > self.best:
            self.best, self.looks_since_best = agreement, 0
            self.best_weights = {
                name: value.detach().to("cpu", copy=True) for name, value in self.body.state_dict().items()
            }

    def save_state(self, folder: Path) -> None:
        """Write what has been seen, and the best weights, into a checkpoint's folder."""
        about = {"history": self.history, "best": self.best, "looks_since_best": self.looks_since_best}
        (folder / _STATE).write_text(json.dumps(about), encoding="utf-8")
        save_file(self.best_weights, folder / _BEST_WEIGHTS)

    def load_state(self, folder: Path) -> None:
        """Take up what `save_state` wrote."""
        about = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        self.history = [(step, agreement) for step, agreement in about["history"]]
        self.best, self.looks_since_best = about["best"], about["looks_since_best"]
        self.best_weights = load_file(folder / _BEST_WEIGHTS)

    def restore(self) -> None:
        """Put the best weights back."""
        if self.best_weights:
            self.body.load_state_dict(self.best_weights)
            logger.info(
                "The student agrees best with the teacher after step %d.", max(self.history, key=itemgetter(1))[0]
            )
