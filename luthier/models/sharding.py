"""Models spread over processes (FSDP2): each process holds a slice of every tensor, and a block is gathered while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Result = TypeVar("Result")


class Root(nn.Module):
    """Stands above a sharded model, so that what belongs to no block (embedding, norm, head) is there while `run` lasts.

    A forward pass need not be the model's own: luthier calls the backbone and the head one after the other.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._inside = False

    def forward(self, do: Callable[[], Result]) -> Result:
        """Call `do`."""
        return do()

    def run(self, do: Callable[[], Result]) -> Result:
        """Call `do` with the model gathered as it runs. All processes must make the same forward passes."""
        if self._inside:
            return do()
        self._inside = True
        try:
            result: Result = self(do)
            return result
        finally:
            self._inside = False


def shard(model: nn.Module, blocks: Sequence[str], device: torch.device, processes: int) -> Root:
    """Spread a model over all processes, block by block; gradients are summed, not averaged.

    Args:
        model: the same whole model in every process.
        blocks: names of the modules that are gathered one at a time.
        device: where the slices shall live.
        processes: how many there are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    narrow = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters())
    # Sums over many processes lose the small numbers in a narrow type.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if narrow else None)
    for name in blocks:
        fully_shard(model.get_submodule(name), mesh=mesh, mp_policy=policy)
    root = Root(model)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the units of all processes already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return root


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a slice of a tensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The slice of a tensor that this process holds; all of it where it is not sharded."""
    if not is_sharded(tensor):
        return tensor
    sharded: DTensor = tensor  # type: ignore[assignment]
    return sharded.to_local()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its numbers. All processes must ask for it together where it is sharded."""
    if not is_sharded(tensor):
        return tensor
    sharded: DTensor = tensor  # type: ignore[assignment]
    return sharded.full_tensor()


def put(target: Tensor, values: Tensor) -> None:
    """Copy values into a tensor; of whole values, a sharded target takes its own slice."""
    if is_sharded(target) and not is_sharded(values):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = target
        # Every process has the same values: nothing need be sent.
        values = distribute_tensor(values.to(target.device), sharded.device_mesh, sharded.placements, src_data_rank=None)
    target.copy_(values)
