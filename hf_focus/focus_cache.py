"""A key-value cache of bounded size: under `max_dist` no layer reads more than its sinks and its last tokens."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .band_mask import first_tokens
from .configuration import FocusConfig
from .errors import FocusConfigError, bad_value


class SinkWindowLayer(DynamicLayer):
    """One layer's keys and values: the sinks and the last `window` tokens.

    Once tokens are dropped, `update` returns the sinks, then the window and the new tokens; before, all tokens.
    Positions go on counting all tokens.

    Args:
        window: tokens kept besides the new ones.
        sinks: positions of the sinks (B or 1, n).
    """

    def __init__(self, window: int, sinks: Tensor) -> None:
        super().__init__()
        self.window = window
        self.sinks = self.first_sinks = sinks
        self.last_sink = int(sinks.max()) if sinks.numel() else -1
        self.cumulative_length = 0
        self.record_past = False
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        places = self.sinks.to(key_states.device)
        # Beams may have been added since the cache was made
        self.sinks = places.repeat_interleave(key_states.shape[0] // places.shape[0], dim=0)
        count = places.shape[1]
        self.sink_keys, self.sink_values = (
            x.new_zeros(*x.shape[:2], count, x.shape[3]) for x in (key_states, value_states)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(B, Hkv, T, D) and (B, Hkv, T, Dv) new -> what the new tokens may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._keep_sinks(key_states, value_states)
        is_full = self._dropped > 0
        keys, values = [self.keys, key_states], [self.values, value_states]
        if is_full:
            keys, values = [self.sink_keys, *keys], [self.sink_values, *values]
        keys, values = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        self.cumulative_length += key_states.shape[2]
        before = self.sinks.shape[1] if is_full else 0
        self.keys, self.values = keys[:, :, before:], values[:, :, before:]
        if not self.record_past:
            self._trim()
        return keys, values

    @property
    def _dropped(self) -> int:
        return self.cumulative_length - self.keys.shape[2]

    def _keep_sinks(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.cumulative_length > self.last_sink:
            return
        length = key_states.shape[2]
        index = self.sinks - self.cumulative_length
        is_new = ((index >= 0) & (index < length))[:, None, :, None]
        index = index.clamp(0, length - 1)[:, None, :, None]

        def taken(new: Tensor, kept: Tensor) -> Tensor:
            return torch.where(is_new, new.gather(2, index.expand(-1, new.shape[1], -1, new.shape[3])), kept)

        self.sink_keys = taken(key_states, self.sink_keys)
        self.sink_values = taken(value_states, self.sink_values)

    def _trim(self) -> None:
        surplus = self.keys.shape[2] - self.window
        if surplus > 0:
            self.keys, self.values = self.keys[:, :, surplus:], self.values[:, :, surplus:]
            if surplus > 1:
                # A view would keep the whole prompt in memory
                self.keys, self.values = self.keys.clone(), self.values.clone()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number and first position of the keys after the sinks."""
        if not self.is_initialized:
            return query_length, 0
        return self.keys.shape[2] + query_length, self._dropped

    def get_seq_length(self) -> int:
        """All tokens seen, kept or not."""
        return self.cumulative_length

    def activate_past_recording(self) -> None:
        """Keep all tokens from here on until `crop`, so that it can go back (assisted generation)."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, and what is then out of reach.

        Raises:
            RuntimeError: tokens that would be needed again were dropped, as `activate_past_recording` avoids.
        """
        if not self.is_initialized:
            return
        # transformers up to 5.17 also passes the length that is to remain
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(self.cumulative_length - tokens_to_remove, 0)
        remain = self.keys.shape[2] - remove
        if remain < min(self.window, self.cumulative_length - remove):
            raise RuntimeError(
                f"crop({tokens_to_remove}) needs tokens that the bounded cache dropped: call activate_past_recording"
                " before the tokens to remove are added."
            )
        self.keys, self.values = self.keys[:, :, :remain], self.values[:, :, :remain]
        self.cumulative_length -= remove
        self._trim()

    def reset(self) -> None:
        self.keys = self.values = self.sink_keys = self.sink_values = None
        self.sinks, self.is_initialized, self.cumulative_length = self.first_sinks, False, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_sinks(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_sinks(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.is_initialized:
            self._select_sinks(torch.arange(len(self.sinks)).repeat_interleave(repeats))

    def _select_sinks(self, rows: Tensor) -> None:
        if self.is_initialized:
            rows = rows.to(self.sinks.device)
            self.sinks, self.sink_keys, self.sink_values = (
                x[rows] for x in (self.sinks, self.sink_keys, self.sink_values)
            )


class FocusCache(DynamicCache):
    """The cache of a model patched with `max_dist`, of constant size however long the text gets.

    Each layer keeps `sink_tokens` first tokens and the last max(max_dist, max_span); a layer with a shorter sliding
    window of its own keeps that. `generate` makes one by itself. For calls of your own:

    ```python
    cache = FocusCache(model.config, attention_mask)
    output = model(input_ids, attention_mask=attention_mask, past_key_values=cache)
    ```

    Args:
        config: of a decoder of which every layer is patched, with `max_dist`.
        attention_mask: (B, S) 2D mask of the prompt, needed where it is padded: it tells where a row starts. After
            `reset` the next prompt must be padded alike.
        offloading: keep the keys and values of layers that are not running on the CPU.
        all_patched: every layer of the decoder is known to be patched: `modules` alone does not tell.

    Raises:
        FocusConfigError: `config` has no `max_dist`, or may leave layers unpatched; a mask that is not 2D.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        attention_mask: Tensor | None = None,
        offloading: bool = False,
        *,
        all_patched: bool = False,
    ) -> None:
        if isinstance(config, PreTrainedConfig):
            config = config.get_text_config(decoder=True)
        settings = getattr(config, "focus_config", None)
        if settings is None or settings["max_dist"] is None:
            raise FocusConfigError(bad_value("config", type(config).__name__, "a Focus config with max_dist"))
        settings = FocusConfig.from_dict(settings)
        if settings.layers is not None and len(settings.layers) < config.num_hidden_layers:
            # All layers share a mask, and those without a branch see everything
            raise FocusConfigError(bad_value("layers", settings.layers, "all layers, with a bounded cache"))
        if settings.modules is not None and not all_patched:
            accepted = "None, or a pattern that finds every layer of the decoder, with all_patched=True"
            raise FocusConfigError(bad_value("modules", settings.modules, accepted))
        if attention_mask is None:
            sinks = torch.arange(settings.sink_tokens)[None]
        elif attention_mask.ndim == 2:
            sinks = first_tokens(attention_mask.bool(), settings.sink_tokens)
        else:
            raise FocusConfigError(bad_value("attention_mask", tuple(attention_mask.shape), "a 2D mask (B, S)"))
        super().__init__(config=config, offloading=offloading)
        # A query's own key comes with it
        bound = max(settings.max_dist, settings.max_span)
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * len(self.layers)
        for number, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[number] = SinkWindowLayer(bound - 1, sinks)
            elif type(layer) is DynamicSlidingWindowLayer and types[number] == "sliding_attention":
                # transformers' layer keeps everything where the window is a single token
                layer.sliding_window = min(layer.sliding_window, max(bound, 2))

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers', which up to 5.17 passes a tensor in assisted generation."""
        super().crop(int(tokens_to_remove))
