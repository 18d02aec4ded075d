"""Several processes that train one model: how they are launched, and what they tell one another."""

import os
from collections.abc import Iterable

import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed, nn
from torch.distributed import is_torchelastic_launched

from robustav.harness import pick_device


def launched(device: str, devices: int) -> Fabric:
    """Fabric on this process's device, as many processes as torchrun or `devices` says."""
    chosen = pick_device(device)
    if devices < 1:
        raise ValueError(f"`devices` must be at least 1, got {devices}")
    elastic = is_torchelastic_launched()
    here, everywhere = (int(os.environ[n]) if elastic else devices for n in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    fabric = Fabric(
        accelerator=chosen.type,
        devices=[chosen.index] if everywhere == 1 and chosen.index is not None else here,
        num_nodes=max(1, everywhere // here),
        strategy="auto" if everywhere == 1 else "ddp",
    )
    fabric.launch()
    return fabric


def average_gradients(fabric: Fabric, parameters: Iterable[nn.Parameter]) -> None:
    """By hand and not by a wrapper round the model, so that methods may call its stages, as often as they like."""
    if fabric.world_size == 1:
        return
    moving = [(p, p.grad) for p in parameters if p.grad is not None]  # the same ones in every process
    flat = torch.cat([gradient.flatten() for _, gradient in moving])
    fabric.all_reduce(flat, reduce_op="mean")
    for (parameter, _), gradient in zip(moving, flat.split([p.numel() for p, _ in moving]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def average_buffers(fabric: Fabric, *models: nn.Module) -> None:
    """Statistics of batch norms are each process's own until here."""
    if fabric.world_size == 1:
        return
    for buffer in [buffer for model in models for buffer in model.buffers()]:
        if buffer.is_floating_point():
            fabric.all_reduce(buffer, reduce_op="mean")


def summed(fabric: Fabric, *values: float) -> list[float]:
    """Over all processes."""
    total = torch.tensor(values, dtype=torch.float64, device=fabric.device)
    fabric.all_reduce(total, reduce_op="sum")
    return total.tolist()


def averaged(values: Tensor) -> Tensor:
    """Means: each process looks at clips of its own, and all must come to one verdict."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
        return values / distributed.get_world_size()
    return values
