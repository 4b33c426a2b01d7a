"""Build a student's body and train it on a teacher's signals."""
