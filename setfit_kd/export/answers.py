"""Export a question answering model as a bundle and check the bundle against the model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from timeit import repeat
from typing import Any

import numpy as np
from torch import Tensor, nn

from setfit_kd import __version__
from setfit_kd.errors import ConfigError
from setfit_kd.export.bundle import README_FILE, Bundle, Draft, bundle_folder, check_output
from setfit_kd.models.onnx import write_graph
from setfit_kd.qa.data import Question
from setfit_kd.qa.model import QuestionAnswerer
from setfit_kd.qa.train import predict_answers
from setfit_kd.qa.windows import BodyWindows
from setfit_kd.runtime import answer, classify
from setfit_kd.utils.console import escape_markdown, truncate
from setfit_kd.utils.files import folder_megabytes

_README = """# {title}

A model that finds the answer to a question in a text. It requires numpy, tokenizers and onnxruntime, but not torch:

```
pip install numpy tokenizers onnxruntime
python answer.py "some question" "some text"
```

```python
from answer import Answerer  # or: from setfit_kd.runtime.answer import Answerer

Answerer("path/to/this/folder")("some question", "some text")
```

On {texts:,} questions, {agreement:.1%} of the answers are the same as those of the original model, and their
probabilities differ by at most {largest_difference:.2g}.
"""


class _AnswerDraft(Draft):
    """Bundle that is being written and checked against the `Answer`s expected to pairs of question and context."""

    def compare(self) -> tuple[float, float]:
        pairs = list(zip(answer.Answerer(self.folder).answer(self.texts), self.expected, strict=True))
        difference = max(abs((a.score or 0) - (b.score or 0)) for a, b in pairs)  # a question that is too long has none
        return float(np.mean([a.text == b.text for a, b in pairs])), difference

    def measure_seconds(self) -> float:
        answerer = answer.Answerer(self.folder)
        return min(repeat(lambda: answerer.answer(self.texts[:32]), number=1, repeat=4))


class _Graph(nn.Module):
    """Module that maps (B, T) token ids, attention mask and token types to (B, T) start and end logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *types: Tensor) -> tuple[Tensor, Tensor]:
        more = {"token_type_ids": types[0]} if types else {}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **more)
        return output.start_logits, output.end_logits


def export_answerer(
    model: QuestionAnswerer,
    folder: str | Path,
    *,
    questions: Sequence[Question],
    format: str | None = None,  # noqa: A002 - the name of the setting
    min_agreement: float | None = None,
    title: str = "Question answering",
    overwrite: bool = False,
) -> Bundle:
    """Export a model as a bundle, a folder that `setfit_kd.runtime.answer.Answerer` runs without torch.

    Before it is saved, the bundle is compared with the model on at most 200 of the questions. The agreement is the
    share of the same answers; otherwise as `export_bundle`, with the formats ``onnx`` and ``onnx-int8`` (the default).
    """
    format = format or "onnx-int8"  # noqa: A001
    if format == "static":
        raise ConfigError("A transformer cannot be exported as static.", hint="Use --format onnx-int8.")
    check_output(Path(folder), overwrite=overwrite)
    body: Any = model.model_body.to("cpu")
    some = [questions[row] for row in np.unique(np.linspace(0, len(questions) - 1, 200).astype(int))]
    expected = predict_answers(model, some)
    windows = BodyWindows(body, model.config)
    manifest = {
        "format": answer.FORMAT,
        "max_length": windows.max_length,
        "stride": windows.stride,
        "max_answer_tokens": model.config.max_answer_tokens,
        "null_threshold": model.null_threshold,
        "pad_id": body.tokenizer.pad_token_id or 0,
        "made_by": f"setfit-kd {__version__}",
    }
    with bundle_folder(folder, overwrite=overwrite) as part:
        (part / classify.TOKENIZER).write_text(windows.tokenizer, encoding="utf-8")
        for script in (classify.__file__, answer.__file__):
            shutil.copyfile(script, part / Path(script).name)
        graph, types = _Graph(body[0].model), body[0].uses_token_types
        write_graph(graph, part / classify.ONNX_MODEL, outputs=answer.OUTPUTS, token_types=types, per_token=True)
        pairs = [(question.question, question.context) for question in some]
        draft, reason = _AnswerDraft(part, manifest, pairs, expected, min_agreement, answer.QUESTION_ANSWERING), None
        parity = draft.verify("onnx")
        if format == "onnx-int8":
            parity, reason = draft.try_int8(parity)
            format = "onnx" if reason else format  # noqa: A001
        readme = _README.format(title=escape_markdown(truncate(title)), **parity)
        (part / README_FILE).write_text(readme, encoding="utf-8")
        megabytes = folder_megabytes(part)
    return Bundle(Path(folder), format, parity, round(megabytes, 1), reason)
