"""A page to look into a store with a browser: dumps, sequences token by token, questions, SQL.

Every number on it is the answer to an SQL statement, which the page shows. What is asked of one sequence, or of the index, is
answered here; what reads more, and whatever a person types, in a process of its own that can be stopped (`sql.isolated`).

Must not be in it: anything that reads a store but by SQL and the index, and anything that the page would load from elsewhere.
"""
