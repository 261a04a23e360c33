"""A child process with limits of memory and time, for work on what somebody else made.

What the child does lives where it belongs (`sql`, `writing`); here is how it is started, limited, heard and ended.
"""
