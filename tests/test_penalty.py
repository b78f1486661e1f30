"""The span penalty in the loss of a model, in all the ways models are trained."""

from typing import Any

import pytest
import torch
import transformers
from test_architectures import no_dropout
from tiny import SETTINGS, TINY, make_inputs, patched, randomize, tokens
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_focus import FocusConfig, apply_focus, record_focus
from hf_focus.errors import FocusConfigError
from hf_focus.penalty import note_mean_span, with_span_penalty

WEIGHT = 50.0


def model_with(weight: float, name: str = "llama", **settings: Any) -> PreTrainedModel:
    # No refiner: its random actions would move the span
    return no_dropout(patched(name, FocusConfig.build(SETTINGS, span_penalty=weight, refiner=False, **settings)))


def bias_gradients(model: PreTrainedModel, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradient of every predictor's bias."""
    loss = model(**inputs).loss
    loss.backward()
    biases = [p.grad for key, p in model.named_parameters() if key.endswith("predictor.bias")]
    return loss.detach(), torch.stack(biases)


def test_the_penalty_is_the_mean_span() -> None:
    model, ids = model_with(WEIGHT), tokens()
    with record_focus(model) as records:
        loss = model(input_ids=ids, labels=ids).loss
    spans = torch.stack([calls[0].span_fraction.mean() for calls in records.layers.values()])
    plain = model_with(0.0)(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss - plain, WEIGHT * spans.mean())


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "whisper"])
def test_gradient_checkpointing_keeps_it(name: str) -> None:
    inputs = make_inputs(name)
    inputs["labels"] = inputs.pop("decoder_input_ids", inputs.get("input_ids"))
    results = []
    for checkpointing in (False, True):
        model = model_with(WEIGHT, name)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(bias_gradients(model, **inputs))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)
    assert (results[0][1].abs() > 0.01).all()


def test_reentrant_checkpointing_is_refused() -> None:
    model, ids = model_with(WEIGHT), tokens()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(FocusConfigError, match=r"`span_penalty` got .*use_reentrant=False"):
        model(input_ids=ids, labels=ids)


def test_question_answering() -> None:
    results = []
    for weight in (0.0, WEIGHT):
        torch.manual_seed(0)
        config = TINY["bert"].build_config()
        model = transformers.BertForQuestionAnswering(config)
        apply_focus(model, FocusConfig.build(SETTINGS, span_penalty=weight, refiner=False, initial_span=0.5))
        start = torch.tensor([1, 2])
        results.append(
            bias_gradients(no_dropout(model), input_ids=tokens(), start_positions=start, end_positions=start + 3)
        )
    assert results[1][0] > results[0][0] + 1
    assert (results[1][1].abs() > 0.01).all()


@pytest.mark.parametrize("how", ["positional", "tuple"])
def test_other_ways_to_call(how: str) -> None:
    model, ids = model_with(WEIGHT), tokens()
    expected = model(input_ids=ids, labels=ids).loss
    if how == "tuple":
        loss = model(input_ids=ids, labels=ids, return_dict=False)[0]
    else:
        loss = model(ids, None, None, None, None, ids).loss
    torch.testing.assert_close(loss, expected)


def test_nothing_to_add_it_to_is_an_error() -> None:
    model, ids = model_with(WEIGHT), tokens()
    with pytest.raises(FocusConfigError, match="accepted: 0 where the model returns no loss"):
        model(input_ids=ids)
    with torch.no_grad():
        model(input_ids=ids)
    model.eval()(input_ids=ids)


def test_compiled_models_refuse_it() -> None:
    model, ids = model_with(WEIGHT), tokens()
    with pytest.raises(Exception, match=r"0 under torch\.compile"):
        torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids, labels=ids)


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
def test_trainer_divides_it_as_it_divides_the_loss(batch: int, accumulation: int, tmp_path: Any) -> None:
    model, rows = model_with(1000.0), tokens(8)
    before = {key: p.detach().clone() for key, p in model.named_parameters() if key.endswith("predictor.bias")}
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        optim="sgd",
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, args, train_dataset=data).train()
    moved = torch.stack([p.detach() - before[key] for key, p in model.named_parameters() if key in before])
    expected = model_with(1000.0)
    _, gradient = bias_gradients(expected, input_ids=rows, labels=rows)
    torch.testing.assert_close(moved, -1e-3 * gradient, rtol=1e-3, atol=1e-4)


def penalized(weight: float, **settings: Any) -> PreTrainedModel:
    settings = {"max_span": 8, "ramp": 4, "max_iterations": 2, "refiner": False, **settings}
    return randomize(apply_focus(TINY["llama"].build(), FocusConfig(span_penalty=weight, **settings))).train()


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("padded", [0, 6])
@pytest.mark.parametrize("return_dict", [True, False])
def test_span_penalty(per_head: bool, padded: int, return_dict: bool) -> None:
    """The loss holds the weight times the mean span of tokens, as a share of the longest."""
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :padded] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids, "return_dict": return_dict}
    plain = penalized(0.0, per_head_span=per_head)
    with record_focus(plain) as records:
        loss = plain(**inputs)[0]
    assert len(records) == 2
    shares = [calls[0].span_fraction.transpose(1, 2)[mask.bool()].mean() for calls in records.layers.values()]
    model = penalized(0.7, per_head_span=per_head)
    torch.testing.assert_close(model(**inputs)[0], loss + 0.7 * sum(shares) / 2)
    # Of training only
    model.eval()
    torch.testing.assert_close(model(**inputs)[0], loss)


def test_span_penalty_shortens_the_span() -> None:
    ids = tokens(2, 20)
    spans = {}
    for weight in (0.0, 3.0):
        model = penalized(weight)
        predictors = [parameter for name, parameter in model.named_parameters() if ".predictor." in name]
        optimizer = torch.optim.SGD(predictors, lr=2.0)
        for _ in range(10):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        with record_focus(model) as records, torch.no_grad():
            model(input_ids=ids)
        spans[weight] = torch.stack([calls[0].span_fraction.mean() for calls in records.layers.values()])
    assert (spans[3.0] < spans[0.0] - 0.2).all()


def test_layers_on_several_devices() -> None:
    """As `device_map` places them; a meta tensor stands for one on another device."""

    class Model:
        training, config = True, type("Config", (), {"focus_config": {"span_penalty": 1.0}})

        def forward(self) -> dict[str, torch.Tensor]:
            for device in ("meta", "cpu"):
                span = torch.full((1, 1, 3), 0.5, device=device, requires_grad=True)
                note_mean_span(span, torch.ones(1, 3, dtype=torch.bool, device=device), True)
            return {"loss": torch.ones((), device="meta")}

    assert with_span_penalty(Model.forward)(Model())["loss"].is_meta
