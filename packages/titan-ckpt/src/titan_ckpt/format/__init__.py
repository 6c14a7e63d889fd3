"""The files of a checkpoint: index, JSON state, manifest, safetensors."""
