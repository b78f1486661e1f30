"""Weights sharded by `fully_shard`, on two real processes (gloo)."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import finish, fork
from small_runs import FOCUS, tiny_llama
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from hf_focus import apply_focus

STEPS = 5


def build() -> nn.Module:
    torch.manual_seed(0)
    return apply_focus(tiny_llama(), FOCUS).train()


def train(model: nn.Module, parts: list[int], scale: float) -> list[float]:
    """SGD; each step's batch is in two halves, of which `parts` are this process's. Returns this process's losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(STEPS):
        for part in parts:
            torch.manual_seed(2 * step + part)
            ids = torch.randint(10, 200, (2, 16), generator=torch.Generator().manual_seed(2 * step + part))
            loss = model(input_ids=ids, labels=ids).loss
            (loss * scale).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def shard_and_train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = build()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    losses = train(model, [rank], 1.0)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    torch.save(
        {"losses": losses, "buffers": {key: value for key, value in model.named_buffers() if ".refiner." in key}},
        f"{folder}/{rank}.pt",
    )
    if rank == 0:
        model.save_pretrained(f"{folder}/saved", state_dict=whole)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def test_sharded_equals_one_process_and_saves_to_one_checkpoint(tmp_path: Path) -> None:
    processes = [fork(shard_and_train, rank, str(tmp_path)) for rank in range(2)]
    model = build()
    losses = train(model, [0, 1], 0.5)
    assert finish(processes) == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert [loss for pair in zip(one["losses"], other["losses"], strict=True) for loss in pair] == pytest.approx(
        losses, abs=1e-5
    )
    assert all(torch.equal(value, other["buffers"][key]) for key, value in one["buffers"].items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    state = loaded.state_dict()
    expected = model.eval().state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-5, msg=key)
    assert any(value.any() for key, value in state.items() if key.endswith("refiner.table"))
