"""Pipeline parallelism: split the blocks of a model into stages on different ranks."""
