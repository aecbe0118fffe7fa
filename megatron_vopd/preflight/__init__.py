"""What can be known before anything starts: checks, rank map, memory."""
