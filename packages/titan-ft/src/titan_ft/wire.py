"""Serialization of states: one JSON header, then the raw bytes of the tensors. Nothing in the data is executed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from titan_ft.snapshot import JSON_TYPES, PLACEMENTS, Layout, Sharding, Snapshot

MAGIC = b"TITANFT1"
MAX_HEADER_BYTES = 1 << 28
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def pack(state: Any) -> tuple[bytes, list[Tensor]]:
    """Return header and tensors of a nested state of dictionaries, lists, JSON values, tensors and snapshots."""
    tensors: list[Tensor] = []
    tree = _encode(state, tensors)
    specs = [[str(tensor.dtype), list(tensor.shape)] for tensor in tensors]
    header = json.dumps({"tree": tree, "tensors": specs}).encode()
    return MAGIC + struct.pack("<Q", len(header)) + header, tensors


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def num_bytes(tensors: list[Tensor]) -> int:
    """Return the total size of the tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def unpack(
    read: Callable[[int], bytes], read_into: Callable[[memoryview], int], check: Callable[..., None] = lambda *_: None
) -> Any:
    """Read a state. `read(n)` returns n bytes, or fewer at the end; `read_into` fills a buffer, as in `io.RawIOBase`.

    `check(part, *buffers)` is called after each part is read and before it is used: part 0 is the header, part n the
    n-th tensor. Raises ValueError if the bytes are not a state or end too early.
    """
    head = read(len(MAGIC) + 8)
    if len(head) != len(MAGIC) + 8 or not head.startswith(MAGIC):
        raise ValueError("The healing stream must begin with a titan-ft header, got other data.")
    (length,) = struct.unpack("<Q", head[len(MAGIC) :])
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"The header of a healing stream must be at most {MAX_HEADER_BYTES} bytes, got {length}.")
    content = read(length)
    if len(content) != length:
        raise ValueError(f"The healing stream ended early: got {len(content)} of {length} header bytes.")
    check(0, head, content)
    try:
        header = json.loads(content)
        tensors: list[Tensor] = []
        for dtype, shape in header["tensors"]:
            tensors.append(_read_tensor(dtype, shape, read_into))
            check(len(tensors), raw_bytes(tensors[-1]))
        return _decode(header["tree"], tensors)
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(f"The header of a healing stream must describe a state, got {error!r}.") from error


def _read_tensor(name: str, shape: list[int], read_into: Callable[[memoryview], int]) -> Tensor:
    dtype = _DTYPES[name]
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"The shape of a tensor must consist of integers >= 0, got {shape}.")
    tensor = torch.empty(shape, dtype=dtype)
    view, done = raw_bytes(tensor), 0
    while done < len(view):
        count = read_into(view[done:])
        if not count:
            raise ValueError(f"The healing stream ended early: got {done} of {len(view)} bytes of a tensor.")
        done += count
    return tensor


def _encode(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Snapshot):
        layouts = [[list(path), _encode_layout(layout)] for path, layout in value.layouts.items()]
        return {"snapshot": _encode(value.values, tensors), "layouts": layouts}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(each, tensors)] for key, each in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(each, tensors) for each in value]}
    if type(value) in JSON_TYPES:
        return value
    raise TypeError(f"The registered state must contain only tensors and JSON values, got {type(value).__name__}.")


def _decode(tree: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    kind = next(iter(tree))
    content = tree[kind]
    if kind == "tensor":
        return tensors[content]
    if kind == "snapshot":
        return Snapshot(
            _decode(content, tensors), {tuple(p): _decode_layout(encoded) for p, encoded in tree["layouts"]}
        )
    if kind == "dict":
        return {key: _decode(each, tensors) for key, each in content}
    items: Iterator[Any] = (_decode(each, tensors) for each in content)
    return {"list": list, "tuple": tuple}[kind](items)


def _encode_layout(layout: Layout) -> Any:
    sharding = layout.sharding
    if sharding is None:
        return [layout.device_type, None]
    placements = [_encode_placement(each) for each in sharding.placements]
    return [layout.device_type, [list(sharding.mesh), placements, list(sharding.shape), list(sharding.stride)]]


def _decode_layout(encoded: Any) -> Layout:
    device_type, sharding = encoded
    if sharding is None:
        return Layout(device_type, None)
    (names, sizes), placements, shape, stride = sharding
    mesh = (None if names is None else tuple(names), tuple(sizes))
    return Layout(
        device_type, Sharding(mesh, tuple(map(_decode_placement, placements)), torch.Size(shape), tuple(stride))
    )


def _encode_placement(placement: Placement) -> list[Any]:
    kind = type(placement).__name__  # exact class: a subclass may have other semantics
    if kind not in PLACEMENTS:
        raise TypeError(f"A placement must be one of {', '.join(PLACEMENTS)}, got {placement}.")
    names = {"Shard": ("dim",), "_StridedShard": ("dim", "split_factor"), "Partial": ("reduce_op",)}.get(kind, ())
    return [kind, *(getattr(placement, name) for name in names)]


def _decode_placement(encoded: list[Any]) -> Placement:
    kind, *rest = encoded
    if kind == "_StridedShard":  # FSDP over tensor parallelism
        from torch.distributed.tensor.placement_types import _StridedShard

        return _StridedShard(rest[0], split_factor=rest[1])
    kinds: dict[str, Callable[..., Placement]] = {"Shard": Shard, "Partial": Partial, "Replicate": Replicate}
    return kinds[kind](*rest)
