"""Real TransformerEngine (its Python) on a machine without a GPU.

What is TransformerEngine's own, and runs: modules, their parameters and marks, autograd functions,
the choice of an attention backend, collectives, FusedAdam. What stands in: the compiled module
(`compiled`, with torch for the kernels in `kernels`), and CUDA as a device (`gpu`). `worlds` runs
functions in worlds of ranks that were forked from a process with it.
"""
