"""Calibration of a dump's teacher without the teacher: fitted from what the dump keeps."""
