"""Files, folders and logs that are on disk whole or not at all."""
