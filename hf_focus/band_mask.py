"""`BandMask`: what a model's queries may see, evaluated block by block where it is read, never tokens × tokens."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def first_tokens(tokens: Tensor, count: int) -> Tensor:
    """Positions of the first `count` tokens that are no padding: (B, S) bool -> (B, count) int64.

    A row with fewer has positions from S on in the places that are left.
    """
    length = tokens.shape[1]
    tokens = torch.nn.functional.pad(tokens, (0, count), value=True)
    position = torch.arange(length + count, device=tokens.device)
    return torch.where(tokens, position, length + count).topk(count, largest=False, sorted=True).values


class BandMask:
    """A model's attention mask (B, 1, T, S) that is not a tensor: memory O(B·S) until it is read.

    It goes through a model in the place of the tensor, as FlexAttention's BlockMask does. Whatever asks more of it
    than its shape (adds it, slices it, reads an attribute) gets what `dense` gives, so no model has to know it.

    Args:
        function: (batch, head, query, key) indices -> bool, as in `transformers.masking_utils`, elementwise.
        batch_size, length, num_keys: B, T, S.
        query_offset: position in the sequence of the first query.
        key_offset: position in the sequence of the first key: above 0 where a cache dropped the first ones.
        padding: (B, key_offset + S or more) bool, False on padding; None: no padding.
        is_plain: whether nothing but the order of the tokens counts: all keys up to the query's, or all.
        dtype: of the tensor it stands for: torch.bool, or a floating dtype for a mask that is added to scores.
        device: where it is evaluated.
    """

    ndim = 4

    def __init__(
        self,
        function: MaskFunction,
        batch_size: int,
        length: int,
        num_keys: int,
        query_offset: int = 0,
        key_offset: int = 0,
        padding: Tensor | None = None,
        is_plain: bool = False,
        dtype: torch.dtype = torch.bool,
        device: torch.device | str = "cpu",
    ) -> None:
        self.function = function
        self.shape = torch.Size((batch_size, 1, length, num_keys))
        self.first_query = query_offset
        self.key_offset = key_offset
        self.padding = padding
        self.is_plain = is_plain
        self.dtype = dtype
        self.device = torch.device(device)
        self._memory: dict[Any, Any] = {}

    @property
    def query_offset(self) -> int:
        """Position among the keys of the first query."""
        return self.first_query - self.key_offset

    def without_first(self, count: int) -> "BandMask":
        """The same mask over all keys but the first `count`."""
        rest = copy.copy(self)
        rest.shape = torch.Size((*self.shape[:3], self.shape[3] - count))
        rest.key_offset, rest._memory = self.key_offset + count, {}
        return rest

    def read(self, rows: slice, columns: slice, batch: slice = slice(None)) -> Tensor:
        """What the queries `rows` may see of the keys `columns`: (B or 1, 1, rows, columns) bool, of `batch`."""
        queries, keys = self._queries(rows), self._keys(columns)
        visible = self._see(queries, keys, batch)
        return visible.expand(torch.broadcast_shapes(visible.shape, (1, 1, queries.shape[2], keys.shape[3])))

    def read_own(self) -> Tensor:
        """Whether each query may see its own key: (B or 1, T) bool, False on padding."""
        queries = self._queries(slice(None)).transpose(2, 3)
        visible = self._see(queries, queries)
        return visible.expand(torch.broadcast_shapes(visible.shape, queries.shape))[:, 0, 0]

    def read_band(self, width: int, ahead: int = 0) -> Tensor:
        """What each query may see of the `width` keys that end with its own, and of the `ahead` keys that follow:
        (B or 1, 1, T, width + ahead) bool.

        Column j is the key `width − 1 − j` tokens before the query; False where there is none.
        """
        queries = self._queries(slice(None))
        keys = queries - (width - 1) + torch.arange(width + ahead, device=self.device)
        exists = (keys >= self.key_offset) & (keys < self.key_offset + self.shape[3])
        return self._see(queries, keys.clamp(self.key_offset, self.key_offset + self.shape[3] - 1)) & exists

    def read_limited(self, rows: slice, columns: slice, max_dist: int, sink_tokens: int) -> Tensor:
        """As `read`, of keys at a distance below `max_dist` and of sinks: the first tokens of each sequence."""
        keys = self._keys(columns)
        near = (self._queries(rows) - keys).abs() < max_dist
        if sink_tokens:
            near = near | self._is_sink(sink_tokens, keys)
        return self.read(rows, columns) & near

    def sinks(self, count: int, row: int) -> Tensor:
        """Where in the whole sequence the sinks of query `row` are: (B or 1, count) int64.

        Places past the last key stand for sinks that the sequence does not have.
        """
        if (starts := self._starts()) is not None:
            return starts[:, row, None] + torch.arange(count, device=self.device)
        if self.padding is None:
            return torch.arange(count, device=self.device)[None]
        return self._once(("sinks", count), lambda: first_tokens(self.padding, count))

    def read_sinks(self, rows: slice, places: Tensor, columns: slice, kept: bool) -> Tensor:
        """What the queries `rows` may see of keys at `places`, as `sinks` gives them, where these are outside of
        `columns`: (B or 1, 1, rows, count) bool. Without `kept` keys before the first column are lost."""
        places = places[:, None, None]
        first, last = self.key_offset + columns.start, self.key_offset + columns.stop
        outside = (places < first) | ((places >= last) & (places < self.key_offset + self.shape[3]))
        if not kept and self.key_offset:
            outside = outside & (places >= self.key_offset)
        visible = self._see(self._queries(rows), places.clamp(max=self.key_offset + self.shape[3] - 1)) & outside
        queries = len(range(*rows.indices(self.shape[2])))
        return visible.expand(torch.broadcast_shapes(visible.shape, (1, 1, queries, 1)))

    def dense(self, max_dist: int | None = None, sink_tokens: int = 0, with_sinks: bool = False) -> Tensor:
        """The tensor that this stands for (B or 1, 1, T, S), made once.

        Args:
            max_dist, sink_tokens: as in `read_limited`; None for the model's own mask.
            with_sinks: put the sinks that a cache kept, and which lie before the first key, in front.
        """
        return self._once((max_dist, sink_tokens, with_sinks), lambda: self._dense(max_dist, sink_tokens, with_sinks))

    def _dense(self, max_dist: int | None, sink_tokens: int, with_sinks: bool) -> Tensor:
        every = slice(None)
        if max_dist is None:
            visible = self.read(every, every)
        else:
            visible = self.read_limited(every, every, max_dist, sink_tokens)
        if with_sinks:
            sinks = self.read_sinks(every, self.sinks(sink_tokens, 0), slice(0, self.shape[3]), kept=True)
            batch = max(len(sinks), len(visible))
            visible = torch.cat([x.expand(batch, -1, -1, -1) for x in (sinks, visible)], dim=-1)
        if self.dtype == torch.bool:
            return visible
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.where(visible, zero, torch.finfo(self.dtype).min)

    def to(self, device: torch.device | str, **_: Any) -> "BandMask":
        """The same mask read on another device."""
        old, new, function = self.device, torch.device(device), self.function
        if old == new:
            return self
        moved = copy.copy(self)
        moved.device, moved._memory = new, {}
        moved.padding = None if self.padding is None else self.padding.to(new)
        # The function may hold tensors of the first device
        moved.function = lambda *indices: function(*(index.to(old) for index in indices)).to(new)
        return moved

    def contiguous(self) -> "BandMask":
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense().expand(self.shape)[index]

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _queries(self, rows: slice) -> Tensor:
        positions = torch.arange(*rows.indices(self.shape[2]), device=self.device) + self.first_query
        return positions[None, None, :, None]

    def _keys(self, columns: slice) -> Tensor:
        positions = torch.arange(*columns.indices(self.shape[3]), device=self.device) + self.key_offset
        return positions[None, None, None]

    def _see(self, queries: Tensor, keys: Tensor, batch: slice = slice(None)) -> Tensor:
        entries = torch.arange(*batch.indices(self.shape[0]), device=self.device)[:, None, None, None]
        visible = self.function(entries, torch.zeros_like(entries[:1]), queries, keys)
        return visible if self.padding is None else visible & self.padding[entries, keys]

    def _is_sink(self, count: int, keys: Tensor) -> Tensor:
        """Of keys (1, 1, 1, n) by position in the sequence: (B or 1, 1, 1, n)."""
        if (starts := self._starts()) is not None:
            return (keys - starts[:, None, None, keys[0, 0, 0]]) < count
        if self.padding is None:
            return keys < count
        rank = self._once("rank", lambda: self.padding.cumsum(dim=1))
        return (rank[:, keys[0, 0, 0]] <= count)[:, None, None]

    def _starts(self) -> Tensor | None:
        """Where the sequence of each token starts, (B or 1, S): None unless rows hold several, packed."""
        whole = self.shape[2] == self.shape[3] and self.first_query == self.key_offset == 0
        if self.is_plain or self.padding is not None or not whole:
            return None
        return self._once("starts", self._find_starts)

    def _find_starts(self) -> Tensor | None:
        own = torch.arange(self.shape[3], device=self.device)[None, None, :, None]
        # The first token of a sequence does not see the one before it
        first = ~self._see(own, (own - 1).clamp_min(0))[:, 0, :, 0]
        first[:, 0] = True
        return torch.where(first, own[0, 0, :, 0], 0).cummax(dim=1).values

    def _once(self, name: Any, make: Callable[[], Any]) -> Any:
        if name not in self._memory:
            self._memory[name] = make()
        return self._memory[name]
