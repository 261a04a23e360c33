"""What stands on disk: names of files, manifest, commit records, sealed JSON, the tables that every dump has, Parquet files.

FORMAT.md is its specification. Nothing here knows what a kind of knowledge means, and nothing here opens a store.
"""
