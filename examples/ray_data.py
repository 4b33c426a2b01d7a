"""Classify the rows of a Ray data set, with the columns of the predictions added to its own.

Run: python examples/ray_data.py runs/newswire/student/bundle
Needs Ray: pip install '.[ray]' in the clone
"""

import sys
from importlib.resources import files

import ray.data

from setfit_kd.scale import BatchClassifier


def main(model: str, workers: int = 2) -> None:
    rows = ray.data.read_json(str(files("setfit_kd") / "data" / "newswire" / "eval.jsonl"))
    predictions = rows.drop_columns(["label"]).map_batches(
        BatchClassifier,
        fn_constructor_args=[model],
        fn_constructor_kwargs={"threads": 1},
        batch_size=256,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    for row in predictions.take(3):
        print(f"{row['label']} ({row['probability']:.0%}): {row['text']}")


if __name__ == "__main__":
    main(sys.argv[1])
