"""Distil a sentence encoder into a smaller one on unlabeled texts, and save it for use as a teacher or student.

Run: python examples/sentence_encoder.py
"""

from pathlib import Path
from typing import Any

from setfit_kd.encoder.train import train_encoder

SENTENCES = ["The striker scored twice.", "Two goals by the forward.", "The bank raised its rates."]


def main(
    teacher: str = "demo:all-MiniLM-L6-v2",
    model: str = "layers:0,2,5",
    folder: str | Path = "runs/encoder",
    **settings: Any,
) -> None:
    if Path(folder).exists():
        raise SystemExit(f"{folder} already exists: remove it or choose another folder.")
    encoder = train_encoder(model, teacher=teacher, texts="bundled:newswire", **settings)
    encoder.save_pretrained(str(folder))  # now: setfit-kd run --student runs/encoder ...
    embeddings = encoder.encode(SENTENCES)
    same, other = encoder.similarity(embeddings[:1], embeddings[1:])[0].tolist()
    print(f"cosine of sentences about the same event {same:.2f}, about another one {other:.2f}; saved to {folder}")


if __name__ == "__main__":
    main()
