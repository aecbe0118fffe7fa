"""Rows beyond element 2^31 of the logits: statistics and gradients there, against torch in fp64.

A 32-bit index anywhere in a kernel reads or writes the wrong row here, and nowhere else.
"""

from __future__ import annotations

import argparse
import sys

import torch

from megatron_vopd.ops import native, reference
from megatron_vopd.ops.fields import FINAL

NAMES = ("student_logprob", "teacher_logprob", "reverse_kl", "forward_kl", "entropy")
TOLERANCE, GRADIENT_TOLERANCE = 4e-6, 4e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--vocab", type=int, default=151_936)
    options = parser.parse_args()
    device, num_tokens, vocab_size = torch.device(options.device), options.tokens, options.vocab
    torch.manual_seed(0)
    x = torch.empty(num_tokens, vocab_size, device=device).normal_(std=3)
    y = torch.empty_like(x).normal_(std=3)
    labels = torch.randint(0, vocab_size, (num_tokens,), device=device)
    kernels = native.resolve(device.type, device, x.dtype)  # pyright: ignore[reportArgumentType]
    packed = kernels.local_stats(x, y, labels, vocab_size, 1.0, 0)[0]
    final = kernels.merge_stats(packed[None], 1e-4)
    weights = torch.tensor([-0.7, 0.2, 0.8, -0.1, 0.0], dtype=torch.float64, device=device)
    weights = weights.expand(num_tokens, -1).contiguous()
    # Half from either end, so that some lie beyond 2^31 elements when the tensor has as many.
    rows = [*range(8), *range(num_tokens - 8, num_tokens)]
    exact_x, exact_y = x[rows].double().cpu(), y[rows].double().cpu()
    of_rows = labels[rows].cpu()
    arguments = (of_rows, final[rows].cpu(), weights[rows].cpu(), vocab_size, 1.0)
    expected = reference.definition(exact_x, exact_y, of_rows)
    gradient = reference.logits_gradient(exact_x, exact_y, *arguments)
    kernels.logits_gradient_(x, y, labels, final, weights, vocab_size, 1.0)
    failed = 0
    for name in NAMES:
        found = final[rows, FINAL.index(name)].cpu().double()
        error = float(((found - expected[name]).abs() / expected[name].abs().clamp(min=1)).max())
        failed += not error <= TOLERANCE
        print(f"{name}: {error:.1e} (bar {TOLERANCE:.0e})")
    scale = gradient.abs().amax(1, keepdim=True).clamp(min=0.05)
    error = float(((x[rows].cpu().double() - gradient).abs() / scale).max())
    failed += not error <= GRADIENT_TOLERANCE
    print(f"gradient in place: {error:.1e} (bar {GRADIENT_TOLERANCE:.0e})")
    print(f"{num_tokens} x {vocab_size} = {x.numel() / 2**31:.2f} x 2^31 elements, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
