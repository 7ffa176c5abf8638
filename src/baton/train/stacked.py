"""LoRA on linear layers that read the same input, as one product with few passes over memory.

PEFT computes `base(x) + B(A(x)) * scale` layer by layer: three products and a sum for each of
q, k and v. Here the layers that read one input (q, k, v; gate, up) are one base product, and
their adapters one thin product whose result the base product is added to, so that no sum makes
a pass of its own. The parameters stay where PEFT has them: saving, loading and merging do not
know of this.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers.activations import SiLUActivation

from baton.train import quantize
from baton.train.gated import gated_lora

# Projections of one parent module that read the same input, in the order they are called.
_SILU = (torch.nn.SiLU, SiLUActivation)
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)


def stack_projections(model: PeftModel) -> int:
    """Compute the LoRA layers of `model` stacked, in place; returns how many.

    Layers with adapter dropout, biases of LoRA or another variant of it keep PEFT's way.
    """
    count = 0
    for parent in list(model.modules()):
        children = dict(parent.named_children())
        grouped = [tuple(children.get(name) for name in names) for names in _SIBLINGS]
        groups = [group for group in grouped if _are_alike(group)]
        taken = {id(member) for group in groups for member in group}
        singles = [(c,) for c in children.values() if id(c) not in taken and _are_alike((c,))]
        for members in (*groups, *singles):
            _Stack(members)
            count += len(members)
        _take_gate(parent)
    return count


@contextlib.contextmanager
def adapters_held(model: torch.nn.Module) -> Iterator[None]:
    """While weights do not change: stacked adapters are put together once, not at every pass.

    They lie where they lay the last time, so a CUDA graph that reads them stays valid.
    """
    modules = [getattr(module, "stack", None) for module in model.modules()]
    stacks = {id(stack): stack for stack in modules if isinstance(stack, _Stack)}
    with torch.no_grad():
        for stack in stacks.values():
            stack.hold()
    try:
        yield
    finally:
        for stack in stacks.values():
            stack.holds = False


def _take_gate(mlp: Any) -> None:
    """Compute a gated MLP whole, if `mlp` is one and its own forward says the same."""
    parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    stacks = [getattr(part, "stack", None) for part in parts]
    if None in stacks or stacks[0] is not stacks[1]:
        return
    down: Any = parts[2]
    if down.stack.bias is not None or not isinstance(getattr(mlp, "act_fn", None), _SILU):
        return
    probe = torch.randn(4, down.out_features, device=down.stack.weight[0].device)
    with torch.no_grad():
        theirs = mlp(probe.to(down.stack.dtype)).float()
        ours = _gated_forward(mlp, probe.to(down.stack.dtype)).float()
    if torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max())):
        kind: Any = type(mlp)
        mlp.__class__ = _class_with(kind, "Gated", _gated_forward)


def _gated_forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """`down(silu(gate(x)) * up(x))` from the stacks of the halves and of `down`."""
    both, down = mlp.gate_proj.stack, mlp.down_proj.stack
    hidden = both.compute(x)
    a, b = down.adapter()
    out, _ = gated_lora(hidden.view(-1, hidden.shape[-1]), down.weight, a, b)
    return out.view(*x.shape[:-1], out.shape[-1])


def _are_alike(members: Sequence[Any]) -> bool:
    return all(_is_plain(member) for member in members) and (
        len({(m.in_features, type(m.base_layer), m.base_layer.weight.dtype) for m in members}) == 1
        and len({m.base_layer.bias is None for m in members}) == 1
    )


def _is_plain(layer: Any) -> bool:
    """One ordinary LoRA adapter without dropout over a linear layer, 4-bit or not."""
    if not hasattr(layer, "lora_A") or list(layer.lora_A) != ["default"] or layer.merged:
        return False
    base = layer.base_layer
    is_linear = type(base) is torch.nn.Linear
    is_linear |= quantize.is_nf4(base) and quantize.rows_are_blocks(base)
    is_vanilla = not layer.lora_variant and not layer.fan_in_fan_out
    has_dropout = not isinstance(layer.lora_dropout["default"], torch.nn.Identity)
    has_bias = layer.lora_B["default"].bias is not None
    return is_linear and is_vanilla and not has_dropout and not has_bias


class _Stack:
    """Some LoRA layers that read one input; the first that is called computes for all."""

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = list(members)
        self.rows = [m.out_features for m in members]
        bases = [m.base_layer for m in members]
        self.bias = None if bases[0].bias is None else torch.cat([b.bias.detach() for b in bases])
        if quantize.is_nf4(bases[0]):
            self.weight = quantize.stack(bases)
            self.dtype = bases[0].compute_dtype
        else:
            dense = torch.cat([base.weight.detach() for base in bases])
            for base, rows in zip(bases, dense.split(self.rows), strict=True):
                base.weight = torch.nn.Parameter(rows, requires_grad=False)
            self.weight = [dense]
            self.dtype = dense.dtype
        self.input: torch.Tensor | None = None
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None
        self.holds = False
        for number, member in enumerate(members):
            kind: Any = type(member)
            member.__class__ = _class_with(kind, "Stacked", _member_forward)
            object.__setattr__(member, "stack", self)
            member.number = number

    def output(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """What member `number` makes of `x`."""
        if number == 0 or self.input is not x:
            self.input, self.outputs = x, self.compute(x).split(self.rows, dim=-1)
        out = self.outputs[number]
        if number == len(self.members) - 1:
            self.input, self.outputs = None, ()
        return out

    def adapter(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The members' A below each other, and their B, scaled, as one block diagonal."""
        if self.holds:
            assert self.held is not None
            return self.held
        a = torch.cat([m.lora_A["default"].weight for m in self.members])
        parts = [m.lora_B["default"].weight * m.scaling["default"] for m in self.members]
        b = parts[0] if len(parts) == 1 else torch.block_diag(*parts)
        return a.to(self.dtype), b.to(self.dtype)

    def hold(self) -> None:
        """Compute the adapter once, into the same memory each time, and keep to it."""
        self.holds = False
        fresh = self.adapter()
        if self.held is None:
            self.held = fresh[0].clone(), fresh[1].clone()
        for kept, value in zip(self.held, fresh, strict=True):
            kept.copy_(value)
        self.holds = True

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """What all members make of `x`, side by side in the last dimension."""
        a, b = self.adapter()
        flat = x.reshape(-1, x.shape[-1]).to(self.dtype)
        out, _ = _stacked(flat, self.weight, self.bias, a, b)
        return out.view(*x.shape[:-1], out.shape[-1])


