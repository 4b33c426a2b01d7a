"""The bundled news corpus, offline: 16 labels a class teach a student half the teacher's depth.

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

    for name, measured in result.metrics.items():
        print(f"{name:<9} accuracy {measured['accuracy']:.1%}, {measured['texts_per_second']:,.0f} texts/s")
    texts = ["Keeper saves two penalties as the islanders reach their first final"]
    print(texts[0], "->", result.student.predict(texts)[0])
    return result


if __name__ == "__main__":
    main()
