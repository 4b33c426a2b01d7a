"""Train two teachers of different model families and distil the weighted average of their predictions.

Run: python examples/two_teachers.py
"""

from typing import Any

from setfit_kd import RunResult, distill


def main(**settings: Any) -> RunResult:
    defaults: dict[str, Any] = {
        "teacher": ["demo:all-MiniLM-L6-v2", "transformer:demo:all-MiniLM-L6-v2"],
        "teacher_weights": "2,1",  # or cross-validated; leave out for equal weights
        "student": "static",
        "shots": 16,
    }
    result = distill("bundled:newswire", "bundled:newswire", "bundled:newswire", **{**defaults, **settings})

    for name, metrics in result.metrics.items():  # "teacher" is the average of both
        print(f"{name:<34} accuracy {metrics['accuracy']:.1%}")
    return result


if __name__ == "__main__":
    main()
