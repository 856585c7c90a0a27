"""How one tensor of a checkpoint lies in our parameters. Import and export are both read off the same table.

A table maps a stem of a checkpoint's names to our modules:

    "h.{}.attn.c_attn": "block/attention/query block/attention/key block/attention/value"

`{}` is the number of a layer; our parameters of all layers lie in one array, layers first. Several modules are joined
along the output. A stem's `.weight` is our kernel, scale or embedding, its `.bias` our bias. `block/` stands for the
body's blocks, `body/` for the body itself; other paths begin at the root, as heads do.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bothways.errors import InputError
from bothways.model.axes import logical_axes

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

    def entries(self, shapes: Shapes) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(name of a checkpoint's tensor with {} for the layer, our paths) for all that our model has.

        Raises:
          KeyError: the table holds nothing for one of our parameters.
        """
        block, left = f"{self.body}/stack/blocks/", set(shapes)
        for stem, modules in self.table.items():
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
        joined = np.concatenate([a.reshape(self._matrix(p, a.shape)) for p, a in zip(ours, arrays, strict=True)], axis=-1)
        if ours[0].endswith("position/embedding"):
            return np.pad(joined, ((self.first_position, 0), (0, 0)))
        return joined.T if self.transposed and ours[0].endswith("/kernel") else joined

    def _ours(self, ours: tuple[str, ...], tensor: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """One layer of ours from one tensor: `_theirs` backwards."""
        if ours[0].endswith("position/embedding"):
            return [tensor[self.first_position :]]
        tensor = tensor.T if self.transposed and ours[0].endswith("/kernel") else tensor
        widths = [self._matrix(p, s)[-1] for p, s in zip(ours, shapes, strict=True)]
        parts = np.split(tensor, np.cumsum(widths)[:-1], axis=-1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def names(self, shapes: Shapes, absent: Iterable[str] = ()) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
        """(tensor's name, our paths, layer or None) of every tensor that a checkpoint of these shapes holds."""
        for template, ours in self.entries(shapes):
            layered = "{}" in template
            for layer in range(shapes[ours[0]][0]) if layered else [None]:
                name = template.format(layer)
                if name not in absent:
                    yield name, ours, layer

    def from_checkpoint(
        self, tensors: dict[str, np.ndarray], shapes: Shapes, absent: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Our parameters, float32, from a checkpoint's tensors; each is used once.

        Args:
          absent: tensors that a checkpoint does not have for a layer of ours; there our parameter is 1 and not used.

        Raises:
          InputError: says which tensors are missing, of another shape, or left over.
        """
        flat = {path: np.ones(shape, np.float32) for path, shape in shapes.items()}
        left, missing, misshapen, infinite = set(tensors), [], [], []
        for name, ours, layer in self.names(shapes, absent):
            if name not in tensors:
                missing.append(name)
                continue
            left.discard(name)
            targets = [flat[p] if layer is None else flat[p][layer] for p in ours]
            wanted = self._theirs(ours, targets).shape
            if tensors[name].shape != wanted:
                misshapen.append(f"{name} is {list(tensors[name].shape)}, wanted {list(wanted)}")
                continue
            if not np.isfinite(tensors[name]).all():
                infinite.append(name)
            for target, part in zip(targets, self._ours(ours, tensors[name], [t.shape for t in targets]), strict=True):
                target[...] = part
        found = [("missing", missing), ("of another shape", misshapen), ("left over", sorted(left))]
        found += [("not all finite numbers (NaN or infinite)", infinite)]
        if problems := [f"  - {what}: {_some(names)}" for what, names in found if names]:
            raise InputError("the tensors do not fit the configuration:\n" + "\n".join(problems))
        return unflatten_dict({tuple(path.split("/")): array for path, array in flat.items()})

    def to_checkpoint(self, params: Any, absent: Iterable[str] = ()) -> dict[str, np.ndarray]:
        """A checkpoint's tensors from our parameters: `take` backwards."""
        flat = {"/".join(path): np.asarray(array, np.float32) for path, array in flatten_dict(params).items()}
        shapes = {path: array.shape for path, array in flat.items()}
        return {
            name: np.ascontiguousarray(self._theirs(ours, [flat[p] if layer is None else flat[p][layer] for p in ours]))
            for name, ours, layer in self.names(shapes, absent)
        }


def shapes_of(params: Any) -> Shapes:
    """Paths and shapes of a tree of parameters, or of their ShapeDtypeStructs."""
    return {"/".join(path): tuple(leaf.shape) for path, leaf in flatten_dict(params).items()}


def _some(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
