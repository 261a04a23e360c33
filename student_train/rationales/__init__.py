"""Rationales: the few tokens of a context that a student learns to name as a second task, and how far they hold the answer.

Which tokens they are is decided here; what is learnt from them is a loss (`losses.rationale`). No training loop, no models.
"""
