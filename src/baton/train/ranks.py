"""The processes that train together, one per device, and what they tell each other."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Enough gradient to fill a link, small enough to stay out of the way of memory.
_BUCKET_ELEMENTS = 64 * 1024 * 1024


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Flags and small values travel over a gloo group on the CPU, so that asking costs no device
    synchronisation; gradients travel over the group that belongs to the device.
    """

    rank: int
    size: int
    device: torch.device
    _control: Any = None

    @classmethod
    def join(cls) -> Ranks:
        """Join the peers that the environment names (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`).

        The first process listens where `BATON_RENDEZVOUS` says: a URL that
        `torch.distributed.init_process_group` takes; without it `MASTER_ADDR` is used.
        """
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        device = _device(int(os.environ.get("LOCAL_RANK", "0")))
        if size == 1:
            return cls(0, 1, device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # One process may prepare data for hours while the others wait; a peer that dies is
        # noticed at once, by its closed connection.
        timeout = datetime.timedelta(seconds=float(os.environ.get("BATON_PEER_TIMEOUT", "86400")))
        dist.init_process_group(
            backend,
            init_method=os.environ.get("BATON_RENDEZVOUS", "env://"),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        control = dist.new_group(backend="gloo", timeout=timeout)
        return cls(rank, size, device, control)

    @property
    def control(self) -> Any:
        """The group on the CPU; None where there is one process."""
        return self._control

    @classmethod
    def of(cls, peers: object) -> Ranks:
        """The ranks that a leg's peers are; a leg without any joins them now."""
        return peers if isinstance(peers, Ranks) else cls.join()

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag: has any rank raised it? An all-reduce (MAX) on the CPU group."""
        if self.size == 1:
            return flags
        values = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._control)
        return tuple(bool(value) for value in values.tolist())

    def broadcast(self, value: Any) -> Any:
        """The first rank's JSON value, on every rank."""
        if self.size == 1:
            return value
        data = json.dumps(value).encode() if self.rank == 0 else b""
        length = torch.tensor([len(data)])
        dist.broadcast(length, src=0, group=self._control)
        payload = torch.frombuffer(bytearray(data or bytes(int(length))), dtype=torch.uint8)
        dist.broadcast(payload, src=0, group=self._control)
        return json.loads(payload.numpy().tobytes())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._control)
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._control)
        return [float(value) for value in total]

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks, in place.

        One all-reduce per bucket after the last micro-batch, rather than DDP's hooks: a rank
        may have another number of micro-batches, adapters are small, and the order of the
        sums is the same in every run. A parameter without a gradient counts as zeros.
        """
        if self.size == 1:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets(parameters):
            gradients = [p.grad for p in bucket]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat)
            start = 0
            for g in gradients:
                g.copy_(flat[start : start + g.numel()].view_as(g))
                start += g.numel()


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    buckets: list[list[torch.nn.Parameter]] = []
    room = 0
    for p in parameters:
        if not buckets or p.numel() > room or p.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = _BUCKET_ELEMENTS
        buckets[-1].append(p)
        room -= p.numel()
    return buckets


def _device(local_rank: int) -> torch.device:
    if torch.cuda.is_available() and os.environ.get("BATON_DEVICE") != "cpu":
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")
