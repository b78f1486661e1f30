"""Which evaluation was the best, and when to stop because none gets better."""

from dataclasses import dataclass

from .errors import FocusConfigError, bad_value

# Better when smaller; every other metric is better when greater
SMALLER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "wer")


@dataclass
class Best:
    """The best evaluation so far.

    metric: its value; None before the first. step: when it was. waited: evaluations since that were not better.
    """

    metric: float | None = None
    step: int = 0
    waited: int = 0

    def judge(self, step: int, value: float, greater_is_better: bool, threshold: float = 0.0) -> bool:
        """Whether `value` is better than the best by more than `threshold`; it is the best then."""
        gain = 0.0 if self.metric is None else (value - self.metric) * (1 if greater_is_better else -1)
        # NaN is never better
        better = value == value and (self.metric is None or gain > threshold)
        if better:
            self.metric, self.step, self.waited = value, step, 0
        else:
            self.waited += 1
        return better


def is_greater_better(metric: str, asked: bool | None) -> bool:
    """As asked for, or else by the metric, named with or without `eval_`."""
    return metric.removeprefix("eval_") not in SMALLER_IS_BETTER if asked is None else asked


def find_metric(name: str, reported: tuple[str, ...]) -> str:
    """The metric's name as in the results of an evaluation, from its name with or without `eval_`.

    Raises:
        FocusConfigError: the task does not report it.
    """
    metric = name.removeprefix("eval_")
    if metric not in reported:
        raise FocusConfigError(bad_value("metric_for_best_model", name, "one of " + ", ".join(reported)))
    return metric
