"""What to train on, chosen by SQL: which sequences of a store, and which of their targets.

The SQL is answered in a process of its own (see `isolation`), and its answer is read as it comes. Nothing here knows the
columns of a kind, or reads knowledge: what is chosen is for a `reading.plan.ReadPlan`.
"""
