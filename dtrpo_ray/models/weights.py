"""Load and save a model's tensors as safetensors files, one tensor at a time, never with two copies of the model.

A checkpoint is `model.safetensors`, or the shards that `model.safetensors.index.json` names. Names and shapes are
compared before a single weight is read.
"""

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
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


class Sharding(Protocol):
    """The split of parameters over ranks while a model is built and filled (ZeRO-3; see `backend`)."""

    rank: int

    def build(self) -> AbstractContextManager[Any]:
        """Return a context in which new modules hold only this rank's part of each parameter."""
        ...

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Return a context in which parameters are whole; every rank then keeps its part of what rank 0 wrote."""
        ...


class Shards:
    """The tensors of a model directory: names and shapes are read at once, values on demand."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.where = path / SINGLE
        self._files: dict[str, safe_open] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self._find(path):
            try:
                opened = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: not a readable safetensors file ({error})") from None
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                if name in self._files:
                    raise ModelError(f"{file}: holds {name}, and so does another shard of {self.where}")
                self._files[name] = opened
                self.shapes[name] = tuple(opened.get_slice(name).get_shape())

    def _find(self, path: Path) -> list[Path]:
        if self.where.is_file():
            return [self.where]
        self.where = path / INDEX
        if not self.where.is_file():
            pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
            found = ", ".join(pickled[:3])
            hint = (
                f"found {found}: convert it to safetensors first, since pickled weights can run code when opened"
                if pickled
                else "copy the safetensors weights there"
            )
            raise ModelError(f"{path}: no {SINGLE} and no {INDEX}; {hint}")
        try:
            names = sorted(set(json.loads(self.where.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{self.where}: not a safetensors index ({error!r})") from None
        odd = [n for n in names if not isinstance(n, str) or Path(n).name != n or not n.endswith(".safetensors")]
        if odd:
            raise ModelError(f"{self.where}: names {odd[0]!r}, which is not a safetensors file of this folder")
        if absent := [name for name in names if not (path / name).is_file()]:
            raise ModelError(f"{self.where}: {len(absent)} shard(s) not there, first {absent[0]}; download it again")
        return [path / name for name in names]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows [start, stop) of a tensor, in the dtype of the file."""
        file = self._files[name]
        return file.get_slice(name)[start:stop] if self.shapes[name] else file.get_tensor(name)

    def fill(self, target: Tensor, pieces: list[TensorPiece]) -> None:
        """Fill one of our tensors from its pieces, in its own dtype."""
        for piece in pieces:
            target[piece.at].copy_(self.read(piece.upstream, piece.start, piece.stop))


def load_weights(
    model: DiffusionLM, path: Path, dtype: torch.dtype, device: torch.device | str, sharding: Sharding | None
) -> None:
    """Fill a model built on the meta device (or by `sharding`) from a directory.

    Raises ModelError, before a weight is read, naming files that are missing or pickled and tensors that are missing,
    surplus or of another shape.
    """
    with ExitStack() as stack:
        shards = Shards(path, stack)
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in own.items()}
        by_tensor: dict[str, list[TensorPiece]] = {}
        for piece in model.pieces():
            by_tensor.setdefault(piece.ours, []).append(piece)
        _compare(published_shapes(model.pieces(), shapes), shards, model.tied_tensors())
        for name, pieces in by_tensor.items():
            tensor = own[name]
            if sharding is not None and isinstance(tensor, nn.Parameter) and hasattr(tensor, "ds_shape"):
                with sharding.whole([tensor]):
                    if sharding.rank == 0:
                        shards.fill(tensor.data, pieces)
            else:
                parameter = isinstance(tensor, nn.Parameter)
                value = torch.empty(shapes[name], dtype=dtype if parameter else tensor.dtype, device=device)
                shards.fill(value, pieces)
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, nn.Parameter(value) if parameter else value)


def published_shapes(pieces: Iterable[TensorPiece], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Compute the shape of every tensor a checkpoint must have from the shapes of ours."""
    published: dict[str, tuple[int, ...]] = {}
    for piece in pieces:
        shape = tuple(torch.empty(shapes[piece.ours], device="meta")[piece.at].shape)
        rows = published.get(piece.upstream, (0,))[0]
        published[piece.upstream] = (rows + shape[0], *shape[1:]) if shape else ()
    return published


def _compare(published: dict[str, tuple[int, ...]], shards: Shards, tied: tuple[str, str] | None) -> None:
    names = set(shards.shapes)
    if tied and tied[0] in names:
        names.discard(tied[0])
        rows = shards.shapes[tied[0]][0]
        same = shards.shapes[tied[0]] == shards.shapes.get(tied[1]) and all(
            torch.equal(*(shards.read(name, first, first + COMPARED_ROWS) for name in tied))
            for first in range(0, rows, COMPARED_ROWS)
        )
        if not same:
            raise ModelError(f"{shards.where}: {tied[0]} differs from {tied[1]}, and config.json says they are tied")
    missing, surplus = sorted(published.keys() - names), sorted(names - published.keys())
    for problem, found in (("missing", missing), ("surplus", surplus)):
        if found:
            raise ModelError(
                f"{shards.where}: {len(found)} {problem} tensor(s), first {found[0]}; is config.json its own?"
            )
    if wrong := sorted(n for n in names if shards.shapes[n] != published[n]):
        name = wrong[0]
        raise ModelError(
            f"{shards.where}: {len(wrong)} misshapen tensor(s), first {name}: {list(shards.shapes[name])}, and "
            f"config.json makes it {list(published[name])}; is config.json its own?"
        )


def save_weights(model: DiffusionLM, path: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the weights under their upstream names: one file, or shards of at most `max_shard_bytes` with an index.

    A tensor larger than that gets a shard for itself.
    """
    state, where = model.state_dict(), dict[str, str]()
    shards, sizes = [dict[str, list[TensorPiece]]()], [0]
    for name, pieces in model.checkpoint_tensors().items():
        size = sum(state[piece.ours][piece.at].nbytes for piece in pieces)
        if shards[-1] and sizes[-1] + size > max_shard_bytes:
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
