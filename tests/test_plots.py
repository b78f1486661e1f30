"""Pictures: that they are drawn, and that what they show is what was recorded."""

from pathlib import Path

import torch
from tiny import patched, tokens

from hf_focus import record_focus
from hf_focus.plots import mean_spans, plot_run


def test_mean_spans_leave_padding_out() -> None:
    model, ids = patched("llama"), tokens(1, 10)
    mask = torch.ones(1, 14, dtype=torch.long)
    mask[:, :4] = 0
    padded = torch.nn.functional.pad(ids, (4, 0))
    spans = []
    for inputs in (
        {"input_ids": ids},
        {"input_ids": padded, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)},
    ):
        with record_focus(model) as records, torch.no_grad():
            model(**inputs)
        spans.append(mean_spans(records))
    assert list(spans[0]) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for layer, values in spans[0].items():
        assert values.shape == (4,)
        torch.testing.assert_close(values, spans[1][layer], rtol=1e-4, atol=1e-4)


def test_plot_run(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 2, "eval_loss": 2.5}]
    spans = {"0": torch.tensor([1.0, 2.0]), "1": torch.tensor([3.0, 4.0])}
    plot_run(tmp_path / "run.png", {"with": lines, "without": lines[:2]}, spans)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
