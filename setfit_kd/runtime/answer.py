"""Answer questions with a bundle written by `setfit-kd export`: find the answer to a question in its context.

Requires numpy, tokenizers and onnxruntime. Bundles of question answering contain copies of this file and `classify.py`:

    python answer.py "question" "context"      # prints the answer as a JSON object
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

if __package__:
    from setfit_kd.runtime import classify
else:  # the copy in a bundle
    import classify  # type: ignore[import-not-found,no-redef]

logger = logging.getLogger("setfit_kd.runtime")  # the same name in the copy inside a bundle

QUESTION_ANSWERING, FORMAT = "question-answering", 1  # kind and format of the bundles
INPUTS, OUTPUTS = ("input_ids", "attention_mask", "token_type_ids"), ("start_logits", "end_logits")
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("max_length", "stride", "max_answer_tokens", "pad_id"), int),
    "null_threshold": (int, float, type(None)),
}
_CHUNK_SIZE = 256  # questions that are tokenized together

Logits = npt.NDArray[np.floating]


class Answer(NamedTuple):
    """Part of a context, from character ``start`` to before ``end``, with its probability.

    An empty text without characters is no answer, with the probability that the context does not answer the question;
    without a score, the question is too long.
    """

    text: str
    score: float | None
    start: int | None
    end: int | None


class Candidates(NamedTuple):
    """The best answer to a question, and no answer with its score minus that of the best one."""

    best: Answer
    null: Answer
    difference: float

    def decide(self, threshold: float | None) -> Answer:
        """Return no answer if the difference of the scores is above a threshold; without one, always the best."""
        return self.null if threshold is not None and self.difference > threshold else self.best


class Window(NamedTuple):
    """The T tokens of a question and of a part of its context.

    Attributes:
        row: Number of the question.
        ids, types: (T,) token ids and token types.
        spans: (T, 2) characters of the context from which a token was made, as start and end.
        in_context: (T,) whether a token is part of the context.
    """

    row: int
    ids: npt.NDArray[np.int32]
    types: npt.NDArray[np.int8]
    spans: npt.NDArray[np.int32]
    in_context: npt.NDArray[np.bool_]


TOO_LONG = Candidates(Answer("", None, None, None), Answer("", None, None, None), 0.0)
"""Candidates of a question that is too long for a window."""


def warn_too_long(candidates: Sequence[Candidates]) -> None:
    """Log a warning with the number of questions that are too long."""
    if n := candidates.count(TOO_LONG):
        logger.warning("Questions too long for a window, which get no answer: %d of %d.", n, len(candidates))


class Windows:
    """Tokenizer of questions and contexts that splits long contexts into overlapping windows.

    Args:
        tokenizer: A fast tokenizer, as JSON.
        max_length: Maximum number of tokens of a window.
        stride: Number of context tokens that consecutive windows share.
    """

    def __init__(self, tokenizer: str, *, max_length: int, stride: int) -> None:
        self._questions, self._pairs = Tokenizer.from_str(tokenizer), Tokenizer.from_str(tokenizer)
        for copy in (self._questions, self._pairs):
            copy.no_padding()
            copy.no_truncation()
        self._pairs.enable_truncation(max_length, stride=stride, strategy="only_second")
        self._room, self._stride = max_length - self._pairs.num_special_tokens_to_add(True), stride

    def split(self, questions: Sequence[tuple[str, str]]) -> list[Window]:
        """Tokenize pairs of question and context, in one or more windows each.

        A question that is so long that windows would not advance in its context has none.
        """
        windows, texts = [], [question for question, _ in questions]
        lengths = [len(encoding.ids) for encoding in _encode(self._questions, texts, add_special_tokens=False)]
        rows = [row for row, length in enumerate(lengths) if self._room - length > self._stride]
        for row, encoding in zip(rows, _encode(self._pairs, [questions[row] for row in rows]), strict=True):
            for part in (encoding, *encoding.overflowing):
                spans = np.array(part.offsets, np.int32).reshape(-1, 2)
                in_context = np.array([number == 1 for number in part.sequence_ids]) & (spans[:, 0] < spans[:, 1])
                ids, types = np.array(part.ids, np.int32), np.array(part.type_ids, np.int8)
                windows.append(Window(row, ids, types, spans, in_context))
        return windows


def _encode(tokenizer: Any, texts: Sequence[Any], **options: bool) -> Iterator[Any]:
    for start in range(0, len(texts), _CHUNK_SIZE):
        yield from tokenizer.encode_batch(list(texts[start : start + _CHUNK_SIZE]), **options)


def pad(windows: Sequence[Window], pad_id: int) -> dict[str, npt.NDArray[np.int64]]:
    """Return token ids, attention mask and token types of B windows, padded to the longest: (B, T) each."""
    shape = len(windows), max(len(window.ids) for window in windows)
    inputs = {name: np.full(shape, pad_id if name == "input_ids" else 0, np.int64) for name in INPUTS}
    for row, window in enumerate(windows):
        for name, values in zip(INPUTS, (window.ids, np.int64(1), window.types), strict=True):
            inputs[name][row, : len(window.ids)] = values
    return inputs


def find_answers(
    questions: Sequence[tuple[str, str]],
    windows: Sequence[Window],
    batches: Iterable[Sequence[int]],
    run: Callable[[dict[str, npt.NDArray[np.int64]]], Iterable[Logits]],
    *,
    pad_id: int,
    max_answer_tokens: int,
) -> list[Candidates]:
    """Find the best answer to each question; those without windows get none.

    Args:
        questions: Pairs of question and context.
        windows: Their windows.
        batches: Indices of the windows in each batch.
        run: Function that maps the inputs from `pad` to start and end logits, (B, T) each.
    """
    logits: list[list[tuple[Window, Logits, Logits]]] = [[] for _ in questions]
    for batch in batches:
        selected = [windows[index] for index in batch]
        for window, starts, ends in zip(selected, *run(pad(selected, pad_id)), strict=True):
            n_tokens = len(window.ids)
            logits[window.row].append((window, starts[:n_tokens], ends[:n_tokens]))
    return [
        decode(context, parts, max_answer_tokens) if parts else TOO_LONG
        for (_, context), parts in zip(questions, logits, strict=True)
    ]


def decode(context: str, windows: Sequence[tuple[Window, Logits, Logits]], max_answer_tokens: int) -> Candidates:
    """Find the best answer in the windows of a question, given the (T,) start and end logits of each.

    The score of a span of at most ``max_answer_tokens`` context tokens is the sum of its start and end logits. The
    score of no answer is the sum for the first token, in the window where that is smallest. The probabilities are the
    softmax over no answer and the spans in all windows; those of the same characters in several windows are added.

    References:
        - Devlin et al., 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding".
    """
    tables = []  # (T, max_answer_tokens) scores of the spans by first token and number of further tokens
    for window, starts, ends in windows:
        first, last = (np.where(window.in_context, np.float64(values), -np.inf) for values in (starts, ends))
        last = np.concatenate([last, np.full(max_answer_tokens - 1, -np.inf)])
        tables.append(first[:, None] + np.lib.stride_tricks.sliding_window_view(last, max_answer_tokens))
    null = min(float(starts[0]) + float(ends[0]) for _, starts, ends in windows)
    index = int(np.argmax([table.max() for table in tables]))
    token, further = divmod(int(tables[index].argmax()), max_answer_tokens)
    best, spans = float(tables[index][token, further]), windows[index][0].spans
    highest = max(best, null)
    total = np.exp(null - highest) + sum(np.exp(table - highest).sum() for table in tables)
    no_answer = Answer("", float(np.exp(null - highest) / total), None, None)
    if best == -np.inf:  # the context has no tokens
        return Candidates(no_answer, no_answer, 0.0)
    start, end = int(spans[token, 0]), int(spans[token + further, 1])
    probability = 0.0
    for (window, _, _), table in zip(windows, tables, strict=True):
        firsts, lasts = (np.flatnonzero(window.spans[:, i] == character) for i, character in enumerate((start, end)))
        further_tokens = lasts - firsts[:, None]
        is_span = (further_tokens >= 0) & (further_tokens < max_answer_tokens)
        scores = table[firsts[:, None], further_tokens.clip(0, max_answer_tokens - 1)][is_span]
        probability += float(np.exp(scores - highest).sum())
    text = context[start:end]
    start += len(text) - len(text.lstrip())  # some tokenizers count the space before a word as part of it
    answer = Answer(text.strip(), float(probability / total), start, start + len(text.strip()))
    return Candidates(answer, no_answer, null - best)


class Answerer:
    """A question answering model loaded from a bundle; safe to use from several threads.

    Args:
        path: Folder of the bundle.
        threads: Maximum number of threads per batch; None leaves the choice to the libraries.
        batch_size: Windows per forward pass.

    Attributes:
        folder: Folder of the bundle.
        manifest: Content of ``manifest.json``.

    Raises:
        BundleError: If the bundle is incomplete, has changed since its export, or has a newer format.
        ImportError: If onnxruntime is not installed.

    Example:
        >>> answerer = Answerer("bundle")  # doctest: +SKIP
        >>> answerer("Who won?", "The islanders won the final by 2 to 1.").text  # doctest: +SKIP
        'The islanders'
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, batch_size: int = 8) -> None:
        if batch_size < 1 or (threads is not None and threads < 1):
            raise ValueError(f"threads and batch_size must be 1 or more, got {threads} and {batch_size}")
        self.folder, self.batch_size = Path(path), batch_size
        kinds: dict[str, tuple[str, ...]] = {QUESTION_ANSWERING: (classify.TOKENIZER, classify.ONNX_MODEL)}
        self.manifest, files = classify.read_bundle(self.folder, kinds, _FIELDS, max_format=FORMAT)
        if threads == 1:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        settings = {name: self.manifest[name] for name in ("max_length", "stride")}
        with classify.convert_errors(str(self.folder)):
            self._windows = Windows(files[classify.TOKENIZER].decode(), **settings)
            self._session = classify.open_session(files[classify.ONNX_MODEL], threads)
        self._inputs = [node.name for node in self._session.get_inputs()]
        outputs = tuple(node.name for node in self._session.get_outputs())
        if not set(INPUTS[:2]) <= set(self._inputs) <= set(INPUTS) or outputs != OUTPUTS:
            raise classify.BundleError(
                f"{classify.ONNX_MODEL} must map {', '.join(INPUTS)} to {' and '.join(OUTPUTS)}."
            )

    def __call__(self, question: str, context: str) -> Answer:
        """Find the answer to a question in a context, see `answer`."""
        return self.answer([(question, context)])[0]

    def answer(self, questions: Sequence[tuple[str, str]]) -> list[Answer]:
        """Find the answers to pairs of question and context; a question that is too long gets none, with a warning.

        Raises:
            BundleError: If the tokenizer or the model fails, or a logit is not finite.
        """
        chunks = [questions[start : start + _CHUNK_SIZE] for start in range(0, len(questions), _CHUNK_SIZE)]
        candidates = [found for chunk in chunks for found in self._find_answers(chunk)]
        warn_too_long(candidates)
        return [found.decide(self.manifest.get("null_threshold")) for found in candidates]

    def _find_answers(self, questions: Sequence[tuple[str, str]]) -> list[Candidates]:
        with classify.convert_errors("The bundle"):
            windows = self._windows.split(questions)
            order = np.argsort([-len(window.ids) for window in windows], kind="stable").tolist()
            batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
            settings = {name: self.manifest[name] for name in ("pad_id", "max_answer_tokens")}
            return find_answers(questions, windows, batches, self._run, **settings)

    def _run(self, inputs: dict[str, npt.NDArray[np.int64]]) -> Sequence[Logits]:
        outputs: list[Logits] = self._session.run(OUTPUTS, {name: inputs[name] for name in self._inputs})
        if not np.isfinite(outputs).all():
            raise classify.BundleError("The bundle predicts logits that are not finite.")
        return outputs


def main() -> None:
    """Answer the question in the arguments."""
    parser = argparse.ArgumentParser(description="Find the answer to a question in its context, and print it as JSON.")
    parser.add_argument("question")
    parser.add_argument("context")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    try:
        answer = Answerer(Path(__file__).parent)(arguments.question, arguments.context)
    except (ValueError, ImportError) as error:
        sys.exit(classify.escape_control_characters(f"Error: {error}"))
    print(classify.escape_control_characters(json.dumps(answer._asdict(), ensure_ascii=False)))


if __name__ == "__main__":
    main()
