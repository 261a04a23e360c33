"""The user's data: rows of files, what they hold, documents, and their tokens.

One file for each type of file (`jsonl`, `json_list`, `parquet`, `arrow_files`, `text`), and `sources` for what becomes files
first; `row_shapes` says what a row holds; `documents` makes one numbered stream of rows, and `tokenisation` the sequences that
a teacher sees. Nothing here asks a teacher, or imports torch.
"""
