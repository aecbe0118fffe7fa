"""The kernels of the distillation statistics: reference, compiled, and the choice between them."""
