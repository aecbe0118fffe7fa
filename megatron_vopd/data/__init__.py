"""Records to prompts, given responses, stop ids, and the grading of answers."""
