"""Techniques: one change each. Every file here is a technique, without exception."""
