"""Distil a classifier of pairs of texts: do two news items belong to the same section?

Run: python examples/sentence_pairs.py
"""

from itertools import pairwise
from typing import Any

from setfit_kd import distill
from setfit_kd.data.sources import read


def pairs(role: str) -> list[dict[str, str]]:
    """Return pairs of neighboring items of the bundled corpus, with their labels."""
    rows = read("bundled:newswire", label_column="label", role=role)
    assert rows.labels is not None
    items = list(zip(rows.texts, rows.labels, strict=True))
    return [
        {"first": first, "second": second, "label": "same" if label == other else "different"}
        for (first, label), (second, other) in pairwise(items)
    ]


def main(**settings: Any) -> None:
    options: dict[str, Any] = {
        "teacher": "transformer:demo:all-MiniLM-L6-v2",
        "student": "layers:0,2,5",
        "text_column": "first",
        "pair_column": "second",
    }
    result = distill(pairs("train"), eval=pairs("test"), **{**options, **settings})
    print(result)
    print(result.student.predict([("Rain stops play on the third day", "Keeper saves two penalties")]))


if __name__ == "__main__":
    main()
