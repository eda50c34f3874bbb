"""A pretend accelerator: tensors whose data stay on the CPU, that report the device
"pretend:0", and that refuse to meet tensors of the CPU, as those of a GPU would.

It rests on private names of PyTorch, so what uses it skips where they are gone. It
cannot see kernels, races, memory, or branches on the name "cuda".
"""

import contextlib

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
COPIES |= {aten.copy.default}
# operators in which a GPU takes index tensors of the CPU
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
INDEXED |= {aten._index_put_impl_.default, aten._unsafe_index.Tensor}
# operators that do not even take a CPU tensor without axes
STRICT = {"mm", "bmm", "addmm", "baddbmm", "cat", "stack", "embedding", "index_select"}
STRICT |= {"gather", "index_add", "index_add_", "scatter", "native_layer_norm"}
STRICT |= {"convolution", "linear", "mv", "dot"}
STRICT |= {"_scaled_dot_product_flash_attention_for_cpu"}
FACTORIES = ("new_", "empty", "zeros", "ones", "full", "rand", "arange")
rules = {"float64": True}  # Apple's GPUs have none


class DeviceMix(RuntimeError):
    """What PyTorch raises when tensors of two devices meet."""


class _Module:
    """What `torch.pretend` must offer."""

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def manual_seed_all(self, seed):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device=None):
        pass


def set_up():
    """Register the device; an ImportError where PyTorch cannot."""
    from torch.utils.backend_registration import (
        _setup_privateuseone_for_python_backend,
    )

    if not hasattr(torch, "pretend"):
        _setup_privateuseone_for_python_backend("pretend", _Module())


class Pretend(torch.Tensor):
    """A tensor that says it is elsewhere; `elem` holds its data."""

    @staticmethod
    def __new__(cls, elem, device=None, requires_grad=False):
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=device,
            requires_grad=elem.requires_grad,
        )
        found.elem = elem.detach() if elem.requires_grad else elem
        found.where = torch.device(device)
        return found

    def __repr__(self, **_):
        return f"Pretend({self.elem!r}, device={self.where})"

    def tolist(self):
        return self.elem.tolist()

    def untyped_storage(self):
        return self.elem.untyped_storage()

    def data_ptr(self):
        return self.elem.data_ptr()

    def numpy(self, *_arguments, **_options):
        raise TypeError(f"can't convert {self.where} device type tensor to numpy")

    def __array__(self, *arguments, **options):
        return self.numpy()

    def __deepcopy__(self, memo):
        new = Pretend(self.elem.clone(), self.where)
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(new, self.requires_grad)
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _normal(device):
    device = torch.device(device)
    if device.type == "pretend":
        return torch.device("pretend", device.index or 0)
    return device


def _name(func):
    return func._schema.name.split("::")[1]


def _devices(func, args, kwargs):
    """The devices that meet in an operator."""
    leaves = tree_leaves((args, kwargs))
    if func in INDEXED:  # values, and indices only where they are elsewhere
        leaves = tree_leaves((args[0], args[2:3]))
        indices = args[1] if len(args) > 1 else []
        leaves += [i for i in indices if isinstance(i, Pretend)]
    seen = set()
    for x in leaves:
        if isinstance(x, Pretend):
            seen.add(x.where)
        elif isinstance(x, torch.Tensor) and (x.ndim or _name(func) in STRICT):
            seen.add(x.device)
    return seen


def _bare(x):
    return x.elem if isinstance(x, Pretend) else x


def _run(func, args, kwargs):
    name = _name(func)
    if func in COPIES:
        return _copy(func, args, kwargs)
    if name == "_local_scalar_dense":
        return func(args[0].elem)
    if name == "_fused_sdp_choice":
        return 0
    seen, target = _devices(func, args, kwargs), None
    if kwargs.get("device") is not None:  # a factory: the device that was asked for
        target = _normal(kwargs["device"])
        kwargs = {**kwargs, "device": CPU, "pin_memory": None}
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        seen = set() if name.startswith(FACTORIES) else seen
    if len(seen) > 1:
        raise DeviceMix(
            "Expected all tensors to be on the same device, but found at least two"
            f" devices, {' and '.join(map(str, seen))}! (when checking aten.{name})"
        )
    if target is None:
        target = next(iter(seen), None)
    if target is None:
        leaves = tree_leaves((args, kwargs))
        target = next((x.where for x in leaves if isinstance(x, Pretend)), CPU)
    generator = kwargs.get("generator")
    if generator is not None and (target.type, generator.device) == ("pretend", CPU):
        raise DeviceMix(f"Expected a 'pretend' generator but found 'cpu' (aten.{name})")
    out = func(*tree_map(_bare, args), **tree_map(_bare, kwargs))
    if target.type == "cpu":
        return out

    def wrapped(x):
        plain = isinstance(x, torch.Tensor) and not isinstance(x, Pretend)
        return _elsewhere(x, target) if plain else x

    return return_and_correct_aliasing(func, args, kwargs, tree_map(wrapped, out))


def _elsewhere(x, where):
    if x.dtype == torch.float64 and not rules["float64"]:
        raise TypeError("this device does not support float64")
    return Pretend(x, where)


def _copy(func, args, kwargs):
    if _name(func) == "copy_":
        _bare(args[0]).copy_(_bare(args[1]))
        return args[0]
    if _name(func) == "_copy_from":
        _bare(args[1]).copy_(_bare(args[0]))
        return args[1]
    x, where = args[0], kwargs.get("device")
    here = x.where if isinstance(x, Pretend) else CPU
    where = here if where is None else _normal(where)
    left = ("device", "non_blocking", "pin_memory")
    kwargs = {k: v for k, v in kwargs.items() if k not in left}
    whole = _name(func) == "_to_copy"
    out = func(_bare(x), **kwargs) if whole else _bare(x).clone()
    return _elsewhere(out, where) if where.type == "pretend" else out.to(where)


class _Factories(TorchDispatchMode):
    """Tensors made with device="pretend" are made here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        ours = device is not None and torch.device(device).type == "pretend"
        if ours or any(isinstance(x, Pretend) for x in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def accelerator(float64=True):
    """Tensors may be made on, and moved to, the device "pretend" inside the block."""
    before, old = dict(rules), torch._C._only_lift_cpu_tensors()
    # `torch.tensor(..., device="pretend")` is made on the CPU and then moved
    torch._C._set_only_lift_cpu_tensors(True)
    rules["float64"] = float64
    try:
        with _Factories():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(old)
        rules.update(before)


def to_pretend(module):
    """Move a module, keeping tied weights tied."""
    memo = {}
    for m in module.modules():
        for store in (m._parameters, m._buffers):
            for key, p in store.items():
                if p is None:
                    continue
                if id(p) not in memo:
                    new = Pretend(p.detach(), "pretend:0")
                    if isinstance(p, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, p.requires_grad)
                    memo[id(p)] = new
                store[key] = memo[id(p)]
    return module
