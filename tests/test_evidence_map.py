"""The map: a tokenizer of bytes, attention after each iteration, and the page."""

from dataclasses import replace
from pathlib import Path

import torch

from hf_focus import record_focus
from hf_focus.evidence_map import ROW, byte_tokenizer, iteration_weights, moved, write_map
from hf_focus.evidence_report import report
from hf_focus.evidence_train import train

SMALL = replace(ROW, settings={"length": 16, "megabytes": 0.1}, sizes={"width": 16}, steps=2, batch=2, examples=4)


def test_ids_are_bytes() -> None:
    text = "def ö():\n\treturn '€' # ~"
    tokenizer = byte_tokenizer()
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_attention_after_each_iteration_sums_to_one_and_stays_once_a_query_stops() -> None:
    model = train(SMALL)[0]
    ids = torch.tensor([list(b"import os, sys")])
    found = iteration_weights(model, ids)
    assert list(found) == ["model.layers.0.self_attn"]
    weights = found["model.layers.0.self_attn"]
    assert weights.shape == (4, 2, 14, 14)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, 14))
    with record_focus(model.eval()) as records:
        model(input_ids=ids)
    made = records["model.layers.0.self_attn"][0].iterations[0]
    # The first token sees itself alone, and stops as soon as it has seen that nothing changes
    assert made[:, 0].max() < 4
    assert torch.equal(weights[made[0, 0] - 1, 0, 0], weights[3, 0, 0])


def test_the_page_has_its_pictures(tmp_path: Path) -> None:
    page = write_map(tmp_path, SMALL).read_text()
    for name in ("spans", "entropy", "iterations", "refiner", "attention"):
        assert f"(map-{name}.png)" in page
        assert 1000 < (tmp_path / f"map-{name}.png").stat().st_size < 150_000
    assert "| model.layers.0.self_attn | 2 |" in page
    assert "\n### Attention after each iteration\n" in report(tmp_path / "results")


def test_what_moves_is_the_weight_that_is_elsewhere() -> None:
    first, last = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])
    weights = torch.stack([first, first, last])[:, None]
    assert moved(weights).tolist() == [0.75]
