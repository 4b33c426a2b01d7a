"""Embed and classify many texts in batches, with OOM backoff."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from setfit_kd.memory.backoff import Attempt, OOMBackoff, move_model
from setfit_kd.runtime.classify import chunk_texts, shorten
from setfit_kd.utils.arrays import Floats, allocate_array, iter_chunks
from setfit_kd.utils.console import track

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

Batch = TypeVar("Batch", bound=Sized)
Result = TypeVar("Result")

_CHUNK = 256  # texts per progress-bar update, or the batch size if that is larger


def run_batches(
    model: Any, batches: Iterable[Batch], run: Callable[[Batch, int], Result], total: int, size: int, description: str
) -> Iterator[Result]:
    """Call ``run(batch, size)`` on batches of ``total`` items; ``size`` is the number of items per forward pass.

    If memory runs out, the size is reduced, and finally the CPU is used. The model is moved back at the end.
    """
    device = model.device
    backoff = OOMBackoff(description, kind="encoding", device=device, batch_size=size, model=model)
    done = 0

    def run_batch(attempt: Attempt) -> Result:
        model.to(attempt.device)
        return run(batch, attempt.batch_size)

    with track(description, total) as advance:
        for batch in batches:
            backoff.step = done
            yield backoff.run(run_batch)
            done += len(batch)
            advance(len(batch))
    if backoff.attempt.device != device:
        move_model(model, device, phase=description)


def shorten_texts(body: SentenceTransformer, texts: Sequence[str]) -> list[str]:
    """Cut texts to little more than the tokens that a body reads, see `setfit_kd.runtime.classify.shorten`."""
    body.preprocess(["a"])  # sets the truncation of its tokenizer
    tokenizer = getattr(body.tokenizer, "backend_tokenizer", body.tokenizer)
    return [shorten(text, tokenizer) for text in texts]


def embed(
    body: SentenceTransformer,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    normalize: bool = False,
    description: str = "Encoding",
) -> Floats:
    """Embed n texts on the device of the body: (n, d) float32; float16 mapped from a temporary file if that is large.

    Texts are processed longest first, so that a batch holds texts of similar length. ``normalize`` scales every
    embedding to length 1, and ``description`` is the label of the progress bar.
    """
    order = np.argsort([-len(text) for text in texts], kind="stable")
    embeddings: Floats | None = None

    def encode(texts: list[str], size: int) -> Any:
        return body.encode(texts, batch_size=size, normalize_embeddings=normalize, show_progress_bar=False)

    chunks = chunk_texts((texts[row] for row in order), max(_CHUNK, batch_size))
    batches = (shorten_texts(body, chunk) for chunk in chunks)
    start = 0
    for rows in run_batches(body, batches, encode, len(texts), batch_size, description):
        if embeddings is None:
            embeddings = allocate_array((len(texts), rows.shape[1]))
        embeddings[order[start : start + len(rows)]] = rows
        start += len(rows)
    return np.empty((0, body.get_embedding_dimension() or 0), np.float32) if embeddings is None else embeddings


def embed_tokens(body: SentenceTransformer, *, batch_size: int = 1024) -> npt.NDArray[np.float32]:
    """Embed each token in the vocabulary of a transformer with a fast tokenizer as a separate text: (n_tokens, d)."""
    import torch

    backend = Tokenizer.from_str(body.tokenizer.backend_tokenizer.to_str())
    backend.no_padding()  # some tokenizers pad every text to a fixed length
    encoding = backend.encode("a")
    is_special = encoding.special_tokens_mask
    first, last = is_special.index(0), len(is_special) - is_special[::-1].index(0)
    total = 1 + max(backend.get_vocab().values())
    rows = np.tile(np.array([*encoding.ids[:first], 0, *encoding.ids[last:]]), (total, 1))
    rows[:, first] = np.arange(total)

    def encode(rows: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.float32]:
        body.eval()
        embeddings = []
        with torch.inference_mode():
            for ids in torch.split(torch.as_tensor(rows).to(body.device), size):
                features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                embeddings.append(body(features)["sentence_embedding"].float().cpu().numpy())
        return np.concatenate(embeddings)

    batches = (rows[start : start + batch_size] for start in range(0, total, batch_size))
    return np.concatenate(list(run_batches(body, batches, encode, total, batch_size, "Reading vocabulary")))


def predict_proba(
    model: SetFitModel, texts: Sequence[str], *, batch_size: int = 32, description: str = "Predicting"
) -> npt.NDArray[np.float32]:
    """Predict the class probabilities of texts: (n, n_classes) float32, rows summing to 1."""
    options: Any = {"batch_size": batch_size, "normalize": model.normalize_embeddings, "description": description}
    return head_proba(model, embed(model.model_body, texts, **options))


def head_proba(model: SetFitModel, embeddings: Floats) -> npt.NDArray[np.float32]:
    """Predict class probabilities from (n, d) embeddings: (n, n_classes) float32, rows summing to 1 in float64."""
    import torch

    def predict(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if not model.has_differentiable_head:
            return np.asarray(model.model_head.predict_proba(rows), np.float32)
        with torch.no_grad():
            tensor = model.model_head.predict_proba(torch.as_tensor(rows, device=model.model_head.device))
        return np.asarray(tensor.cpu().numpy(), np.float32)

    if not len(embeddings):
        return np.empty((0, len(model.labels or ())), np.float32)
    return np.concatenate([predict(np.asarray(chunk, np.float32)) for chunk in iter_chunks(embeddings)])
