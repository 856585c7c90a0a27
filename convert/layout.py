"""How one tensor of a checkpoint lies in our parameters. Import and export are both read off the same table.

A table maps a stem of a checkpoint's names to our modules:

    "h.{}.attn.c_attn": "block/attention/query block/attention/key block/attention/value"

`{}` is the number of a layer; our parameters of all layers lie in one array, layers first. Several modules are joined
along the output. A stem's `.weight` is our kernel, scale or embedding, its `.bias` our bias. `block/` stands for the
body's blocks, `body/` for the body itself; other paths begin at the root, as heads do.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bothways.convert.stored import Stored
from bothways.errors import InputError
from bothways.model.axes import logical_axes
from bothways.one_by_one import let_go

Shapes = dict[str, tuple[int, ...]]
"""Our path -> shape, with the layers' axis in front where there are layers."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A table, and what holds for all its entries."""

    body: str
    """Our body's name: decoder or encoder."""
    table: dict[str, str]
    transposed: bool = True
    """Matrices lie as [out, in], as in torch's Linear; False: [in, out], as ours do and GPT-2's."""
    first_position: int = 0
    """Rows of the position table before that of position 0; RoBERTa has 2, which no text reads."""
    norms_from_zero: bool = False
    """Norms multiply by 1 + weight (Gemma)."""
    by_head: bool = False
    """Where queries, keys and values are one matrix, those of a head lie together (GPT-NeoX); with fewer heads of keys, those of
    a group: its queries, its key, its value (Falcon)."""
    paired: int = 0
    """So many first features of a head of queries and keys are turned as pairs 2k, 2k + 1, not k, k + half (GPT-J). 0: none."""

    as_row: str = ""
    """A vector of ours that lies as a row, [1, n], under the name of its stem alone (BART's bias of scores)."""

    def entries(self, shapes: Shapes) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(name of a checkpoint's tensor with {} for the layer, our paths) for all that our model has.

        Raises:
          KeyError: the table holds nothing for one of our parameters.
        """
        block, left = f"{self.body}/stack/blocks/", set(shapes)
        for stem, modules in self.table.items():
            if modules == self.as_row:
                left.discard(modules)
                yield from [(stem, (modules,))] if modules in shapes else ()
                continue
            paths = [m.replace("block/", block).replace("body/", f"{self.body}/") for m in modules.split()]
            for suffix, leaves in {".weight": ("kernel", "scale", "embedding"), ".bias": ("bias",)}.items():
                ours = tuple(f"{p}/{leaf}" for p in paths for leaf in leaves if f"{p}/{leaf}" in shapes)
                if ours:
                    left -= set(ours)
                    yield stem + suffix, ours
        if left:
            raise KeyError(f"no published name for {sorted(left)}")

    def _matrix(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Our shape of one layer as a checkpoint keeps it, before it is transposed: (in, out), or a vector's length."""
        if not path.endswith("/kernel"):
            return shape if path.endswith("/embedding") else (int(np.prod(shape)),)
        axes = [axis for axis in logical_axes(tuple(path.split("/"))) if axis != "layers"]
        inputs = 2 if axes[0] == "heads" else 1  # the projection out of the heads sums over heads and their width
        return int(np.prod(shape[:inputs])), int(np.prod(shape[inputs:]))

    def _theirs(self, ours: tuple[str, ...], arrays: list[np.ndarray]) -> np.ndarray:
        """One tensor of a checkpoint from one layer of ours."""
        if ours[0] == self.as_row:
            return arrays[0][None]
        if self.by_head and len(ours) == 3:
            groups, width = arrays[1].shape[-2:]
            heads = [a.reshape(*a.shape[:-2], groups, -1, width) for a in arrays]
            joined = np.concatenate(heads, axis=-2)  # [D, G, H/G + 2, K], of a bias without D
            joined = joined.reshape(*joined.shape[:-3], -1)
            return joined.T if self._is_transposed(ours[0]) else joined
        arrays = [self._turned(p, a, self.paired) for p, a in zip(ours, arrays, strict=True)]
        joined = np.concatenate([a.reshape(self._matrix(p, a.shape)) for p, a in zip(ours, arrays, strict=True)], axis=-1)
        if self.norms_from_zero and ours[0].endswith("norm/scale"):
            return joined - np.float32(1)
        if ours[0].endswith("position/embedding"):
            return np.pad(joined, ((self.first_position, 0), (0, 0)))
        return joined.T if self._is_transposed(ours[0]) else joined

    def _turned(self, path: str, array: np.ndarray, paired: int, back: bool = False) -> np.ndarray:
        """A query or key projection with the first features of each head from halves to pairs, or back."""
        if not paired or not path.rpartition("/")[0].endswith(("attention/query", "attention/key")):
            return array
        order = np.arange(array.shape[-1])
        order[:paired] = order[:paired].reshape(2, -1).T.reshape(-1)
        return array[..., np.argsort(order) if back else order]

    def _is_transposed(self, path: str) -> bool:
        """Task heads are torch's Linear everywhere."""
        return (self.transposed or path.startswith("task_head/")) and path.endswith("/kernel")

    def _ours(self, ours: tuple[str, ...], tensor: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """One layer of ours from one tensor: `_theirs` backwards."""
        if ours[0] == self.as_row:
            return [tensor[0]]
        if ours[0].endswith("position/embedding"):
            return [tensor[self.first_position :]]
        if self.norms_from_zero and ours[0].endswith("norm/scale"):
            return [tensor.astype(np.float32) + np.float32(1)]
        tensor = tensor.T if self._is_transposed(ours[0]) else tensor
        if self.by_head and len(ours) == 3:
            groups, width = shapes[1][-2:]
            heads = tensor.reshape(*tensor.shape[:-1], groups, -1, width)
            parts = heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]
            return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        widths = [self._matrix(p, s)[-1] for p, s in zip(ours, shapes, strict=True)]
        parts = np.split(tensor, np.cumsum(widths)[:-1], axis=-1)
        parts = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return [self._turned(p, part, self.paired, back=True) for p, part in zip(ours, parts, strict=True)]

    def names(self, shapes: Shapes, absent: Iterable[str] = ()) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
        """(tensor's name, our paths, layer or None) of every tensor that a checkpoint of these shapes holds."""
        for template, ours in self.entries(shapes):
            layered = "{}" in template
            for layer in range(shapes[ours[0]][0]) if layered else [None]:
                name = template.format(layer)
                if name not in absent:
                    yield name, ours, layer

    def _shape_of_theirs(self, ours: tuple[str, ...], shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of what `_theirs` makes of parameters of these shapes."""
        if ours[0] == self.as_row:
            return (1, *shapes[0])
        matrices = [self._matrix(p, s) for p, s in zip(ours, shapes, strict=True)]
        joined = (*matrices[0][:-1], sum(m[-1] for m in matrices))
        if ours[0].endswith("position/embedding"):
            joined = (joined[0] + self.first_position, joined[1])
        return joined[::-1] if self._is_transposed(ours[0]) else joined

    def from_checkpoint(
        self,
        tensors: Mapping[str, np.ndarray | Stored],
        shapes: Shapes,
        absent: Iterable[str] = (),
        allocate: Callable[[str, tuple[int, ...]], np.ndarray] = lambda path, shape: np.zeros(shape, np.float32),
    ) -> dict[str, Any]:
        """Our parameters from a checkpoint's tensors; each is used once, and one is held at a time.

        Args:
          absent: tensors that a checkpoint does not have for a layer of ours; there our parameter is 1 and not used, or a
            bias of 0.
          allocate: our path and shape -> zeros, in the type that the parameter is kept in.

        Raises:
          InputError: says which tensors are missing, of another shape, or left over.
        """
        left, missing, misshapen, infinite = set(tensors), [], [], []
        whole = {p: shape[1:] if "/blocks/" in p else shape for p, shape in shapes.items()}
        for name, ours, _ in self.names(shapes, absent):
            if name not in tensors:
                missing.append(name)
                continue
            left.discard(name)
            wanted = self._shape_of_theirs(ours, [whole[p] for p in ours])
            if tuple(tensors[name].shape) != wanted:
                misshapen.append(f"{name} is {list(tensors[name].shape)}, wanted {list(wanted)}")
        found = [("missing", missing), ("of another shape", misshapen), ("left over", sorted(left))]
        flat: dict[str, np.ndarray] = {}
        for name, ours, layer in self.names(shapes) if not (missing or misshapen or left) else ():
            flat |= {p: allocate(p, shapes[p]) for p in ours if p not in flat}
            targets = [flat[p] if layer is None else flat[p][layer] for p in ours]
            if name in absent:
                for path, target in zip(ours, targets, strict=True):
                    target[...] = 0 if path.endswith("/bias") else 1
                continue
            tensor = np.asarray(tensors[name])
            if not np.isfinite(tensor).all():
                infinite.append(name)
            for target, part in zip(targets, self._ours(ours, tensor, [t.shape for t in targets]), strict=True):
                target[...] = part
        found += [("not all finite numbers (NaN or infinite)", infinite)]
        if problems := [f"  - {what}: {_some(names)}" for what, names in found if names]:
            raise InputError("the tensors do not fit the configuration:\n" + "\n".join(problems))
        return unflatten_dict({tuple(path.split("/")): array for path, array in flat.items()})

    def stored(self, params: Any, absent: Iterable[str] = ()) -> dict[str, Stored]:
        """A checkpoint's tensors from our parameters, each made when it is read: `from_checkpoint` backwards."""
        flat = {"/".join(path): array for path, array in flatten_dict(params).items()}
        shapes = {path: tuple(array.shape) for path, array in flat.items()}
        whole = {p: shape[1:] if "/blocks/" in p else shape for p, shape in shapes.items()}

        def one(ours: tuple[str, ...], layer: int | None) -> np.ndarray:
            arrays = [np.asarray(flat[p]) for p in ours]
            found = np.ascontiguousarray(self._theirs(ours, [a if layer is None else a[layer] for a in arrays]))
            for array in arrays:
                let_go(array)
            return found

        return {
            name: Stored(
                self._shape_of_theirs(ours, [whole[p] for p in ours]),
                functools.partial(one, ours, layer),
                narrow=not ours[0].startswith("task_head/"),
            )
            for name, ours, layer in self.names(shapes, absent)
        }

    def to_checkpoint(self, params: Any, absent: Iterable[str] = ()) -> dict[str, np.ndarray]:
        """`stored`, all of it read, in float32."""
        return {name: np.asarray(tensor, np.float32) for name, tensor in self.stored(params, absent).items()}


def shapes_of(params: Any) -> Shapes:
    """Paths and shapes of a tree of parameters, or of their ShapeDtypeStructs."""
    return {"/".join(path): tuple(leaf.shape) for path, leaf in flatten_dict(params).items()}


def _some(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
