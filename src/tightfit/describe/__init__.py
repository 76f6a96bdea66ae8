"""Describe: a hub id, a folder, a preset or a live module becomes a model on paper."""
