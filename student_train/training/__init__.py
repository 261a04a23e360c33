"""Training a student from a store: options, data, models, the trainer, and the folder of a run.

Nothing here knows a loss's formula, measures a finished student, or writes to the store.
"""
