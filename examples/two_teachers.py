"""Two teachers of two families, one after the other; the student learns from what they say on average.

Run: python examples/two_teachers.py
"""

from typing import Any

from setfit_kd import RunResult, distill


def main(**settings: Any) -> RunResult:
    defaults: dict[str, Any] = {
        "teacher": ["demo:all-MiniLM-L6-v2", "transformer:demo:all-MiniLM-L6-v2"],
        "teacher_weights": "2,1",  # or cross-validated, or left out to have them count alike
        "student": "static",
        "shots": 16,
    }
    result = distill("bundled:newswire", "bundled:newswire", "bundled:newswire", **{**defaults, **settings})

    for name, measured in result.metrics.items():  # "teacher" are both of them together
        print(f"{name:<34} accuracy {measured['accuracy']:.1%}")
    return result


if __name__ == "__main__":
    main()
