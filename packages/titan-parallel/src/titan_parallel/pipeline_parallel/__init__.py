"""Pipeline parallelism: the blocks of a model over ranks."""
