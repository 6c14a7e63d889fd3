"""Context parallelism: the tokens of each sequence over ranks."""
