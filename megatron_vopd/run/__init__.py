"""One run: built, begun, resumed, saved, shown, ended."""
