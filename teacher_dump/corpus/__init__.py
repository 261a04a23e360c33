"""The user's data: documents from files, conversations, and their tokens.

Nothing here asks a teacher.
"""
