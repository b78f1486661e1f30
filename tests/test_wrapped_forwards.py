"""Models whose forward something else has wrapped, or that are built in other ways than by a plain constructor."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from small_runs import tiny_llama
from tiny import randomize
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM, PreTrainedModel

from hf_focus import FocusConfig, apply_focus, record_focus, remove_focus

SETTINGS = FocusConfig(max_span=8, ramp=4, max_iterations=3)
IDS = torch.arange(10, 26)[None]


def tiny_gptj() -> GPTJForCausalLM:
    """Its attention does not go through transformers' interface."""
    torch.manual_seed(0)
    return GPTJForCausalLM(GPTJConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64))


def with_hooks(model: nn.Module) -> nn.Module:
    """As `device_map` leaves a model that is spread over devices."""
    for module in list(model.modules()):
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    return model


@pytest.mark.parametrize("build", [tiny_llama, tiny_gptj])
def test_hooks_of_accelerate_see_the_patch_and_its_removal(build: Callable[[], PreTrainedModel]) -> None:
    model, alone = with_hooks(build().eval()), randomize(apply_focus(build().eval(), SETTINGS))
    before = model(IDS).logits
    apply_focus(model, SETTINGS)
    assert torch.equal(model(IDS).logits, before)
    randomize(model)
    with record_focus(model) as records:
        assert torch.equal(model(IDS).logits, alone(IDS).logits)
    assert [len(records[layer]) for layer in records] == [1, 1]
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".focus." in n)
    remove_focus(model)
    assert torch.equal(model(IDS).logits, before)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(IDS).logits, before)


def test_hooks_of_accelerate_see_the_span_penalty() -> None:
    model = with_hooks(tiny_llama()).train()
    plain = model(IDS, labels=IDS).loss
    apply_focus(model, SETTINGS, span_penalty=0.5)
    assert model(IDS, labels=IDS).loss > plain


def test_a_model_that_mixed_precision_wraps_works_after_removal() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    model = apply_focus(tiny_llama().eval(), SETTINGS)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    before = prepared(IDS).logits
    remove_focus(model)
    assert torch.equal(prepared(IDS).logits, before)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_an_empty_model_is_filled_by_accelerate(tmp_path: Path) -> None:
    model = randomize(apply_focus(tiny_llama(), SETTINGS, refiner=True)).eval()
    model.save_pretrained(tmp_path)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    empty.tie_weights()
    loaded = load_checkpoint_and_dispatch(empty, str(tmp_path), device_map={"": "cpu"}).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.train()(IDS, labels=IDS).loss.backward()
    loaded.eval()
    assert loaded.model.layers[0].self_attn.focus.refiner.num_updates.item() == (
        model.model.layers[0].self_attn.focus.refiner.num_updates.item() + 1
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_refiner_learns_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = randomize(apply_focus(tiny_llama().eval(), SETTINGS, refiner=True))
        model.train()(IDS, labels=IDS).loss.backward()
        model.eval()
    finally:
        torch.set_default_dtype(before)
    refiner = model.model.layers[0].self_attn.focus.refiner
    assert (refiner.table.dtype, refiner.num_updates.item()) == (torch.float32, 1)
