"""Evaluation of classifiers: quality, calibration, confidence intervals, size and speed."""
