"""Fine-tune a transformer end to end on labels, with early stopping, and save it in transformers format.

Run: python examples/finetune.py
"""

from pathlib import Path
from typing import Any

from setfit_kd import evaluate
from setfit_kd.data.labeled_set import encode_labels
from setfit_kd.data.sources import read
from setfit_kd.finetune.train import finetune
from setfit_kd.models.io import save_model


def main(model: str = "demo:all-MiniLM-L6-v2", folder: str | Path = "runs/finetuned", **settings: Any) -> float:
    if Path(folder).exists():
        raise SystemExit(f"{folder} already exists: remove it or choose another folder.")
    rows = encode_labels(read("bundled:newswire", label_column="label"))
    training, validation = rows.take(range(0, len(rows), 2)), rows.take(range(1, len(rows), 2))
    held_out = encode_labels(read("bundled:newswire", label_column="label", role="test"), rows.label_names)

    history: list[dict[str, float]] = []
    defaults: dict[str, Any] = {"eval_steps": 10, "patience": 3, "epochs": 5}
    classifier = finetune(training, model, validation=validation, history=history, **{**defaults, **settings})

    for metrics in history:
        print(f"step {metrics['step']:>3}: accuracy {metrics['accuracy']:.1%}, macro-F1 {metrics['f1-macro']:.1%}")
    save_model(classifier, folder)  # loads with transformers.pipeline("text-classification", model=folder)
    accuracy = evaluate(classifier, held_out).quality.accuracy
    print(f"accuracy {accuracy:.1%} on held-out texts; model saved to {folder}")
    return accuracy


if __name__ == "__main__":
    main()
