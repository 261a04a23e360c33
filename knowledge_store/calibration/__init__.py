"""Calibration of teachers and students, in numpy: its error, fitting a temperature, and the file that a fit is kept in.

Nothing here opens a store, imports torch, or asks a model: it is given arrays.
"""
