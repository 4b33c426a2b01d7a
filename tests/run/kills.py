"""Run `distill` in child processes that are killed again and again until one finishes.

Usage: python kills.py FOLDER SETTINGS_JSON

Prints the number of kills. Each attempt is forked from this process, which has imported everything and run nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from sentence_transformers import SentenceTransformer
from transformers import Trainer

from setfit_kd.run.pipeline import distill
from setfit_kd.student import trainer as student_trainer  # noqa: F401 - imported once, for all attempts
from setfit_kd.teacher import trainer as teacher_trainer  # noqa: F401

EVENTS_PER_ATTEMPT = (12, 17, 14, 11, 15, 40)
"""Numbers of events before an attempt is killed. The smallest allow no progress; the largest must be enough for any
stage without checkpoints."""


class Deadline:
    """Kills the process after a number of events.

    An event is the start or end of a training step, of encoding a chunk, or of renaming a file to its final path.
    """

    def __init__(self, n_events: int) -> None:
        self.n_remaining = n_events

    def count_event(self) -> None:
        self.n_remaining -= 1
        if self.n_remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.count_event()
            result = function(*args, **kwargs)
            self.count_event()
            return result

        setattr(owner, name, watched)


def run_attempt(folder: Path, n_events: int, settings: dict[str, Any]) -> NoReturn:
    try:
        deadline = Deadline(n_events)
        watched = ((Trainer, "training_step"), (SentenceTransformer, "encode"), (Path, "rename"), (Path, "replace"))
        for owner, name in watched:
            deadline.watch(owner, name)
        folder_setting = "resume" if (folder / "config.yaml").is_file() else "output_dir"
        sources = dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire")
        distill(**{**sources, **settings, folder_setting: folder})
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    for n_kills, n_events in enumerate(itertools.cycle(EVENTS_PER_ATTEMPT)):
        child = os.fork()
        if child == 0:
            run_attempt(folder, n_events, settings)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            print(n_kills)
            sys.exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
