"""Distil a student with half of the teacher's layers from 16 labels per class of the bundled news corpus, offline.

Run: python examples/quickstart.py
"""

from typing import Any

from setfit_kd import RunResult, distill


def main(**settings: Any) -> RunResult:
    defaults: dict[str, Any] = {
        "teacher": "demo:all-MiniLM-L6-v2",
        "student": "layers:0,2,5",
        "shots": 16,
    }
    result = distill("bundled:newswire", "bundled:newswire", "bundled:newswire", **{**defaults, **settings})

    for name, metrics in result.metrics.items():
        print(f"{name:<9} accuracy {metrics['accuracy']:.1%}, {metrics['texts_per_second']:,.0f} texts/s")
    texts = ["Keeper saves two penalties as the islanders reach their first final"]
    print(texts[0], "->", result.student.predict(texts)[0])
    return result


if __name__ == "__main__":
    main()
