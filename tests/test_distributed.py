"""A patched model under DistributedDataParallel, on two real processes (gloo)."""

from pathlib import Path

import torch
import torch.distributed as dist
from launch import finish, fork
from test_architectures import no_dropout
from tiny import patched, tokens
from torch.nn.parallel import DistributedDataParallel

STEPS = 3


def train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = no_dropout(patched("llama"))
    # Default settings: an unused parameter is an error
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for step in range(STEPS):
        ids = tokens(2, seed=10 * step + rank)
        parallel(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_stay_equal(tmp_path: Path) -> None:
    assert finish([fork(train, rank, str(tmp_path)) for rank in range(2)]) == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    start = patched("llama").state_dict()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
        if key.endswith("num_updates"):
            assert value.item() == STEPS
        if key.endswith("refiner.table"):
            assert not torch.equal(value, start[key])
