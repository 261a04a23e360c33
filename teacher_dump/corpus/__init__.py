"""The user's data: rows of files, conversations, documents, and their tokens.

One file for each type of file (`jsonl`, `parquet`, `text`); `documents` makes one numbered stream of them, and `tokenisation`
the sequences that a teacher sees. Nothing here asks a teacher, or imports torch.
"""
