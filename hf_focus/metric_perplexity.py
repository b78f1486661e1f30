"""Perplexity and bits per byte, from sums over examples: an `evaluate` module."""

import math

import datasets
import evaluate

DESCRIPTION = "Loss (nats per token), perplexity and bits per byte of text that a language model was scored on."
INPUTS = """
Args:
    predictions: negative log likelihood of each example, in nats, summed over its predicted tokens.
    tokens: predicted tokens of each example.
    bytes: UTF-8 bytes of the text that these tokens spell; all 0 where that is not known.
Returns:
    loss: nats per token. perplexity: exp(loss). bits_per_byte: total bits / total bytes, left out without bytes.
"""
CITATION = ""


class Perplexity(evaluate.Metric):
    """Exact over any batching: totals are divided, never averages averaged."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "tokens": datasets.Value("int64"),
                    "bytes": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: list[float], tokens: list[int], bytes: list[int]) -> dict[str, float]:
        total = math.fsum(predictions)
        loss = total / sum(tokens)
        # Above this, exp overflows
        results = {"loss": loss, "perplexity": math.inf if loss > 709 else math.exp(loss)}
        if sum(bytes):
            results["bits_per_byte"] = total / math.log(2) / sum(bytes)
        return results
