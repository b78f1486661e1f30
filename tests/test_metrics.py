"""Metrics: against numbers worked out by hand, and against a plain loop over the model's own probabilities."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import FOCUS, byte_tokenizer, source, texts, tiny_bert_classifier, tiny_llama
from torch.utils.data import DataLoader

from hf_focus import apply_focus
from hf_focus.arguments import DataArguments
from hf_focus.collators import ReproducibleCollator
from hf_focus.errors import FocusConfigError
from hf_focus.evaluation import evaluate_model
from hf_focus.metrics import METRICS, load_metric
from hf_focus.tasks import find_task

QUICK = settings(max_examples=10, deadline=None)


def evaluate(
    model: torch.nn.Module, task: str, rows: Dataset, batch_size: int = 3, size: int = 12
) -> dict[str, float]:
    task, of, args = find_task(task), source(), DataArguments()
    encoded = task.encode(rows, None, of, args, size).train
    accelerator = Accelerator(cpu=True)
    collator = ReproducibleCollator(task.collator(of, args), task.count_targets)
    model, loader = accelerator.prepare(model, DataLoader(encoded, batch_size, collate_fn=collator))
    return evaluate_model(accelerator, model, loader, task, of)


@QUICK
@given(
    examples=st.lists(
        st.tuples(st.floats(0.1, 100), st.integers(1, 50), st.integers(0, 200)), min_size=1, max_size=12
    ),
    cut=st.integers(0, 12),
)
def test_perplexity_and_bits_per_byte_by_hand(examples: list[tuple[float, int, int]], cut: int) -> None:
    metric = load_metric("perplexity")
    for part in (examples[:cut], examples[cut:]):
        if part:
            nll, tokens, num_bytes = zip(*part, strict=True)
            metric.add_batch(predictions=list(nll), tokens=list(tokens), bytes=list(num_bytes))
    result = metric.compute()
    nll, tokens, num_bytes = (sum(column) for column in zip(*examples, strict=True))
    assert result["loss"] == pytest.approx(nll / tokens, rel=1e-12)
    assert result["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-9)
    if num_bytes:
        assert result["bits_per_byte"] == pytest.approx(nll / 0.6931471805599453 / num_bytes, rel=1e-12)
    else:
        assert "bits_per_byte" not in result


def test_accuracy_and_perplexity_beyond_floats() -> None:
    accuracy = load_metric("accuracy")
    accuracy.add_batch(predictions=[1, 2, 3], references=[1, 0, 3])
    accuracy.add_batch(predictions=[4], references=[5])
    assert accuracy.compute() == {"accuracy": 0.5}
    perplexity = load_metric("perplexity")
    assert perplexity.compute(predictions=[1e6], tokens=[1], bytes=[1])["perplexity"] == math.inf
    with pytest.raises(FocusConfigError, match=METRICS[0]):
        load_metric("bleu")


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary() -> None:
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    documents = texts(5)
    result = evaluate(model, "causal-lm", Dataset.from_dict({"text": documents}))
    num_bytes = sum(len(text.encode()) for text in documents)
    # A token for each byte, and one for the end of each document
    tokens = num_bytes + len(documents)
    assert result["perplexity"] == pytest.approx(model.config.vocab_size, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(tokens * math.log2(model.config.vocab_size) / num_bytes, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_equals_a_loop_over_the_blocks(batch_size: int) -> None:
    model = apply_focus(tiny_llama(), FOCUS)
    documents, tokenizer, size = texts(4), byte_tokenizer(), 12
    result = evaluate(model, "causal-lm", Dataset.from_dict({"text": documents}), batch_size, size)
    eos = tokenizer.eos_token_id
    stream = [eos]
    for text in documents:
        stream += [*tokenizer(text)["input_ids"], eos]
    nll, correct = 0.0, 0
    model.eval()
    for start in range(0, len(stream) - 1, size - 1):
        block = torch.tensor([stream[start : start + size]])
        with torch.no_grad():
            log_probs = model(block).logits[0, :-1].double().log_softmax(-1)
        nll -= log_probs.gather(1, block[0, 1:, None]).sum().item()
        correct += (log_probs.argmax(-1) == block[0, 1:]).sum().item()
    tokens, num_bytes = len(stream) - 1, sum(len(text.encode()) for text in documents)
    assert result["loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-5)
    assert result["accuracy"] == pytest.approx(correct / tokens, abs=1e-9)
    assert 1 <= result["focus_iterations"] <= FOCUS.max_iterations
    assert 0 < result["focus_span"] <= FOCUS.max_span


def test_classification_counts_each_text_once() -> None:
    model = tiny_bert_classifier().eval()
    rows = Dataset.from_dict({"text": texts(7), "label": [0, 1, 1, 0, 1, 0, 0]})
    result = evaluate(model, "sequence-classification", rows, size=64)
    tokenizer = byte_tokenizer()
    with torch.no_grad():
        right = [
            model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() == label
            for text, label in zip(rows["text"], rows["label"], strict=True)
        ]
    assert result["accuracy"] == pytest.approx(sum(right) / 7)
    assert set(result) == {"loss", "accuracy"}


def test_evaluation_leaves_the_model_as_it_was() -> None:
    model = apply_focus(tiny_llama(), FOCUS).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, "causal-lm", Dataset.from_dict({"text": texts(2)}))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_metrics_lie_beside_the_library() -> None:
    import hf_focus

    for name in METRICS:
        assert (Path(hf_focus.__file__).parent / f"metric_{name}.py").is_file()
