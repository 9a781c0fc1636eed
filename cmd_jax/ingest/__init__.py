"""From clips to shards of a dataset, decoded once."""
