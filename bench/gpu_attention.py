"""Causal attention within packs on one GPU: our kernels beside FlashAttention-2 and cuDNN.

    python bench/gpu_attention.py

Random queries, keys and values of width 128 in bfloat16: a pack of 26,624 tokens in samples of
lognormal lengths (median 230, at most 1,024) with the heads of Qwen2.5-3B, one of 16,384 with those
of the 7B, and four samples of 4,096. Prints microseconds forward and backward, and how far outputs
and gradients are from FlashAttention-2's, relative to their norm. FlashAttention-2 is torch's
variable-length kernel; cuDNN needs nvidia-cudnn-frontend, and is left out without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

WIDTH, ROUNDS = 128, 20
SHAPES = {
    "3B, short samples": (26_624, 1024, 16, 2),
    "7B, short samples": (16_384, 1024, 28, 4),
    "7B, 4,096 tokens": (16_384, 4096, 28, 4),
}


def lengths(total: int, longest: int) -> list[int]:
    """Lengths of samples that make up a pack."""
    if longest > 1024:
        return [longest] * (total // longest)
    drawn = np.exp(np.random.default_rng(0).standard_normal(400) * 0.6 + math.log(230))
    found: list[int] = []
    for length in np.clip(drawn, 32, longest).astype(int).tolist():
        if sum(found) + length > total:
            break
        found.append(length)
    rest = total - sum(found)
    return [*found, *[rest] * (rest > 0)]


def main() -> None:
    import torch

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, (total, longest, heads, shared) in SHAPES.items():
        torch.manual_seed(0)
        q, k, v, grad = (
            torch.randn(total, count, WIDTH, device="cuda", dtype=torch.bfloat16)
            for count in (heads, shared, shared, heads)
        )
        samples = lengths(total, longest)
        sums = np.cumsum([0, *samples, *[0] * (-len(samples) % 16)])
        edges = torch.tensor(sums, dtype=torch.int32, device="cuda")
        print(f"{name}: {total} tokens, {len(samples)} samples, {heads} / {shared} heads")
        expected = None
        for kind, make in {"FlashAttention-2": flash, "ours": ours, "cuDNN": cudnn}.items():
            made = make(q, k, v, grad, edges, longest)
            if made is None:
                print(f"  {kind:17} not installed")
                continue
            forward, backward = made
            found = [forward(), *backward()]
            expected = expected or found
            off = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
            times = f"{timed(forward):6.0f} us forward, {timed(backward):6.0f} backward"
            print(f"  {kind:17} {times}; off by {max(off):.1e}", flush=True)


Passes = tuple[Callable[[], Any], Callable[[], Any]]


def flash(q: Any, k: Any, v: Any, grad: Any, edges: Any, longest: int) -> Passes:
    import torch

    shape, scale = (edges, edges, longest, longest, 0.0, False), WIDTH**-0.5
    causal = {"scale": scale, "window_size_left": -1, "window_size_right": 0}
    attend = torch.ops.aten._flash_attention_forward
    out, normal, state, *_ = attend(q, k, v, *shape, return_debug_mask=False, **causal)
    unused = torch.empty(0, device="cuda")
    return (
        lambda: attend(q, k, v, *shape, return_debug_mask=False, **causal)[0],
        lambda: torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, normal, *shape, state, unused, **causal
        ),
    )


def ours(q: Any, k: Any, v: Any, grad: Any, edges: Any, longest: int) -> Passes:
    import torch

    from baton.train.packed import attend

    scale = WIDTH**-0.5
    learnt = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*learnt, edges, scale)
    return (
        lambda: attend(q, k, v, edges, scale),
        lambda: torch.autograd.grad(out, learnt, grad, retain_graph=True),
    )


def cudnn(q: Any, k: Any, v: Any, grad: Any, edges: Any, longest: int) -> Passes | None:
    """Its backward pass includes laying out the softmax's sums as it wants them."""
    try:
        from cudnn.sdpa.fwd import torch_op
    except ImportError:
        return None
    import torch

    scale = WIDTH**-0.5
    packs = {
        "is_causal": True,
        "cu_seqlens_q": edges,
        "cu_seqlens_kv": edges,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
    }
    out, normal = torch.ops.cudnn.sdpa_fwd(q, k, v, scale, return_lse=True, **packs)

    def backward() -> Any:
        padded = torch_op.thd_lse_to_padded(normal.squeeze(-1), edges, longest)
        return torch.ops.cudnn.sdpa_bwd(grad, q, k, v, out, padded, scale, **packs)

    return (
        lambda: torch.ops.cudnn.sdpa_fwd(q, k, v, scale, return_lse=True, **packs)[0],
        backward,
    )


def timed(work: Callable[[], Any]) -> float:
    """Microseconds of a call, the mean of many."""
    import torch

    for _ in range(3):
        work()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(ROUNDS):
        work()
    last.record()
    torch.cuda.synchronize()
    return 1e3 * float(first.elapsed_time(last)) / ROUNDS


if __name__ == "__main__":
    main()
