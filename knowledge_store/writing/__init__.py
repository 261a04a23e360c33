"""Writing a dump, repairing it and verifying it.

Nothing here asks a teacher, and nothing here is needed to read.
"""
