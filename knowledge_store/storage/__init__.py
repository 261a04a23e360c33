"""The only room that touches a store's files: read, list, publish without replacing, remove, lock.

Nothing here knows what is in a file.
"""
