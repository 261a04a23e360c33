"""The teacher asked again: whether a dump still says what the teacher says."""
