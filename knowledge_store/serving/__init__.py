"""A store served to who has no disk for it, or no key: Arrow Flight, for this package, and Flight SQL, for ADBC.

The server reads and answers; nothing here writes to a store. What sequences, files and answers are is said elsewhere.
"""
