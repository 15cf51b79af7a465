"""From text to token shards to batches."""
