"""Train a student on label probabilities from a file, for example from a large language model or from annotators.

Run: python examples/labels_from_file.py
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from setfit_kd import RunResult, distill
from setfit_kd.data.sources import read


def write_answers(path: Path) -> None:
    """Write simulated language model answers: the correct label of each text with a probability of 0.7."""
    rows = read("bundled:newswire", label_column="label")
    assert rows.labels is not None
    rest = 0.3 / (len(rows.label_names) - 1)
    with path.open("w", encoding="utf-8") as file:
        for text, label in zip(rows.texts, rows.labels, strict=True):
            probabilities = {name: 0.7 if name == label else rest for name in rows.label_names}
            file.write(json.dumps({"text": text, "probabilities": probabilities}) + "\n")


def main(**settings: Any) -> RunResult:
    defaults: dict[str, Any] = {"student": "layers:0,2,5@demo:all-MiniLM-L6-v2"}
    with TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.jsonl"
        write_answers(answers)
        result = distill(signals=str(answers), eval="bundled:newswire", **{**defaults, **settings})
    print(f"accuracy {result.metrics['student']['accuracy']:.1%}")
    return result


if __name__ == "__main__":
    main()
