"""A model that is not in transformers: declared, patched, saved, and rebuilt from its config.json."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SETTINGS, randomize, tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_focus import apply_focus, record_focus, register_architecture, remove_focus
from hf_focus.architecture import _ARCHITECTURES
from hf_focus.errors import UnsupportedArchitectureError


class MineConfig(PreTrainedConfig):
    model_type = "mine"
    features: int = 32


class OffConfig(MineConfig):
    model_type = "mine_off"


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> Any:
    scores = query @ key.mT * query.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


class MineAttention(nn.Module):
    """Its sizes have names that nobody else uses."""

    def __init__(self, config: MineConfig) -> None:
        super().__init__()
        self.config, self.is_causal, self.parallel, self.share = config, True, 4, 8
        self.qkv, self.out = (
            nn.Linear(config.features, 3 * config.features),
            nn.Linear(config.features, config.features),
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.parallel, self.share)).permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        return self.out(attend(self, query, key, value, None)[0].flatten(2))


REGISTRY = ALL_ATTENTION_FUNCTIONS


class RenamedAttention(MineAttention):
    """The same, with the registry under a name of its own."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.parallel, self.share)).permute(2, 0, 3, 1, 4)
        attend = REGISTRY.get_interface(self.config._attn_implementation, eager_attention)
        return self.out(attend(self, query, key, value, None)[0].flatten(2))


class OffAttention(MineAttention):
    """The same, in a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.parallel, self.share)).permute(2, 0, 3, 1, 4)
        return self.out(eager_attention(self, query, key, value, None)[0].flatten(2))


class MineModel(PreTrainedModel):
    config_class = MineConfig
    _supports_sdpa = True
    attention: type[nn.Module] = MineAttention

    def __init__(self, config: MineConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(99, config.features)
        self.layers = nn.ModuleList(self.attention(config) for _ in range(2))
        self.head = nn.Linear(config.features, 99)
        self.post_init()

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return CausalLMOutput(logits=self.head(x))


class RenamedModel(MineModel):
    attention = RenamedAttention


class OffModel(MineModel):
    config_class = OffConfig
    attention = OffAttention


@pytest.fixture
def registered() -> Iterator[None]:
    kept, types = dict(_ARCHITECTURES), dict(CONFIG_MAPPING._extra_content)
    AutoConfig.register("mine", MineConfig)
    AutoConfig.register("mine_off", OffConfig)
    yield
    _ARCHITECTURES.clear()
    _ARCHITECTURES.update(kept)
    CONFIG_MAPPING._extra_content.clear()
    CONFIG_MAPPING._extra_content.update(types)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("model_class", [MineModel, OffModel])
def test_declared_saved_and_rebuilt(model_class: type[MineModel], tmp_path: Path) -> None:
    config_class, name = model_class.config_class, model_class.config_class.model_type
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    torch.manual_seed(0)
    model, ids = model_class(config_class()).eval(), tokens()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    before = model(ids).logits
    with pytest.raises(UnsupportedArchitectureError):
        apply_focus(model, SETTINGS)
    routed = model_class is OffModel
    register_architecture(
        name, attention=("MineAttention", "OffAttention"), num_heads="parallel", head_dim="share", routed=routed
    )
    apply_focus(model, SETTINGS)
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)
    with record_focus(model) as records:
        after = randomize(model)(ids).logits
    assert len(records) == 2
    assert not torch.allclose(after, before, atol=1e-3)
    changed = ids.clone()
    changed[:, 10] = 3
    assert torch.equal(model(changed).logits[:, :10], after[:, :10])
    model.save_pretrained(tmp_path)
    # What config.json says is enough
    _ARCHITECTURES.pop(name)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(ids).logits, after)
    assert type(loaded.config).__name__ == f"Focus{config_class.__name__}"
    assert torch.equal(remove_focus(loaded)(ids).logits, before)
    assert type(loaded.layers[0]) is model_class.attention


@pytest.mark.usefixtures("registered")
def test_the_interface_under_another_name() -> None:
    register_architecture("mine", attention="RenamedAttention", num_heads="parallel", head_dim="share")
    model, ids = RenamedModel(MineConfig()).eval(), tokens()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    before = model(ids).logits
    apply_focus(model, SETTINGS)
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)
    assert not torch.allclose(randomize(model)(ids).logits, before, atol=1e-3)


@pytest.mark.usefixtures("registered")
def test_scores_that_are_not_made_by_a_product() -> None:
    class Sums(OffAttention):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(x.cumsum(1))

    class SumsModel(MineModel):
        attention = Sums

    register_architecture("mine", attention="Sums", num_heads="parallel", head_dim="share", routed=True)
    model = apply_focus(SumsModel(MineConfig()).eval(), SETTINGS)
    with pytest.raises(UnsupportedArchitectureError, match="Sums made no product of attention weights and values"):
        model(tokens())
