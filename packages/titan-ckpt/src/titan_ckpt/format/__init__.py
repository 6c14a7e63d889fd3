"""The files of a checkpoint: index, state, manifest, safetensors."""
