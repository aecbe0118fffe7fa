"""On-policy distillation with a control-variate baseline, at Megatron scale."""

__version__ = "0.1.0"
