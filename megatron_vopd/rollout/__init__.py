"""Where on-policy samples come from: one small protocol, several engines."""
