"""Windows of questions and contexts for a body, and the tokens of the gold answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from setfit_kd.config.questions import QuestionConfig
from setfit_kd.errors import ModelError
from setfit_kd.qa.data import Question
from setfit_kd.runtime.answer import Window, Windows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_STRIDE = 128  # by default
UNKNOWN = -1  # stands for the tokens of a gold answer that is not known


class BodyWindows:
    """Tokenizer of a body that splits long contexts into windows, see `Windows`.

    Attributes:
        max_length, stride: Those in the config, or smaller if the body reads fewer tokens.
    """

    def __init__(self, body: SentenceTransformer, config: QuestionConfig) -> None:
        tokenizer = getattr(body.tokenizer, "backend_tokenizer", None)
        if tokenizer is None:
            raise ModelError("Only models with a fast tokenizer can answer questions.", hint="Use another model.")
        limit = body.max_seq_length or config.max_length
        self.max_length, self.stride = config.max_length, config.stride
        third = int(min(limit, self.max_length)) // 3
        if limit < self.max_length:
            self.max_length, self.stride = int(limit), None if self.stride is None else min(self.stride, third)
        self.stride = min(_STRIDE, third) if self.stride is None else self.stride
        self.tokenizer = tokenizer.to_str()
        self._windows = Windows(self.tokenizer, max_length=self.max_length, stride=self.stride)

    def split(self, questions: Sequence[Question]) -> list[Window]:
        """Tokenize questions, in one or more windows each, or none if a question is too long, see `Windows.split`."""
        return self._windows.split([(question.question, question.context) for question in questions])


def answer_tokens(windows: Sequence[Window], questions: Sequence[Question]) -> npt.NDArray[np.int64]:
    """Return the first and last token of the first gold answer to the question of each of n windows: (n, 2).

    They are 0, the position of the first special token, for a window without the answer or with only a part of it, and
    `UNKNOWN` if the answers are unknown.
    """
    positions = np.zeros((len(windows), 2), np.int64)
    for number, group in groupby(enumerate(windows), key=lambda pair: pair[1].row):
        answers = questions[number].answers
        if not answers:
            continue
        (text, start), *_ = answers
        parts = {}  # first and last token in each window with a part of the answer
        for index, window in group:
            overlaps = (window.spans[:, 0] < start + len(text)) & (window.spans[:, 1] > start) & window.in_context
            if overlaps.any():
                parts[index] = np.flatnonzero(overlaps)[[0, -1]]
        ends = {index: windows[index].spans[tokens, [0, 1]] for index, tokens in parts.items()}
        whole = min((end[0] for end in ends.values()), default=0), max((end[1] for end in ends.values()), default=0)
        for index, tokens in parts.items():
            covers = ends[index][0] <= start and ends[index][1] >= start + len(text)
            if covers or tuple(ends[index]) == whole:
                positions[index] = tokens
    unknown = [questions[window.row].answers is None for window in windows]
    positions[unknown] = UNKNOWN
    return positions
