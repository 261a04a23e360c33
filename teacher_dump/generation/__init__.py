"""Texts that a teacher writes: a folder of Parquet files that is a corpus, with where each text comes from beside it.

Prompts from rows and templates, the folder's settings, and the pass that writes the texts belong here. How a teacher draws
tokens is in `teachers`; how such a folder is read as a corpus is in `corpus`. Nothing here knows a store.
"""
