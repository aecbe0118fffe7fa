"""The kernels of the distillation statistics: slow twins, compiled ones, and the door to both."""
