"""Losses as plain functions, and how they are computed in slices of the vocabulary product.

Nothing here knows the trainer.
"""
