"""What the three commands share when they talk to a person: lines, progress, numbers.

Libraries never import this room: they take callbacks and return what they found.
"""
