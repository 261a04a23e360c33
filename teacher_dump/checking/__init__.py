"""The teacher asked again: whether a dump still says what the teacher says.

Nothing here reads a corpus, or writes to a store: what is damaged is only named.
"""
