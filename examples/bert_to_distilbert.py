"""Distil a BERT, fine-tuned on labels, into a DistilBERT initialized from every other layer, by soft and hard targets.

Run: python examples/bert_to_distilbert.py
With access to the hub, use teacher="transformer:bert-base-uncased" and student="layers:6:distilbert", or
student="transformer:distilbert-base-uncased" to start from pretrained weights.
"""

from typing import Any

from setfit_kd import RunResult, distill


def main(**settings: Any) -> RunResult:
    defaults: dict[str, Any] = {
        "teacher": "transformer:demo:all-MiniLM-L6-v2",  # a BERT with 6 layers
        "student": "layers:3:distilbert",
        "temperature": 5,  # temperature of the soft targets
        "alpha": 0.5,  # weight of the hard targets, for texts with a label
    }
    result = distill("bundled:newswire", None, "bundled:newswire", **{**defaults, **settings})

    for name, metrics in result.metrics.items():  # the baseline: as many steps, hard targets only
        print(f"{name:<9} accuracy {metrics['accuracy']:.1%}, {metrics['parameters'] / 1e6:.1f} M parameters")
    return result


if __name__ == "__main__":
    main()
