"""SQL over a store: one SELECT statement, its limits, and answers as text.

Relations are declared by the kinds of knowledge. Nothing here writes to a store.
"""
