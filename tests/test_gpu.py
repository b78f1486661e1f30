"""Whole models on a GPU: as the CPU computes them, in half precision, generating, and training."""

import copy
from pathlib import Path

import pytest
import torch
from small_runs import run, tiny_llama
from tiny import logits, randomize
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from hf_focus import FocusConfig, apply_focus, record_focus

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
FOCUS = FocusConfig(max_span=64, ramp=8, max_iterations=3, refiner=True)


def plain(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, num_key_value_heads=2, max_position_embeddings=2048, **sizes)
    # Not cast afterwards: that would round the rotary frequencies too
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().cuda()


def patched(dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    return randomize(apply_focus(plain(dtype), FocusConfig.build(FOCUS, **changes)), std=0.1)


def tokens(batch: int = 2, length: int = 300) -> torch.Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(5)).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_patching_changes_nothing(dtype: torch.dtype) -> None:
    model, ids = plain(dtype), tokens()
    before = logits(model, input_ids=ids)
    apply_focus(model, FOCUS)
    assert all(p.is_cuda for p in model.parameters())
    assert torch.equal(logits(model, input_ids=ids), before)


@pytest.mark.parametrize("max_dist", [None, 100])
def test_equals_the_cpu(max_dist: int | None) -> None:
    # The refiner's bins turn rounding into jumps
    model, ids = patched(refiner=False, max_dist=max_dist), tokens()
    on_gpu = logits(model, input_ids=ids).cpu()
    on_cpu = logits(copy.deepcopy(model).cpu(), input_ids=ids.cpu())
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("max_dist", [None, 100])
def test_generates_what_a_forward_pass_predicts(max_dist: int | None) -> None:
    model, ids = patched(refiner=False, max_dist=max_dist), tokens(length=150)
    text = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    predicted = logits(model, input_ids=text)[:, 149:-1]
    chosen = predicted.gather(-1, text[:, 150:, None])[..., 0]
    torch.testing.assert_close(chosen, predicted.max(-1).values, rtol=0, atol=1e-3)


def test_compiled_with_a_static_cache() -> None:
    model, ids = patched(), tokens(length=40)
    results = []
    for compile_it in (False, True):
        cache = StaticCache(config=model.config, max_cache_len=64)
        step = torch.compile(model.forward, fullgraph=True) if compile_it else model.forward
        with torch.no_grad():
            found = [model(input_ids=ids, past_key_values=cache).logits[:, -1:]]
            for token in range(4):
                found.append(step(input_ids=ids[:, token : token + 1], past_key_values=cache).logits)
        results.append(torch.cat(found, dim=1))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains(dtype: torch.dtype, checkpointing: bool) -> None:
    model, ids = patched().train(), tokens()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.amp.GradScaler()
    losses = []
    for _ in range(12):
        with torch.autocast("cuda", dtype):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(int(b) > 0 for name, b in model.named_buffers() if name.endswith("refiner.num_updates"))


def test_gradients_equal_the_cpu() -> None:
    model, ids = patched(refiner=False).train(), tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    other = copy.deepcopy(model).cpu()
    other.zero_grad()
    other(input_ids=ids.cpu(), labels=ids.cpu()).loss.backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (one.grad.cpu() - two.grad).norm() <= 1e-3 * two.grad.norm() + 1e-6, name


def test_saves_and_records(tmp_path: Path) -> None:
    model, ids = patched(torch.bfloat16), tokens()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, device_map={"": 0}).eval()
    assert torch.equal(logits(loaded, input_ids=ids), logits(model, input_ids=ids))
    with record_focus(loaded) as records:
        logits(loaded, input_ids=ids)
    assert all(call.span.shape == (2, 4, 300) for layer in records for call in records[layer])


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_fine_tunes(precision: str, tmp_path: Path, data: dict[str, list[str]]) -> None:
    result = run(tmp_path, data, tiny_llama(), cpu=False, mixed_precision=precision, max_steps=10)
    losses = [line["loss"] for line in result.log if "loss" in line]
    assert losses[-1] < losses[0]
    assert result.metrics["loss"] < losses[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.focus_config.max_span == 8
