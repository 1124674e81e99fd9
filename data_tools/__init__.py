"""Making and checking shards; stands beside the library, on its data, images and core."""
