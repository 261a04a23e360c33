"""Calibration of a dump's teacher without the teacher: fitted from what the dump keeps.

Nothing here asks a teacher or loads a model, imports torch, or writes to the store.
"""
