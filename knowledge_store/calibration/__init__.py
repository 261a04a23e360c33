"""Calibration of teachers and students, in numpy: its error, fitting a temperature, and the file that a fit is kept in."""
