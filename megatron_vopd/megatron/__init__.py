"""Megatron-core behind one door: groups, models, weights in and out, packed rows."""
