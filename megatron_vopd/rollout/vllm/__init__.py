"""vLLM engines: a child process on this machine, or servers."""
