"""Kills a run, over and over, until it has come to its end: python kills.py FOLDER SETTINGS.json [MOST]

Prints how often it was killed. Every try is a process of its own, forked from this one, which has imported everything
and run nothing.
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
from transformers import Trainer

import setfit_kd.models.encode
from setfit_kd.run import distill
from setfit_kd.student import trainer as student_trainer  # noqa: F401 - imported once, for all tries
from setfit_kd.teacher import trainer as teacher_trainer  # noqa: F401

BUDGETS = (12, 17, 14, 11, 15)
MOST = 40
"""Events that a try may live to see: the least are too few to come any further, the most must be enough for any stage
without checkpoints (about 100 with the preset newswire)."""


class Deadline:
    """Kills the process at an event of this number.

    Events are the beginnings and the ends of training steps, of encoded chunks, and of putting something in its place.
    """

    def __init__(self, events: int) -> None:
        self.left = events

    def pass_event(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.pass_event()
            done = function(*args, **kwargs)
            self.pass_event()
            return done

        setattr(owner, name, watched)


def go(folder: Path, events: int, settings: dict[str, Any]) -> NoReturn:
    try:
        deadline = Deadline(events)
        deadline.watch(Trainer, "training_step")
        deadline.watch(setfit_kd.models.encode, "_encode")
        deadline.watch(Path, "rename")
        deadline.watch(Path, "replace")
        where = "resume" if (folder / "config.yaml").is_file() else "output_dir"
        sources = dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire")
        distill(**{**sources, **settings, where: folder})
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    most = int(sys.argv[3]) if len(sys.argv) > 3 else MOST
    for kills, events in enumerate(itertools.cycle((*BUDGETS, most))):
        child = os.fork()
        if child == 0:
            go(folder, events, settings)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            print(kills)
            sys.exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
