"""Measures of the claims: against values known by hand, and on models."""

import math

import pytest
import torch
from small_runs import byte_tokenizer, tiny_bert_classifier, tiny_llama
from tiny import randomize

from hf_focus import apply_focus, record_focus
from hf_focus.claims import (
    MEANINGS,
    attention_spread,
    bits_per_byte,
    meaning,
    measure_attention,
    measure_claims,
    passkey_accuracy,
    rank_residual,
)
from hf_focus.errors import FocusDataError

IDS = torch.arange(10, 40)[None]


def test_spread_by_hand() -> None:
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    found = attention_spread(weights)
    torch.testing.assert_close(found["entropy"], torch.tensor([math.log(4), 0.0, math.log(2)]))
    torch.testing.assert_close(found["entropy_share"], torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(found["effective_tokens"], torch.tensor([4.0, 1.0, 2.0]))
    torch.testing.assert_close(found["attended"], torch.tensor([1.0, 1.0, 1.0]))
    among_four = attention_spread(weights, torch.tensor([4, 4, 4]))
    torch.testing.assert_close(among_four["entropy_share"], torch.tensor([1.0, 0.0, 0.5]))
    torch.testing.assert_close(among_four["attended"], torch.tensor([1.0, 0.25, 0.5]))


def test_ranks_collapse_where_tokens_are_equal() -> None:
    assert rank_residual(torch.ones(2, 5, 3)).tolist() == [0, 0]
    around_zero = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert rank_residual(around_zero).item() == 1
    assert rank_residual(around_zero + torch.tensor([1.0, 0.0])).item() == pytest.approx(math.sqrt(2) / 2)


@pytest.mark.parametrize("focus", [False, True])
def test_measuring_attention_leaves_the_model_as_it_was(focus: bool) -> None:
    model = tiny_llama().train()
    if focus:
        randomize(apply_focus(model, max_span=8, ramp=3))
    before = model.config._attn_implementation
    found = measure_attention(model, [IDS, IDS[:, :20]])
    by_layer = {name for name in found if name.startswith("rank_residual_layer_")}
    assert by_layer == {f"rank_residual_layer_{layer}" for layer in range(model.config.num_hidden_layers)}
    assert set(found) - by_layer <= set(MEANINGS)
    assert (model.config._attn_implementation, model.training) == (before, True)
    assert 0 < found["entropy_share"] <= 1
    assert found["effective_tokens"] >= 1
    assert ("local_span" in found) == focus
    with pytest.raises(FocusDataError, match="sequences"):
        measure_attention(model, [])


def test_spread_is_that_of_the_models_own_weights() -> None:
    model = tiny_llama().eval()
    found = measure_attention(model, [IDS])
    model.set_attn_implementation("eager")
    weights = torch.stack(model(IDS, output_attentions=True).attentions)
    seen = torch.arange(1, IDS.shape[1] + 1)
    assert found["attended"] == pytest.approx(((weights > 1e-3).sum(-1) / seen).mean().item(), rel=1e-5)


def test_the_queries_asked_for_are_measured() -> None:
    model, asked = randomize(apply_focus(tiny_llama(), max_span=8, ramp=3)).eval(), torch.arange(IDS.shape[1]) > 20
    parts = [measure_attention(model, [IDS], queries=queries) for queries in (asked, ~asked, None)]
    share = asked.float().mean().item()
    for name in MEANINGS.keys() - {"bits_per_byte"}:
        one, other, whole = (part[name] for part in parts)
        assert share * one + (1 - share) * other == pytest.approx(whole), name
        assert one != other or name in ("attended", "rank_residual", "rank_residual_ratio"), name


def test_the_local_spread_is_against_all_that_the_global_branch_sees() -> None:
    model = randomize(apply_focus(tiny_llama(), max_span=8, ramp=3)).eval()
    last = torch.arange(IDS.shape[1]) == IDS.shape[1] - 1
    with record_focus(model) as records:
        model(IDS)
    entropy = torch.stack([records[layer][0].entropy[..., -1].mean() for layer in records]).mean()
    found = measure_attention(model, [IDS], queries=last)
    assert found["local_entropy_share"] == pytest.approx(entropy.item() / math.log(IDS.shape[1]), rel=1e-4)


def test_encoders_are_measured_too() -> None:
    assert measure_attention(tiny_bert_classifier(), [IDS])["entropy_share"] > 0


def test_a_hidden_number_is_found_by_a_model_that_copies_it() -> None:
    tokenizer = byte_tokenizer()

    class Copies(torch.nn.Module):
        """Predicts what followed the last time the same eight tokens came, as an induction head does."""

        def __init__(self, right: bool) -> None:
            super().__init__()
            self.right, self.weight = right, torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor) -> object:
            ids = input_ids[0].tolist()
            logits = torch.zeros(1, len(ids), 512)
            for place in range(8, len(ids)):
                tail = ids[place - 7 : place + 1]
                found = [i for i in range(7, place) if ids[i - 7 : i + 1] == tail]
                if found:
                    logits[0, place, ids[found[-1] + 1] if self.right else 0] = 1
            return type("Out", (), {"logits": logits})

    assert passkey_accuracy(Copies(True), tokenizer, [16, 200], examples=3) == {"passkey_200": 1.0}
    assert passkey_accuracy(Copies(False), tokenizer, [200], examples=3) == {"passkey_200": 0.0}


def test_rank_by_layer() -> None:
    model = tiny_llama()
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
    found, expected = measure_attention(model, [IDS]), [rank_residual(x).item() for x in hidden]
    by_layer = [found[f"rank_residual_layer_{layer}"] for layer in range(len(hidden) - 1)]
    assert [*by_layer, found["rank_residual"]] == pytest.approx(expected, rel=1e-4)


def test_bits_per_byte_are_those_of_the_loss() -> None:
    model, tokenizer = tiny_llama().train(), byte_tokenizer()
    texts = ["A short text.", "nïcödé", "x"]
    with torch.no_grad():
        losses = [model.eval()(**(e := tokenizer(text, return_tensors="pt")), labels=e["input_ids"]) for text in texts]
        model.train()
    # A token is a byte; of each text all but the first are predicted
    sizes = [len(text.encode()) - 1 for text in texts]
    bits = sum(out.loss.item() * size for out, size in zip(losses, sizes, strict=True) if size) / math.log(2)
    assert bits_per_byte(model, tokenizer, texts) == pytest.approx(bits / sum(sizes), rel=1e-5)
    assert model.training
    shorter = bits_per_byte(model, tokenizer, [text[:4] for text in texts[:1]])
    assert bits_per_byte(model, tokenizer, texts[:1], max_tokens=4) == pytest.approx(shorter, rel=1e-5)
    with pytest.raises(FocusDataError, match="at least one of two tokens"):
        bits_per_byte(model, tokenizer, ["x", ""])


def test_all_of_them_on_text() -> None:
    found = measure_claims(tiny_llama(), byte_tokenizer(), ["A short text.", "Another one."], max_tokens=32)
    assert found["rank_residual"] > 0
    assert found["bits_per_byte"] > 0
    assert all(meaning(name) for name in found)
    assert "512 tokens" in meaning("passkey_512")
    assert not any(name.startswith("passkey") for name in found)
