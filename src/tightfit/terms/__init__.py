"""The words: frozen values that the rooms pass to each other. Nothing here knows torch."""
