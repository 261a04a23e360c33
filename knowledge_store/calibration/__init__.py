"""Calibration: the file that keeps one, and its measures in numpy, for teachers and students alike."""
