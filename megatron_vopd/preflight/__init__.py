"""Checks of a configuration before anything starts: problems, rank map, memory estimate."""
