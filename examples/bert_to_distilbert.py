"""A BERT, fine-tuned on labels, teaches a DistilBERT made of every other layer of it, by soft and hard targets.

Run: python examples/bert_to_distilbert.py
With the hub, the classic: teacher="transformer:bert-base-uncased", student="layers:6:distilbert", or
student="transformer:distilbert-base-uncased" to begin from weights of its own.
"""

from typing import Any

from setfit_kd import RunResult, distill


def main(**settings: Any) -> RunResult:
    defaults: dict[str, Any] = {
        "teacher": "transformer:demo:all-MiniLM-L6-v2",  # a BERT of 6 layers
        "student": "layers:3:distilbert",
        "temperature": 5,  # of the soft targets
        "alpha": 0.5,  # the share of the hard ones, where a text has a label
    }
    result = distill("bundled:newswire", None, "bundled:newswire", **{**defaults, **settings})

    for name, measured in result.metrics.items():  # the baseline takes as many steps on the hard targets alone
        print(f"{name:<9} accuracy {measured['accuracy']:.1%}, {measured['parameters'] / 1e6:.1f} M parameters")
    return result


if __name__ == "__main__":
    main()
