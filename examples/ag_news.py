"""Reference experiment on AG News: MPNet-base as teacher, MiniLM-L3 as student. Needs access to the hub.

Run: python examples/ag_news.py
"""

from typing import Any

from setfit_kd import RunResult, distill


def main(**settings: Any) -> RunResult:
    defaults: dict[str, Any] = {
        "teacher": "sentence-transformers/paraphrase-mpnet-base-v2",
        "student": "sentence-transformers/paraphrase-MiniLM-L3-v2",
        "shots": 16,
        "pool_size": 1000,
        "output_dir": "runs/ag_news",
        "overwrite": True,
    }
    result = distill("ag_news", "ag_news", "ag_news", **{**defaults, **settings})
    for name, metrics in result.metrics.items():
        print(f"{name:<9} accuracy {metrics['accuracy']:.1%}, {metrics['parameters'] / 1e6:.1f} M parameters")
    return result


if __name__ == "__main__":
    main()
