"""Nested state as plain tuples that `torch.load(weights_only=True)` reads, with the tensors taken out.

A node is a tuple whose first item says what it is; see `_decoders`. Tensors become a reference to a name, or stay in
the node, as the caller's `put` decides. Nothing but data passes: an object of a class of somebody's own is refused by
its path, because only a pickle could bring it back.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from trainctl.trainer.checkpoint.errors import CheckpointError

Node: TypeAlias = tuple[Any, ...]
Put: TypeAlias = Callable[[str, torch.Tensor], Node]
Get: TypeAlias = Callable[[str, str], Any]

_PLAIN = frozenset({type(None), bool, int, float, str})
_DICTS: dict[type, str] = {dict: "dict", OrderedDict: "odict", Counter: "counter"}
_SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple", torch.Size: "tuple", set: "set", frozenset: "fset"}


def encode(value: Any, path: str, put: Put, *, skip_code: bool = False) -> Node:
    """`value` as a node that shares nothing mutable with it, except tensors that `put` keeps.

    `skip_code` leaves functions out of dicts: a scheduler's state names its own, and they are code, not state.
    Raises CheckpointError, naming `path`, for what is not data.
    """
    kind = type(value)
    if kind in _PLAIN:
        return ("v", value)
    if isinstance(value, torch.Tensor):
        return put(path, value.detach() if value.requires_grad else value)
    if isinstance(value, dict):
        # Keys are told apart here: of a model of thousands of small tensors the calls would cost as much as the copy.
        items = [
            (
                ("v", key) if type(key) in _PLAIN else encode(key, path, _no_tensor),
                encode(item, f"{path}.{key}", put, skip_code=skip_code),
            )
            for key, item in value.items()
            if not (skip_code and callable(item))
        ]
        return (_DICTS.get(kind, "dict"), items)
    if kind in _SEQUENCES:
        if all(type(item) in _PLAIN for item in value):
            return ("flat", _SEQUENCES[kind], list(value))
        nodes = [encode(item, f"{path}.{index}", put, skip_code=skip_code) for index, item in enumerate(value)]
        return (_SEQUENCES[kind], nodes)
    return _encode_rare(value, path)


def _encode_rare(value: Any, path: str) -> Node:
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        shape = None if isinstance(value, np.generic) else list(value.shape)
        return ("numpy", value.dtype.str, shape, _text(value.tobytes()))
    if type(value) is bytes:
        return ("bytes", _text(value))
    if isinstance(value, torch.dtype):
        return ("dtype", str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return ("device", str(value))
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    raise CheckpointError(
        f"{path} holds a {name}, which is not data: numbers, text, tensors, arrays, dicts, lists and tuples can be "
        "saved. Track it with a get/set pair that gives such values."
    )


def _text(data: bytes) -> str:
    """Bytes as text, one character each: the safe unpickler does not know empty bytes."""
    return data.decode("latin-1")


def _no_tensor(path: str, _tensor: torch.Tensor) -> Node:
    raise CheckpointError(f"{path} has a tensor as the key of a dict, which cannot be saved")


def decode(node: Node, get: Get) -> Any:
    """The value of a node, newly made. `get(name, device type)` gives the tensors that were taken out."""
    kind = node[0]
    if kind == "v":
        return node[1]
    if kind == "ref":
        return get(node[1], node[2])
    if kind == "tensor":
        return node[1].clone()
    if kind == "flat":
        return _BUILD[node[1]](node[2])
    if kind in _BUILD:
        return _BUILD[kind](decode(item, get) for item in node[1])
    if kind in _BUILD_DICT:
        return _BUILD_DICT[kind]({decode(key, get): decode(item, get) for key, item in node[1]})
    return _decode_rare(node)


def _decode_rare(node: Node) -> Any:
    match node:
        case ("numpy", dtype, shape, data):
            array = np.frombuffer(data.encode("latin-1"), dtype=np.dtype(dtype))
            return array[0] if shape is None else array.reshape(shape).copy()
        case ("bytes", text):
            return text.encode("latin-1")
        case ("dtype", name):
            return getattr(torch, name)
        case ("device", name):
            return torch.device(name)
        case _:
            raise CheckpointError(f"the checkpoint holds a value of unknown kind {node[0]!r}: a newer version wrote it")


_BUILD: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "set": set, "fset": frozenset}
_BUILD_DICT: dict[str, Callable[[Any], Any]] = {"dict": dict, "odict": OrderedDict, "counter": Counter}


def keep_inline(_path: str, tensor: torch.Tensor) -> Node:
    """A `put` that keeps a copy of the tensor in the node itself, for small values."""
    return ("tensor", tensor.to("cpu", copy=True).contiguous())


class References:
    """A `put` that collects the live tensors by name and leaves references behind."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def __call__(self, path: str, tensor: torch.Tensor) -> Node:
        if tensor.layout is not torch.strided:
            raise CheckpointError(f"{path} is a {tensor.layout} tensor: only dense ones can be saved")
        name = path
        # {"a": {"b.c": …}, "a.b": {"c": …}} gives one path twice.
        while name in self.tensors:
            name += "~"
        self.tensors[name] = tensor
        return ("ref", name, tensor.device.type)
