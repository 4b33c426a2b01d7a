"""Fine-tune a transformer end to end on labels, with looks at validation texts, and write it as transformers has it.

Run: python examples/finetune.py
"""

from pathlib import Path
from typing import Any

from setfit_kd import evaluate
from setfit_kd.data import encode_labels, read
from setfit_kd.finetune import finetune
from setfit_kd.models import save_model


def main(model: str = "demo:all-MiniLM-L6-v2", folder: str | Path = "runs/finetuned", **settings: Any) -> float:
    if Path(folder).exists():
        raise SystemExit(f"{folder} is there already: remove it, or name another folder.")
    rows = encode_labels(read("bundled:newswire", label_column="label"))
    training, validation = rows.take(range(0, len(rows), 2)), rows.take(range(1, len(rows), 2))
    held_out = encode_labels(read("bundled:newswire", label_column="label", role="test"), rows.label_names)

    looks: list[dict[str, float]] = []
    defaults: dict[str, Any] = {"eval_steps": 10, "patience": 3, "epochs": 5}
    classifier = finetune(training, model, validation=validation, looks=looks, **{**defaults, **settings})

    for look in looks:
        print(f"step {look['step']:>3}: accuracy {look['accuracy']:.1%}, macro-F1 {look['f1-macro']:.1%}")
    save_model(classifier, folder)  # transformers.pipeline("text-classification", model=folder) reads it
    accuracy = evaluate(classifier, held_out).quality.accuracy
    print(f"accuracy {accuracy:.1%} on texts never seen; the model is in {folder}")
    return accuracy


if __name__ == "__main__":
    main()
