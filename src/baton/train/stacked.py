"""LoRA on linear layers that read the same input, as one product with few passes over memory.

PEFT computes `base(x) + B(A(x)) * scale` layer by layer: three products and a sum for each of
q, k and v. Here the layers that read one input (q, k, v; gate, up) are one base product, and
their adapters one thin product whose result the base product is added to, so that no sum makes
a pass of its own. The parameters stay where PEFT has them: saving, loading and merging do not
know of this. Adapter dropout takes the same values of the input for all layers that read it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers.activations import SiLUActivation

from baton.train import quantize
from baton.train.bordered import with_border
from baton.train.dropout import drop, drop_product, new_seed
from baton.train.gated import MOST_RANK, gate, gated_mlp

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

    With several adapters, the one at work when a layer is called. Layers with biases of LoRA or
    another variant of it keep PEFT's way.
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
    both: Any = stacks[0]
    down: Any = stacks[2]
    if not isinstance(getattr(mlp, "act_fn", None), _SILU) or not _can_be_whole(both, down):
        return
    probe = torch.randn(4, down.rows[0], device=down.weight[0].device).to(down.dtype)
    was_training = mlp.training
    mlp.eval()
    with torch.no_grad():
        theirs = mlp(probe).float()
        ours = _whole(both, down, probe).float()
    mlp.train(was_training)
    if torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max())):
        both.make_border()
        down.make_border()
        kind: Any = type(mlp)
        mlp.__class__ = _class_with(kind, "Gated", _gated_forward)


def _can_be_whole(both: _Stack, down: _Stack) -> bool:
    """Can these halves and what follows, if they are a gated MLP, be computed as one?"""
    members = [*both.members, *down.members]
    names = list(both.members[0].lora_A)
    return (
        both.bias is None
        and down.bias is None
        and both.adapter_name is not None
        and both.rows[0] == both.rows[1]
        and all([*m.lora_A] == names for m in members)
        and all(both.members[0].r[name] == both.members[1].r[name] for name in names)
        and all(m.r[name] <= MOST_RANK for m in members for name in names)
        and all(len({_dropout(m, name) for m in members}) == 1 for name in names)
    )


def _gated_forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """`down(silu(gate(x)) * up(x))` from the stacks of the halves and of `down`."""
    both, down = mlp.gate_proj.stack, mlp.down_proj.stack
    if both.holds:
        # Weights do not change now: fewer kernels a token than with a border to fill.
        halves = both.at_once(x.reshape(-1, x.shape[-1]).to(both.dtype))
        product = halves.new_empty(len(halves), down.members[0].in_features)
        gate(halves, product)
        return down.at_once(product).view(*x.shape[:-1], -1)
    if both.adapter_name is not None:
        return _whole(both, down, x)
    one, other = both.compute(x)
    [out] = down.compute(torch.nn.functional.silu(one) * other)
    return out


def _whole(both: _Stack, down: _Stack, x: torch.Tensor) -> torch.Tensor:
    p = both.dropout
    seeds = new_seed(2, x.device) if p else None
    flat = x.reshape(-1, x.shape[-1]).to(both.dtype)
    out, *_ = gated_mlp(flat, both.weight, *both.adapter(), down.weight, *down.adapter(), seeds, p)
    return out.view(*x.shape[:-1], out.shape[-1])


def _are_alike(members: Sequence[Any]) -> bool:
    """Can these layers, if they all are LoRA layers, be computed as one?"""
    return all(_is_plain(member) for member in members) and all(
        len(set(values)) == 1
        for values in (
            [m.in_features for m in members],
            [type(m.base_layer) for m in members],
            [m.base_layer.weight.dtype for m in members],
            [m.base_layer.bias is None for m in members],
            [tuple(m.lora_A) for m in members],
            [tuple(_dropout(m, name) for name in m.lora_A) for m in members],
        )
    )


def _is_plain(layer: Any) -> bool:
    """Ordinary LoRA adapters over a linear layer, 4-bit or not."""
    if not getattr(layer, "lora_A", None) or layer.merged:
        return False
    base = layer.base_layer
    is_linear = type(base) is torch.nn.Linear
    is_linear |= quantize.is_nf4(base) and quantize.rows_are_blocks(base)
    is_vanilla = not layer.lora_variant and not layer.fan_in_fan_out
    has_bias = any(b.bias is not None for b in layer.lora_B.values())
    return is_linear and is_vanilla and not has_bias


def _dropout(layer: Any, name: str) -> float:
    return float(getattr(layer.lora_dropout[name], "p", 0.0))


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
            self.weight = [torch.cat([base.weight.detach() for base in bases])]
            self._share()
            self.dtype = self.weight[0].dtype
        self.input: torch.Tensor | None = None
        self.outputs: list[torch.Tensor] = []
        self.held: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.holds = False
        for number, member in enumerate(members):
            kind: Any = type(member)
            member.__class__ = _class_with(kind, "Stacked", _member_forward)
            object.__setattr__(member, "stack", self)
            member.number = number

    def make_border(self) -> None:
        """Have the adapters' place beside a dense weight; see `bordered`."""
        if len(self.weight) > 1:
            return
        ranks = [sum(m.r[name] for m in self.members) for name in self.members[0].lora_A]
        self.weight = [with_border([m.base_layer.weight for m in self.members], max(ranks))]
        self._share()

    def _share(self) -> None:
        """Let the layers keep views of the one weight."""
        plain = self.weight[0][: sum(self.rows), : self.members[0].in_features]
        for member, rows in zip(self.members, plain.split(self.rows), strict=True):
            member.base_layer.weight = torch.nn.Parameter(rows, requires_grad=False)

    @property
    def adapter_name(self) -> str | None:
        """The adapter at work; None for the base by itself."""
        first = self.members[0]
        return None if first.disable_adapters else str(first.active_adapters[0])

    @property
    def dropout(self) -> float:
        """The share of its input that the adapter at work drops now."""
        first, name = self.members[0], self.adapter_name
        return _dropout(first, name) if first.training and name is not None else 0.0

    def output(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """What member `number` makes of `x`."""
        if number == 0 or self.input is not x:
            self.input, self.outputs = x, self.compute(x)
        out = self.outputs[number]
        if number == len(self.members) - 1:
            self.input, self.outputs = None, []
        return out

    def adapter(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The adapter at work: the members' A below each other; their B, scaled, on a diagonal."""
        name = str(self.adapter_name)
        if self.holds:
            return self.held[name]
        return self._put_together(name)

    def _put_together(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.cat([m.lora_A[name].weight for m in self.members])
        parts = [m.lora_B[name].weight * m.scaling[name] for m in self.members]
        b = parts[0] if len(parts) == 1 else torch.block_diag(*parts)
        return a.to(self.dtype), b.to(self.dtype)

    def hold(self) -> None:
        """Compute the adapters once, into the same memory each time, and keep to it."""
        for name in self.members[0].lora_A:
            fresh = self._put_together(name)
            if name not in self.held:
                self.held[name] = fresh[0].clone(), fresh[1].clone()
            for kept, value in zip(self.held[name], fresh, strict=True):
                kept.copy_(value)
        self.holds = True

    def compute(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What each member makes of `x`."""
        flat = x.reshape(-1, x.shape[-1]).to(self.dtype)
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            outs = self._trained(flat)
        else:
            outs = [*self.at_once(flat).split(self.rows, dim=-1)]
        return [out.reshape(*x.shape[:-1], out.shape[-1]) for out in outs]

    def _trained(self, x: torch.Tensor) -> list[torch.Tensor]:
        if self.adapter_name is None:
            return [*self._base(x).split(self.rows, dim=-1)]
        p = self.dropout
        seed = new_seed(1, x.device) if p else None
        made: list[torch.Tensor] = _stacked(
            x, self.weight, self.bias, *self.adapter(), self.rows, seed, p
        )
        return made[:-1]

    def at_once(self, x: torch.Tensor) -> torch.Tensor:
        """All outputs side by side, where nothing is to be learnt: fewer kernels a token."""
        out = self._base(x)
        if self.adapter_name is not None:
            a, b = self.adapter()
            out.addmm_(x @ a.T, b.T)
        return out

    def _base(self, x: torch.Tensor) -> torch.Tensor:
        weight = quantize.dense(self.weight, sum(self.rows), x.shape[1], self.dtype)
        return torch.nn.functional.linear(x, weight, self.bias)


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
    rows: Sequence[int],
    seed: torch.Tensor | None,
    p: float,
) -> list[torch.Tensor]:
    """`x @ weight.T + bias + drop(x) @ a.T @ b.T` by layer, and `drop(x) @ a.T` for the backward.

    A tensor for each layer: as parts of one their gradients would be put together by the
    compiler, in a kernel that takes several times as long as moving them does.

    Args:
        x: `(tokens, in)`.
        weight: one dense `(out, in)` tensor, or the parts of an NF4 one.
        bias: `(out,)`.
        a: `(rank, in)`.
        b: `(out, rank)`, scale included; block-diagonal over stacked layers.
        rows: `out` of each layer.
        seed: `(1,)` of the adapter's dropout; None without.
        p: the share that is dropped.
    """
    thin = x @ a.T if seed is None else drop_product(x, a, seed, p)
    dense = quantize.dense(weight, b.shape[0], a.shape[1], x.dtype)
    outs = []
    for start, size in zip(itertools.accumulate(rows, initial=0), rows, strict=False):
        span = slice(start, start + size)
        part = b[span]
        out = thin @ part.T if bias is None else torch.addmm(bias[span], thin, part.T)
        # Added in the product's own epilogue: the thin result costs no pass of its own.
        outs.append(out.addmm_(x, dense[span].T))
    return [*outs, thin]


@_stacked.register_fake
def _(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    rows: Sequence[int],
    seed: torch.Tensor | None,
    p: float,
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], width) for width in (*rows, a.shape[0])]


@torch.library.custom_op("baton::stacked_lora_backward", mutates_args=())
def _stacked_backward(
    grads: Sequence[torch.Tensor],
    x: torch.Tensor,
    thin: torch.Tensor,
    weight: Sequence[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `x`, `a` and `b` from those of each layer's output."""
    grad = grads[0].contiguous() if len(grads) == 1 else torch.cat(grads, 1)
    grad_thin = grad @ b
    grad_x, read = grad_thin @ a, x
    if seed is not None:
        grad_x, read = drop(grad_x, seed, p), drop(x, seed, p)
    grad_x.addmm_(grad, quantize.dense(weight, b.shape[0], a.shape[1], x.dtype))
    return grad_x, grad_thin.T @ read, grad.T @ thin


@_stacked_backward.register_fake
def _(
    grads: Sequence[torch.Tensor],
    x: torch.Tensor,
    thin: torch.Tensor,
    weight: Sequence[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x, weight, _, a, b, ctx.rows, seed, ctx.p = inputs
    ctx.save_for_backward(x, output[-1], a, b, seed, *weight)


def _backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    x, thin, a, b, seed, *weight = ctx.saved_tensors
    grad_x, grad_a, grad_b = _stacked_backward(grads[:-1], x, thin, weight, a, b, seed, ctx.p)
    return grad_x, [None] * len(weight), None, grad_a, grad_b, None, None, None


_stacked.register_autograd(_backward, setup_context=_save_for_backward)
