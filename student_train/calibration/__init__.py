"""Calibration of students and of what they learn from: fitting on a dump, and knowledge re-calibrated."""
