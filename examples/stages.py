"""Call the stages one by one, as in your own code.

Run: python examples/stages.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from setfit_kd import RunConfig, TeacherSignals, evaluate, load, train_student, train_teacher
from setfit_kd.data.labeled_set import draw_shots, encode_labels
from setfit_kd.data.sources import read
from setfit_kd.models.io import save_model
from setfit_kd.teacher.scoring import refine_and_score

TEACHER = "demo:all-MiniLM-L6-v2"


def main(teacher: str = TEACHER, student: str = TEACHER, **settings: Any) -> float:
    config = RunConfig.of(**settings)

    rows = read("bundled:newswire", label_column="label")
    labeled = draw_shots(encode_labels(rows), 16, seed=config.seed)
    held_out = encode_labels(read("bundled:newswire", label_column="label", role="test"), labeled.label_names)

    # 1. Train a teacher on 64 labels.
    teacher_model = train_teacher(labeled, teacher, config=config)

    with TemporaryDirectory() as folder:
        # 2. Refine its head on the pool and score the pool. Saved signals are enough to train a student.
        teacher_model, signals = refine_and_score(teacher_model, labeled, rows.texts, config=config)
        signals.save(Path(folder) / "signals")
        signals = TeacherSignals.load(Path(folder) / "signals")

        # 3. Train a student on the signals.
        student_model = train_student(signals, student, labeled=labeled, config=config)
        save_model(student_model, Path(folder) / "student")

        # 4. Load the student and evaluate it.
        evaluation = evaluate(load(Path(folder) / "student", device=config.device), held_out)
    print(f"accuracy {evaluation.quality.accuracy:.1%}, {evaluation.cost.texts_per_second:,.0f} texts/s")
    return float(evaluation.quality.accuracy)


if __name__ == "__main__":
    main()
