"""A model of which every process keeps a share: weights, gradients, moments (FSDP2)."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from baton.errors import ConfigError
from baton.train.config import TrainConfig
from baton.train.layers import layers_of
from baton.train.precision import Precision
from baton.train.ranks import Ranks

log = logging.getLogger(__name__)


class Sharded(torch.nn.Module):  # type: ignore[misc]
    """What spreads a model: a layer is whole while it computes, all else while `forward` lasts.

    The loss reads the head's weight beside the model, so it is computed in here.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Whatever `work` computes with the model."""
        return work()


def ranks_to_shard_over(config: TrainConfig, ranks: Ranks) -> Ranks | None:
    """The ranks, if the configuration says so and there are several.

    Raises:
        ConfigError: this GPU computes in fp16, whose loss scaling needs whole gradients.
    """
    if config.sharding == "none":
        return None
    if Precision.choose(config.precision, ranks.device).skips_steps:
        raise ConfigError(
            "train.sharding: full cannot be combined with fp16, which this GPU computes in; use one"
            " with bf16 (A100 and later), or train.precision: fp32"
        )
    if ranks.size == 1:
        log.warning("train.sharding: full has nothing to shard: this leg has one process")
        return None
    return ranks


def loading_device(ranks: Ranks) -> torch.device:
    """Where a model is loaded before it is sharded: in the first process's main memory, once."""
    return torch.device("cpu" if ranks.rank == 0 else "meta")


def shard(model: torch.nn.Module, ranks: Ranks, compute_dtype: torch.dtype) -> Sharded:
    """Spread a model that the first rank has loaded, layer by layer.

    Weights keep their dtype; they are gathered in `compute_dtype`, gradients summed in float32.
    A device never holds more in whole than one layer, or what belongs to no layer.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype,
        reduce_dtype=torch.float32,
    )
    root = Sharded(model)
    # Inner ones first, where layers hold layers.
    for unit in [*reversed(layers_of(model)), root]:
        _hand_out(unit, ranks.device)
        spread = fully_shard(unit, mesh=mesh, mp_policy=policy)
        # Parts of the loss are shares of one sum already: gradients are added, not averaged.
        spread.set_force_sum_reduction_for_comms(True)
        spread.set_gradient_divide_factor(1.0)
    return root


def _hand_out(unit: torch.nn.Module, device: torch.device) -> None:
    """Give every rank's `unit` the first rank's weights and buffers, on `device`."""
    moved: dict[int, torch.nn.Parameter] = {}

    def sent(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "meta":
            tensor = torch.empty_like(tensor, device=device)
        tensor = tensor.detach().to(device).contiguous()
        dist.broadcast(tensor, src=0)
        return tensor

    for module in unit.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                continue
            if id(parameter) not in moved:
                learns = parameter.requires_grad
                moved[id(parameter)] = torch.nn.Parameter(sent(parameter), requires_grad=learns)
            setattr(module, name, moved[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = sent(buffer)
