"""Train a masked language model on texts, with words added to its vocabulary, and distil it into three of its layers.

Run: python examples/masked_language_model.py
"""

from pathlib import Path
from typing import Any

from setfit_kd.config.mlm import PretrainConfig
from setfit_kd.mlm.run import pretrain


def main(
    model: str = "demo:all-MiniLM-L6-v2",
    folder: str | Path = "runs/masked-lm",
    layers: str = "layers:3",
    **settings: Any,
) -> None:
    texts = {"texts": "bundled:newswire", "eval": "bundled:newswire"}  # train and held-out split
    defaults: dict[str, Any] = {"steps": 20, "learning_rate": 2e-4, **texts, **settings}
    teacher, student = Path(folder) / "teacher", Path(folder) / "student"

    trained = pretrain(PretrainConfig.of(model=model, output_dir=teacher, add_vocab=50, **defaults))
    distilled = pretrain(PretrainConfig.of(model=layers, teacher=str(teacher), output_dir=student, **defaults))

    print(f"added {trained.metrics['added_words']} words")
    for name, result in {"teacher": trained, "student": distilled}.items():
        before, after = (result.metrics[time]["bits_per_character"] for time in ("before", "after"))
        print(f"{name}: {before:.3f} bits per character before training, {after:.3f} after")


if __name__ == "__main__":
    main()
