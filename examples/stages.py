"""The stages one by one, as you would use them inside your own code.

Run: python examples/stages.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from setfit_kd import RunConfig, TeacherSignals, evaluate, load, train_student, train_teacher
from setfit_kd.data import draw_shots, encode_labels, read
from setfit_kd.models import save_model
from setfit_kd.teacher import refine_and_score

TEACHER = "demo:all-MiniLM-L6-v2"


def main(teacher: str = TEACHER, student: str = TEACHER, **settings: Any) -> float:
    config = RunConfig.of(**settings)

    rows = read("bundled:newswire", label_column="label")
    labeled = draw_shots(encode_labels(rows), 16, seed=config.seed)
    held_out = encode_labels(read("bundled:newswire", label_column="label", role="test"), labeled.label_names)

    # 1. A teacher from 64 labels.
    teacher_model = train_teacher(labeled, teacher, config=config)

    with TemporaryDirectory() as folder:
        # 2. What it says about the pool, its head refined on it. Signals can be kept: a student needs no teacher.
        teacher_model, signals = refine_and_score(teacher_model, labeled, rows.texts, config=config)
        signals.save(Path(folder) / "signals")
        signals = TeacherSignals.load(Path(folder) / "signals")

        # 3. A student from the signals.
        student_model = train_student(signals, student, labeled=labeled, config=config)
        save_model(student_model, Path(folder) / "student")

        # 4. Load it as anybody would, and measure it.
        measured = evaluate(load(Path(folder) / "student", device=config.device), held_out)
    print(f"accuracy {measured.quality.accuracy:.1%}, {measured.cost.texts_per_second:,.0f} texts/s")
    return float(measured.quality.accuracy)


if __name__ == "__main__":
    main()
