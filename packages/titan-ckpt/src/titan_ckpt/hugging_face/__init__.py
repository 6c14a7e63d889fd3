"""Import and export of Hugging Face weights."""
