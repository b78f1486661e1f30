"""Tiny models with a FocusA that acts, their inspections, and the pages of those."""

from typing import Any

import pytest
from small_runs import SENTENCE, byte_tokenizer
from tiny import randomize
from transformers import PreTrainedModel

from hf_focus import FocusConfig, apply_focus
from hf_focus.inspection import Inspection, inspect_model

SETTINGS = FocusConfig(max_span=8, ramp=3, max_iterations=3, base_threshold=1e-3, refiner=True)


def acting(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    return randomize(apply_focus(model, SETTINGS, **settings)).eval()


def inspected(model: PreTrainedModel, *texts: str, **options: Any) -> Inspection:
    return inspect_model(model, byte_tokenizer(), texts or (SENTENCE,), **{"max_tokens": 48, **options})


def page(inspection: Inspection, source: str = "") -> str:
    pytest.importorskip("matplotlib")
    from hf_focus.inspection_page import render_page

    return render_page(inspection, source)
