"""Settings of the whole suite."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bare import Bare, serve

# Read once, when triton is imported: without a GPU its kernels run interpreted, on CPU tensors
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Two cores are shared by the suite's processes; each with all threads is slower than one thread each
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Prepared data sets of a test run are of no use to anybody afterwards
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="hf_focus-datasets-"))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate fixes the precision of a process once; what one test's Trainer chose must not bind the next test."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    """New processes that have not imported hf_focus."""
    with serve(tmp_path_factory.mktemp("bare")) as served:
        yield served


@pytest.fixture
def data(tmp_path: Path) -> dict[str, list[str]]:
    """Files to fine-tune on, as `small_runs.write_data` makes them."""
    from small_runs import write_data

    return write_data(tmp_path)
