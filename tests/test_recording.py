"""`record_focus`: what it records, of whom, and that it ends."""

import threading

import pytest
import torch
from helpers import fill
from tiny import SETTINGS, TINY, patched, tokens
from torch import Tensor, nn

from hf_focus import FocusA, FocusConfig, FocusRecord, record_focus
from hf_focus.errors import FocusError, NotPatchedError
from hf_focus.observers import is_observed

DIMS, HEADS, LENGTH = 16, 4, 12


class Pair(nn.Module):
    """Two layers, the first one called twice."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.first = FocusA(DIMS, HEADS, max_span=6, ramp=3, **settings)
        self.second = FocusA(DIMS, HEADS, max_span=6, ramp=3, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.first(x)))


def pair(**settings: object) -> Pair:
    return fill(Pair(**settings)).eval()


def sequence(batch: int = 2) -> Tensor:
    return torch.randn(batch, LENGTH, DIMS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("refiner", [True, False])
def test_shapes_and_values(per_head: bool, refiner: bool) -> None:
    model = pair(per_head_span=per_head, refiner=refiner, max_iterations=3)
    with record_focus(model) as records:
        model(sequence())
    assert list(records) == ["first", "second"]
    assert len(records) == 2
    assert [len(records[name]) for name in records] == [2, 1]
    for record in (*records["first"], *records["second"]):
        assert isinstance(record, FocusRecord)
        shared = (2, HEADS if per_head else 1, LENGTH)
        assert record.span.shape == record.span_fraction.shape == shared
        assert record.entropy.shape == record.coverage.shape == record.iterations.shape == (2, HEADS, LENGTH)
        assert record.valid.shape in ((2, LENGTH), (1, LENGTH))
        torch.testing.assert_close(record.span, 6 * record.span_fraction)
        assert ((record.span_fraction >= 0) & (record.span_fraction <= 1)).all()
        assert ((record.entropy >= 0) & (record.entropy <= torch.tensor(LENGTH).log())).all()
        assert ((record.coverage > 0) & (record.coverage <= 1)).all()
        assert ((record.iterations >= 1) & (record.iterations <= 3)).all()
        assert record.valid.all()
        if refiner:
            assert record.action.shape == shared
            assert ((record.action >= 0) & (record.action < 10)).all()
        else:
            assert record.action is None
        assert not any(x.requires_grad for x in vars(record).values() if x is not None)


def test_padding_is_not_valid() -> None:
    model = nn.Sequential(pair().first)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, :4] = False
    with record_focus(model) as records:
        model[0](sequence(), mask)
    assert torch.equal(records["0"][0].valid, mask)


def test_names_of_a_model() -> None:
    model = patched("llama", FocusConfig(max_span=7, ramp=3, layers=[1]))
    heads = TINY["llama"].sizes["num_attention_heads"]
    with record_focus(model) as records:
        model(input_ids=tokens(2, 9))
    assert list(records) == ["model.layers.1.self_attn"]
    assert records["model.layers.1.self_attn"][0].span.shape == (2, heads, 9)
    with pytest.raises(KeyError):
        records["model.layers.0.self_attn"]


def test_recording_changes_nothing() -> None:
    model, x = pair(), sequence()
    before = model(x)
    with record_focus(model):
        assert torch.equal(model(x), before)


def test_it_ends() -> None:
    model = pair()
    with record_focus(model) as records:
        assert is_observed()
        model(sequence())
    assert not is_observed()
    model(sequence())
    assert len(records["first"]) == 2
    with record_focus(model) as again:
        pass
    assert [len(again[name]) for name in again] == [0, 0]


def test_it_ends_after_an_error() -> None:
    model = pair()
    handle = model.second.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), record_focus(model) as records:
        model(sequence())
    assert not is_observed()
    handle.remove()
    model(sequence())
    assert len(records["second"]) == 1


def test_nested() -> None:
    """Of the same model, of a part of it, and of another one."""
    model, other = pair(), pair()
    with record_focus(model) as outer:
        model(sequence())
        with record_focus(model) as inner, record_focus(other) as others:
            model(sequence())
            other(sequence())
        with pytest.raises(RuntimeError, match="stop"), record_focus(model):
            raise RuntimeError("stop")
        with record_focus(nn.ModuleList([model.second])) as part:
            model(sequence())
    assert {name: len(calls) for name, calls in outer.layers.items()} == {"first": 6, "second": 3}
    assert {name: len(calls) for name, calls in inner.layers.items()} == {"first": 2, "second": 1}
    assert {name: len(calls) for name, calls in others.layers.items()} == {"first": 2, "second": 1}
    assert {name: len(calls) for name, calls in part.layers.items()} == {"0": 1}
    assert torch.equal(outer["second"][1].span, inner["second"][0].span)


def test_threads_do_not_see_each_other() -> None:
    """One records two calls; one records one of another batch; one calls the same model and records nothing."""
    model, seen, barrier = pair(), {}, threading.Barrier(3, timeout=30)

    def work(name: str, batch: int, calls: int, records: bool) -> None:
        barrier.wait()
        if not records:
            model(sequence(batch))
            seen[name] = is_observed()
            barrier.wait()
            return
        with record_focus(model) as kept:
            for _ in range(calls):
                model(sequence(batch))
            # All three are inside at once
            barrier.wait()
        seen[name] = [record.span.shape[0] for record in kept["second"]]

    jobs = [("two", 2, 2, True), ("one", 3, 1, True), ("none", 1, 1, False)]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert seen == {"two": [2, 2], "one": [3], "none": False}
    assert not is_observed()


@pytest.mark.parametrize("model", [nn.Linear(2, 2), TINY["llama"].build()], ids=["module", "model"])
def test_unpatched_models(model: nn.Module) -> None:
    with pytest.raises(NotPatchedError, match=r"`model` got .*; accepted: ") as error, record_focus(model):
        pass
    assert type(model).__name__ in str(error.value)
    assert isinstance(error.value, FocusError)
    assert not is_observed()


@pytest.mark.parametrize("where", ["within", "after", "in a thread"])
def test_checkpointed_layers_are_computed_again_unobserved(where: str) -> None:
    """A GPU's backward runs in a thread of its own, where nobody observes."""
    model, ids = patched("llama", FocusConfig.build(SETTINGS, refiner=False)).train(), tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    failed: list[Exception] = []

    def backward() -> None:
        try:
            loss.backward()
        except Exception as error:
            failed.append(error)

    with record_focus(model) as records:
        loss = model(input_ids=ids, labels=ids).loss
        if where == "within":
            backward()
        elif where == "in a thread":
            thread = threading.Thread(target=backward)
            thread.start()
            thread.join()
    if where == "after":
        backward()
    assert not failed
    assert not any(record.span.requires_grad for layer in records for record in records[layer])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)