def _member_forward(member: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = member.stack.output(member.number, x)
    return out


@functools.cache
def _class_with(kind: Any, prefix: str, forward: Callable[..., torch.Tensor]) -> Any:
    """A subclass of `kind` with this forward; one for all layers, so they share compiled code."""
    return type(f"{prefix}{kind.__name__}", (kind,), {"forward": forward})


@torch.library.custom_op("baton::stacked_lora", mutates_args=())
def _stacked(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x @ weight.T + bias + x @ a.T @ b.T`, and `x @ a.T` for the backward pass.

    Args:
        x: `(tokens, in)`.
        weight: one dense `(out, in)` tensor, or the parts of an NF4 one.
        bias: `(out,)`.
        a: `(rank, in)`.
        b: `(out, rank)`, scale included; block-diagonal over stacked layers.
    """
    thin = x @ a.T
    out = thin @ b.T if bias is None else torch.addmm(bias, thin, b.T)
    # Added in the product's own epilogue: the thin result costs no pass of its own.
    out.addmm_(x, quantize.dense(weight, b.shape[0], a.shape[1], x.dtype).T)
    return out, thin


@_stacked.register_fake
def _(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("baton::stacked_lora_backward", mutates_args=())
def _stacked_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    thin: torch.Tensor,
    weight: Sequence[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `x`, `a` and `b`."""
    grad_thin = grad @ b
    grad_x = grad_thin @ a
    grad_x.addmm_(grad, quantize.dense(weight, b.shape[0], a.shape[1], x.dtype))
    return grad_x, grad_thin.T @ x, grad.T @ thin


@_stacked_backward.register_fake
def _(
    grad: torch.Tensor,
    x: torch.Tensor,
    thin: torch.Tensor,
    weight: Sequence[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _, a, b = inputs
    ctx.save_for_backward(x, output[1], a, b, *weight)


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    x, thin, a, b, *weight = ctx.saved_tensors
    grad_x, grad_a, grad_b = _stacked_backward(grad.contiguous(), x, thin, weight, a, b)
    return grad_x, [None] * len(weight), None, grad_a, grad_b


_stacked.register_autograd(_backward, setup_context=_save_for_backward)
