"""Embed and classify many texts in batches, with OOM backoff."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from setfit_kd.distributed.ranks import OtherRanks, other_ranks
from setfit_kd.memory.backoff import Attempt, OOMBackoff, move_model
from setfit_kd.models.bodies import is_static
from setfit_kd.models.forward import ForwardPass, OnnxForwardPass
from setfit_kd.models.tokens import Tokens, iter_tokens, tokenize
from setfit_kd.utils.arrays import Floats, allocate_array, iter_batches, iter_chunks
from setfit_kd.utils.console import track

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

Batch = TypeVar("Batch", bound=Sized)
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

MAX_DIFFERENCE = 1e-3
"""Maximum mean difference of the probabilities of a faster forward pass from those in single precision."""
_CHUNK = 256  # texts per progress-bar update, or the batch size if that is larger
_LIMITS = {"cpu": (256, 2048), "cuda": (1024, 1 << 16), "mps": (256, 1 << 14)}  # texts and tokens of a batch
_SAMPLE = {"cpu": 32, "cuda": 512, "mps": 128}  # texts on which forward passes are compared; a GPU needs many
_FASTER = {"cpu": ("bf16", "onnx"), "cuda": ("fp16", "tf32"), "mps": ("fp16",)}
_MIN_SHARED = {"cpu": 512, "cuda": 8192}  # texts for which it pays to send the body to other processes
_MIN_SPEEDUP = 1.2
_MIN_SECONDS = {"bf16": 3.0, "fp16": 3.0, "tf32": 3.0, "onnx": 15.0}  # that all texts take in single precision


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


def embed(
    body: SentenceTransformer,
    texts: Sequence[str],
    *,
    batch_size: int | None = None,
    normalize: bool = False,
    description: str = "Encoding",
    forward: ForwardPass | None = None,
    cache_tokens: bool = True,
    share: bool = True,
) -> Floats:
    """Embed n texts on the device of the body: (n, d) float32; float16 mapped from a temporary file if that is large.

    Args:
        body: The body.
        texts: n texts, which are processed longest first, in batches of similar length.
        batch_size: Maximum number of texts per forward pass. [default: limited by the number of tokens]
        normalize: Scale every embedding to length 1.
        description: Label of the progress bar.
        forward: Forward pass of the body. [default: in single precision]
        cache_tokens: Keep the tokens of the texts for other bodies with the same tokenizer.
        share: Let the other processes of `use_ranks` embed some of the texts, if there are many.
    """
    forward, ranks = forward or ForwardPass(body), other_ranks() if share else None
    can_send = "forward" not in vars(body)  # it is replaced while a body is trained in mixed precision
    if ranks and can_send and len(texts) >= _MIN_SHARED.get(body.device.type, math.inf):
        options = {"batch_size": batch_size, "normalize": normalize, "cache_tokens": cache_tokens}
        return _embed_on_ranks(ranks, forward, texts, description=f"{description} on rank 0", **options)
    max_texts = batch_size or batch_limits(body)[0]
    embeddings: Floats | None = None

    def encode(tokens: Tokens, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        max_tokens = math.inf if batch_size else batch_limits(body)[1] * size / max_texts
        part = encode_tokens(forward, tokens, size, max_tokens, normalize=normalize)
        if forward.method != "fp32" and not np.isfinite(part).all():  # out of the range of half precision
            with (exact := ForwardPass(body)).context():
                part = encode_tokens(exact, tokens, size, max_tokens, normalize=normalize)
        return tokens.rows, part

    with forward.context():
        chunks = iter_tokens(body, texts, max(_CHUNK, max_texts), use_cache=cache_tokens)
        for rows, part in run_batches(body, chunks, encode, len(texts), max_texts, description):
            if embeddings is None:
                embeddings = allocate_array((len(texts), part.shape[1]))
            embeddings[rows] = part
    return np.empty((0, body.get_embedding_dimension() or 0), np.float32) if embeddings is None else embeddings


def _embed_on_ranks(ranks: OtherRanks, forward: ForwardPass, texts: Sequence[str], **options: Any) -> Floats:
    """Embed texts as in `embed`, some of them on each process."""
    rows = ranks.deal(np.array([len(text) for text in texts]))
    own, *others = (([texts[row] for row in part],) for part in rows)
    run: Any = partial(embed, forward.body, forward=forward, share=False, **options)
    with ranks.session():
        ranks.submit(run, others)
        parts = [run(*own), *ranks.collect()]
    embeddings = allocate_array((len(texts), parts[0].shape[1]))
    for part, values in zip(rows, parts, strict=True):
        embeddings[part] = values
    return embeddings


def batch_limits(body: SentenceTransformer) -> tuple[int, int]:
    """Return the default maximum numbers of texts and of tokens in a batch, for the device of a body."""
    return _LIMITS.get(body.device.type, _LIMITS["cpu"])


def encode_tokens(
    forward: ForwardPass, tokens: Tokens, max_texts: int, max_tokens: float, *, normalize: bool = False
) -> npt.NDArray[np.float32]:
    """Embed k tokenized texts in batches of at most ``max_texts`` texts and ``max_tokens`` tokens: (k, d)."""
    import torch

    batches = list(iter_batches(tokens.lengths, max_texts, max_tokens))
    forward.body.eval()
    with torch.inference_mode():
        parts = [forward(tokens.take(batch).features(forward.body)) for batch in batches]
        embeddings = torch.cat(parts).float()[:, : forward.body.truncate_dim]
        if normalize:
            embeddings = torch.nn.functional.normalize(embeddings)
    result = np.empty(embeddings.shape, np.float32)
    result[np.concatenate(batches)] = embeddings.cpu().numpy()  # a GPU is waited for only here
    return result


def choose_forward(model: SetFitModel, texts: Sequence[str], *, n_texts: int | None = None) -> ForwardPass:
    """Choose the fastest forward pass of a classifier whose probabilities are nearly those in single precision.

    Candidates are half precision, TF32 and ONNX Runtime. They are timed and compared on a sample of the texts, if there
    are enough texts to pay for it: the probabilities may differ by at most `MAX_DIFFERENCE` on average. ``n_texts`` is
    the number of texts in total. [default: those passed]
    """
    body = model.model_body
    device, best = body.device.type, ForwardPass(body)
    n_sample = _SAMPLE.get(device, 32)
    if is_static(body) or len(texts) < 4 * n_sample:  # a table lookup is no faster in another way
        return best
    sample = tokenize(body, [texts[row] for row in np.linspace(0, len(texts) - 1, n_sample).astype(int)])
    warm_up = sample.take(np.arange(1 if device == "cpu" else n_sample))

    def measure(forward: ForwardPass) -> tuple[float, npt.NDArray[np.float32]]:
        with forward.context():
            encode_tokens(forward, warm_up, *batch_limits(body))
            started = time.perf_counter()
            embeddings = encode_tokens(forward, sample, *batch_limits(body), normalize=model.normalize_embeddings)
            return time.perf_counter() - started, embeddings

    try:
        seconds, embeddings = measure(best)
        expected, total = head_proba(model, embeddings), seconds * (n_texts or len(texts)) / n_sample
        for method in _FASTER.get(device, ()):
            if total < _MIN_SECONDS[method]:
                continue
            forward = OnnxForwardPass(body) if method == "onnx" else ForwardPass(body, method)
            faster, embeddings = measure(forward)
            if not np.isfinite(embeddings).all():
                continue
            difference = float(np.abs(head_proba(model, embeddings) - expected).max(axis=1).mean())
            logger.debug(
                "%s: %.2f times the speed of fp32, mean difference %.1e.", method, seconds / faster, difference
            )
            if seconds > _MIN_SPEEDUP * faster and difference <= MAX_DIFFERENCE:
                return forward
    except Exception as error:  # an optional step must not fail a run; `embed` handles a lack of memory
        logger.debug("Keeping single precision (%s: %s).", type(error).__name__, error)
    return best


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
    model: SetFitModel, texts: Sequence[str], *, description: str = "Predicting", **options: Any
) -> npt.NDArray[np.float32]:
    """Predict the class probabilities of texts: (n, n_classes) float32, rows summing to 1; options as in `embed`."""
    normalize = model.normalize_embeddings
    return head_proba(model, embed(model.model_body, texts, normalize=normalize, description=description, **options))


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
