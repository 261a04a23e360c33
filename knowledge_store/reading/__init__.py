"""Reading for training: random access to sequences, their order, batches, and the cache of decoded sequences on the local disk.

Nothing here writes to a store.
"""
