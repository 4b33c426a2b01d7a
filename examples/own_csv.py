"""Your own files: a CSV with labels, any file of raw texts, and a labeled CSV to measure on.

Run: python examples/own_csv.py labeled.csv unlabeled.txt test.csv
The CSVs have the columns text and label; name others by text_column and label_column.
"""

import sys
from typing import Any

from setfit_kd import RunResult, distill


def main(labeled: str, unlabeled: str, test: str, **settings: Any) -> RunResult:
    defaults: dict[str, Any] = {
        "teacher": "demo:all-MiniLM-L6-v2",  # with a hub: sentence-transformers/paraphrase-mpnet-base-v2
        "student": "layers:0,2,5",  # with a hub: sentence-transformers/paraphrase-MiniLM-L3-v2
        "output_dir": "runs/own",
        "overwrite": True,
    }
    result = distill(labeled, unlabeled, test, **{**defaults, **settings})
    student = result.evaluations["student"].quality
    print(f"accuracy {student.accuracy:.1%}, agrees with the teacher on {student.agreement:.1%}")
    for name, quality in student.classes.items():
        print(f"  {name:<20} F1 {quality.f1:.1%} over {quality.support} texts")
    return result


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("Usage: python examples/own_csv.py labeled.csv unlabeled.txt test.csv")
    main(*sys.argv[1:])
