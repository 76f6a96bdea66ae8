"""Data: files and folders of examples, as token ids that a model learns from. Knows tokenizers, which are handed in, and no model."""
