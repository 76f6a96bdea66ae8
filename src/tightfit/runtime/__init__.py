"""Runtime: carry out a plan: build the model block by block, run it, and report."""
