"""Losses as plain functions, and how they become the loss of a step.

    table         LOSSES: what a run can choose, and what each loss needs of a dump and of the student
    targets       what the store holds at the positions that count, paired with the student's logits
    divergences   the functions
    step          from an entry to the loss of an optimiser step
    preference    losses of groups of answers
    sliced        head and loss together, a slice of positions at a time; `head` is what it asks of a model
    recalibration the teacher's targets at a calibration's temperature

Nothing here knows the trainer.
"""
