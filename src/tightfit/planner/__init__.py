"""Planner: of all ways that stay inside the budget, the fastest."""
