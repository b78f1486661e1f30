"""Training of adapters: gradients, the Trainer, and how many weights are trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import TINY, logits, make_inputs, tokens
from tiny_adapters import ADAPTER, adapted, config, is_equal, weights
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_focus import FocusAdapterConfig


def gradients_of(model: PeftModel, checkpointing: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    torch.manual_seed(0)
    model(**make_inputs("llama"), labels=tokens()).loss.backward()
    found = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    return found | {key: value for key, value in model.state_dict().items() if ".refiner." in key}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient_and_updates_the_refiner_once(use_reentrant: bool) -> None:
    # Exploration would meet other random numbers
    quiet = config(epsilon=0)
    expected = gradients_of(adapted("llama", quiet), None)
    found = gradients_of(adapted("llama", quiet), {"use_reentrant": use_reentrant})
    assert {key for key, value in found.items() if key.endswith("num_updates") and value.item() != 1} == set()
    for key, value in expected.items():
        assert value is not None, key
        assert torch.allclose(found[key], value, atol=1e-6), key
    assert all(value.any() for key, value in found.items() if not key.endswith("table"))


def test_trainer_saves_the_adapter_only(tmp_path: Path) -> None:
    base = TINY["llama"].build()
    before = weights(base)
    model = get_peft_model(base, config())
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        assert (folder / ADAPTER).exists()
        assert not (folder / "model.safetensors").exists()
        assert all(".focus." in key for key in load_file(folder / ADAPTER))
    assert is_equal(weights(base), before)
    saved = load_file(tmp_path / "final" / ADAPTER)
    # In the first step the local output is silent: nothing depends on it, and it teaches nothing
    assert {saved[key].item() for key in saved if key.endswith("num_updates")} == {2}
    assert all(saved[key].any() for key in saved if key.endswith("join"))
    loaded = PeftModel.from_pretrained(TINY["llama"].build(), tmp_path / "final")
    assert torch.equal(logits(loaded, **make_inputs("llama")), logits(model.eval(), **make_inputs("llama")))

    again = get_peft_model(TINY["llama"].build(), config())
    resumed = Trainer(model=again, args=arguments, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(value.item() == 2 for key, value in again.state_dict().items() if key.endswith("num_updates"))


def test_counts_what_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted("llama")
    ours = sum(parameter.numel() for key, parameter in model.named_parameters() if ".focus." in key)
    model.print_trainable_parameters()
    assert f"trainable params: {ours:,}" in capsys.readouterr().out


def test_is_at_most_a_hundredth_of_a_one_billion_llama() -> None:
    shape = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(shape)
    base.tie_weights()
    size = base.num_parameters()
    assert 1.2e9 < size < 1.3e9
    trainable, total = get_peft_model(base, FocusAdapterConfig()).get_nb_trainable_parameters()
    assert total == size + trainable
    assert 0 < trainable <= 0.01 * size
