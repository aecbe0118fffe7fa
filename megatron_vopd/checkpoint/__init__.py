"""Sharded training state on disk, read without unpickling."""
