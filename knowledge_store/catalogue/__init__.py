"""What is known of a store without opening a shard: its dumps, the index of commit records, and facts about dumps and shards.

No Parquet file is read here.
"""
