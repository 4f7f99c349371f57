"""A validated adapter in host memory, its identity, and the card that describes it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

import numpy as np

from jchameleon.config import PROJECTIONS
from jchameleon.errors import AdapterError

ModuleKey = tuple[int, str]
"""(layer, projection), projection being one of `PROJECTIONS`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoraPair:
    """The two factors of one module: y += scale * B @ (A @ x).

    Attributes:
      a: [r, d_in], float32, float16 or bfloat16.
      b: [d_out, r], likewise.
      scale: alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilised.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        """Rank of this module."""
        return self.a.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of both factors."""
        return self.a.nbytes + self.b.nbytes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterCard:
    """What is kept of a registered adapter while its weights are elsewhere.

    Attributes: see `HostAdapter`.
    """

    uid: str
    rank: int
    targets: frozenset[str]
    num_bytes: int
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HostAdapter:
    """An adapter, checked against a model; equal content has an equal uid.

    Attributes:
      uid: sha256 hex digest over ranks, scales and tensors.
      rank: largest rank of its modules.
      modules: factors by (layer, projection), in that order.
      targets: projections with a module in at least one layer.
      num_bytes: bytes of all factors, as stored.
      source: where it came from, for messages.
    """

    uid: str
    rank: int
    modules: Mapping[ModuleKey, LoraPair]
    targets: frozenset[str]
    num_bytes: int
    source: str

    @classmethod
    def build(cls, modules: Mapping[ModuleKey, LoraPair], *, source: str) -> Self:
        """Make an adapter of `modules`; everything else follows from them.

        Raises:
          AdapterError: there is no module.
        """
        if not modules:
            raise AdapterError("an adapter must have at least one module")
        ordered = {
            key: modules[key]
            for key in sorted(modules, key=lambda k: (k[0], PROJECTIONS.index(k[1])))
        }
        return cls(
            uid=content_uid(ordered),
            rank=max(pair.rank for pair in ordered.values()),
            modules=MappingProxyType(ordered),
            targets=frozenset(projection for _, projection in ordered),
            num_bytes=sum(pair.num_bytes for pair in ordered.values()),
            source=source,
        )

    def slice_ranks(self, first: int, last: int) -> Self:
        """Return the part of ranks `first` to below `last`, of views; same uid.

        The products of such parts add up to the adapter's own. Modules without any of
        these ranks are left out.
        """
        modules = {
            key: LoraPair(
                a=pair.a[first:last], b=pair.b[:, first:last], scale=pair.scale
            )
            for key, pair in self.modules.items()
            if pair.rank > first
        }
        return dataclasses.replace(
            self,
            rank=min(last, self.rank) - first,
            modules=MappingProxyType(modules),
            targets=frozenset(projection for _, projection in modules),
            num_bytes=sum(pair.num_bytes for pair in modules.values()),
        )

    @property
    def card(self) -> AdapterCard:
        """The description without the weights."""
        return AdapterCard(
            uid=self.uid,
            rank=self.rank,
            targets=self.targets,
            num_bytes=self.num_bytes,
            source=self.source,
        )


def content_uid(modules: Mapping[ModuleKey, LoraPair]) -> str:
    """Return the sha256 hex digest of what `modules` compute.

    Names, paths and the order of tensors in a file do not enter; every rank, scale,
    dtype, shape and tensor byte does.
    """
    digest = hashlib.sha256(b"jchameleon adapter 1\n")
    for layer, projection in sorted(modules):
        pair = modules[layer, projection]
        head = [layer, projection, pair.rank, float(pair.scale).hex()]
        for array in (pair.a, pair.b):
            head += [array.dtype.name, list(array.shape)]
        # The line fixes the length of the bytes behind it, so no two adapters
        # serialise to the same stream.
        digest.update(json.dumps(head).encode() + b"\n")
        for array in (pair.a, pair.b):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
