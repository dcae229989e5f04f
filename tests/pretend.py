"""A device that is not the CPU, on machines that have no other.

Tensors on DEVICE hold their values in the CPU's memory, but say they are on the lazy device (the only other one that
autograd serves without a driver), and any operation that mixes them with tensors of the CPU fails as it would on a GPU.
What runs here will not stop on a GPU for a tensor left behind on the wrong side.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy")
aten = torch.ops.aten
# What may read from one side and write to the other. A GPU's tensor also takes indices of the CPU, and a single number
# of it where an operation works on each element.
ACROSS = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Elsewhere(Tensor):
    """A tensor on DEVICE; inner: its values, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        outer = Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(),
                                              dtype=inner.dtype, layout=inner.layout, device=DEVICE)
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"Elsewhere({self.inner!r})"


class Pretending(TorchDispatchMode):
    """Within it, what is made on or moved to DEVICE is a tensor there."""

    def __enter__(self) -> "Pretending":
        # torch.tensor(values, device=...) then asks us to move what it has made on the CPU.
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self.before)
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    # Without autograd operations arrive whole that are made of others.
    if torch.is_inference_mode_enabled():
        with Pretending():
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    elsewhere = any(isinstance(x, Elsewhere) for x in tensors)
    wanted = kwargs.get("device")
    if func not in ACROSS and elsewhere:
        judged = [args[0], *args[2:]] if func in INDEXED else tensors
        numbers = torch.Tag.pointwise in func.tags or func in INDEXED
        here = [x for x in judged if isinstance(x, Tensor) and not isinstance(x, Elsewhere)
                and not (numbers and x.dim() == 0)]
        if here:
            raise RuntimeError(f"{func}: expected all tensors to be on one device, but {len(here)} are on the CPU")
    there = torch.device(wanted).type == DEVICE.type if wanted is not None else elsewhere
    if func is aten.copy_.default:
        there = isinstance(args[0], Elsewhere)
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    if not there:
        return found
    with torch.inference_mode(False):
        wrapped = tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, found)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if elsewhere else wrapped


def _inside(x: Any) -> Any:
    return x.inner if isinstance(x, Elsewhere) else x
