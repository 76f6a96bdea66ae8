"""Rehearse: run the very program on fake tensors under a meter, and read off bytes and operations."""
