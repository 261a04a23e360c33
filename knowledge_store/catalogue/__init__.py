"""What is known of a store without opening a shard: the index of its commit records, and facts about dumps and shards.

No Parquet file is read here.
"""
