"""Model families as plain nn.Modules built from configs, with checked Hugging Face weight adapters."""
