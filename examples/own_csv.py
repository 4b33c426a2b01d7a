"""Your own files: a labeled CSV, a file of unlabeled texts, and a labeled CSV to evaluate on.

Run: python examples/own_csv.py labeled.csv unlabeled.txt test.csv
The CSVs have the columns text and label; set text_column and label_column if yours have other names.
"""

import sys
from typing import Any

from setfit_kd import RunResult, distill


def main(labeled: str, unlabeled: str, test: str, **settings: Any) -> RunResult:
    defaults: dict[str, Any] = {
        "teacher": "demo:all-MiniLM-L6-v2",  # with access to the hub: sentence-transformers/paraphrase-mpnet-base-v2
        "student": "layers:0,2,5",  # with access to the hub: sentence-transformers/paraphrase-MiniLM-L3-v2
        "output_dir": "runs/own",
        "overwrite": True,
    }
    result = distill(labeled, unlabeled, test, **{**defaults, **settings})
    quality = result.evaluations["student"].quality
    print(f"accuracy {quality.accuracy:.1%}, agreement with the teacher {quality.agreement:.1%}")
    for label, scores in quality.classes.items():
        print(f"  {label:<20} F1 {scores.f1:.1%} ({scores.support} texts)")
    return result


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("Usage: python examples/own_csv.py labeled.csv unlabeled.txt test.csv")
    main(*sys.argv[1:])
