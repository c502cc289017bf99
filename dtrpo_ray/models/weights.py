"""Load and save a model's tensors as safetensors files, one tensor at a time, never with two copies of the model.

A checkpoint is `model.safetensors`, or the shards that `model.safetensors.index.json` names. Names and shapes are
compared before a single weight is read.
"""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.base import DiffusionLM, TensorPiece

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9  # as Hugging Face shards
COMPARED_ROWS = 4096
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of safetensors that are read
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")  # of DistributedDataParallel, torch.compile and FSDP

Slices = dict[str, Any]  # tensors of open files by name: shapes are known, and a slice reads its rows


class Sharding(Protocol):
    """The split of parameters over ranks while a model is built and filled (ZeRO-3; see `backend`).

    `build` returns a context in which new modules hold only this rank's part of each parameter, and `whole` one in
    which parameters are whole; every rank then keeps its part of what rank 0 wrote.
    """

    rank: int

    def build(self) -> AbstractContextManager[Any]: ...

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]: ...


def load_weights(
    model: DiffusionLM, path: Path, dtype: torch.dtype, device: torch.device | str, sharding: Sharding | None
) -> None:
    """Fill a model built on the meta device (or by `sharding`) from a directory.

    Raises ModelError, before a weight is read, naming files that are missing or pickled and tensors that are missing,
    surplus, quantised or of another shape; and while reading, a tensor with numbers that are not finite.
    """
    with ExitStack() as stack:
        where, slices = _open_shards(path, stack)
        _require_floats(where, slices, "quantization_config" in model.config)
        own = model.state_dict(keep_vars=True)
        shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in own.items()}
        _compare(published_shapes(model, shapes), where, slices, model.tied_tensors())
        if sharding is None:
            own = model.to(dtype).to_empty(device=device).state_dict(keep_vars=True)
        for name, pieces in groupby(model.pieces(), attrgetter("ours")):
            gathers = sharding if hasattr(own[name], "ds_shape") else None
            with gathers.whole([own[name]]) if gathers else nullcontext():
                if gathers is None or gathers.rank == 0:
                    for piece in pieces:
                        part = slices[piece.upstream][piece.start : piece.stop]
                        if not torch.stack(part.aminmax()).isfinite().all():
                            raise ModelError(f"{where}: {piece.upstream} holds NaN or infinity; take another one")
                        own[name].data[piece.at].copy_(part)


def _open_shards(path: Path, stack: ExitStack) -> tuple[Path, Slices]:
    """Open a directory's safetensors: the file that names them all, and their tensors."""
    slices: Slices = {}
    where = path / (SINGLE if (path / SINGLE).is_file() else INDEX)
    for file in [where] if where.name == SINGLE else _listed_shards(where):
        try:
            opened = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: not a readable safetensors file ({error})") from None
        if twice := slices.keys() & opened.keys():
            raise ModelError(f"{file}: holds {min(twice)}, and so does another shard of {where}")
        slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    return where, slices


def _listed_shards(index: Path) -> list[Path]:
    folder = index.parent
    if not index.is_file():
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        hint = "copy the safetensors weights there"
        if pickled:
            hint = f"found {', '.join(pickled[:3])}: convert it to safetensors first; pickled weights can run code"
        raise ModelError(f"{folder}: no {SINGLE} and no {INDEX}; {hint}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not a safetensors index ({error!r})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: names {name!r}, which is not a safetensors file of this folder")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(f"{index}: {len(absent)} shard(s) not there, first {absent[0]}; download it again")
    return [folder / name for name in names]


def _require_floats(where: Path, slices: Slices, declared: bool) -> None:
    """Raise ModelError for tensors that are not plain floating-point numbers, or that a wrapper has renamed."""
    odd = {name: kind for name, part in slices.items() if (kind := part.get_dtype()) not in FLOATS}
    if odd:
        name, kind = min(odd.items())
        why = ", as quantization_config of config.json says" if declared else ""
        remedy = "quantised weights are not supported; take the release in bfloat16, or dequantise it first"
        raise ModelError(f"{where}: {name} is {kind}{why}: {remedy}")
    if wrapped := [name for name in slices if name.startswith(WRAPPERS)]:
        name = wrapped[0]
        raise ModelError(f"{where}: {name} was saved from inside a wrapper; save the model that it wraps")


def published_shapes(model: DiffusionLM, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Compute the shape of every tensor a checkpoint must have from the shapes of ours."""
    published = {}
    for name, pieces in model.checkpoint_tensors().items():
        parts = [torch.empty(shapes[piece.ours], device="meta")[piece.at].shape for piece in pieces]
        published[name] = (sum(rows for rows, *_ in parts), *parts[0][1:])
    return published


def _compare(published: dict[str, tuple[int, ...]], where: Path, slices: Slices, tied: tuple[str, str] | None) -> None:
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    if tied and tied[0] in shapes:
        shape, (head, embedding) = shapes.pop(tied[0]), tied
        parts = (slice(first, first + COMPARED_ROWS) for first in range(0, shape[0], COMPARED_ROWS))
        if shape != shapes.get(embedding) or any(not slices[head][p].equal(slices[embedding][p]) for p in parts):
            raise ModelError(f"{where}: {head} differs from {embedding}, but config.json says they are tied")
    for problem, names in (("missing", published.keys() - shapes), ("surplus", shapes.keys() - published)):
        if names:
            raise ModelError(f"{where}: {len(names)} {problem} tensor(s), first {min(names)}; check config.json")
    if wrong := sorted(name for name in shapes if shapes[name] != published[name]):
        name = wrong[0]
        raise ModelError(
            f"{where}: {len(wrong)} misshapen tensor(s), first {name}: {list(shapes[name])}, and "
            f"config.json expects {list(published[name])}; check config.json"
        )


def save_weights(model: DiffusionLM, path: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the weights under their upstream names: one file, or shards of at most `max_shard_bytes` with an index.

    A tensor larger than that gets a shard for itself.
    """
    state, where = model.state_dict(), dict[str, str]()
    shards, sizes = list[dict[str, list[TensorPiece]]](), list[int]()
    for name, pieces in model.checkpoint_tensors().items():
        size = sum(state[piece.ours][piece.at].nbytes for piece in pieces)
        if not shards or sizes[-1] + size > max_shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = pieces
        sizes[-1] += size
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _gather(state, pieces) for name, pieces in shard.items()}
        save_file(tensors, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(where.items()))}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _gather(state: dict[str, Tensor], pieces: list[TensorPiece]) -> Tensor:
    parts = [state[piece.ours].detach()[piece.at].cpu() for piece in sorted(pieces, key=lambda p: p.start)]
    if len(parts) > 1:
        return torch.cat(parts)
    # safetensors refuses slices of a stacked tensor, which share memory: copy
    return parts[0].clone() if pieces[0].at else parts[0].contiguous()
