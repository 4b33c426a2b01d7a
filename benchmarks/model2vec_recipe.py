"""Train and apply a classifier of model2vec as its documentation describes, in an environment of its own.

Run by methods.py as: PYTHON benchmarks/model2vec_recipe.py CASE.json, with model2vec[distill,train] installed. The case
holds the folder of the ``body``, the ``texts`` and ``labels`` to train on, and the ``tests``; the script adds the
``classes`` and the ``probabilities`` of the tests.
"""

import json
import sys
from pathlib import Path

from model2vec.distill import distill
from model2vec.train import StaticModelForClassification

file = Path(sys.argv[1])
case = json.loads(file.read_text(encoding="utf-8"))
classifier = StaticModelForClassification.from_static_model(model=distill(case["body"]))
classifier.fit(case["texts"], case["labels"], random_seed=case["seed"])
case["classes"] = [str(name) for name in classifier.classes_]
case["probabilities"] = classifier.predict_proba(case["tests"]).tolist()
file.write_text(json.dumps(case), encoding="utf-8")
