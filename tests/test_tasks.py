"""Tasks beyond running text: each trains through the public API, is saved, and is scored as its field does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import SIZES, WORDS, byte_tokenizer, run, source, task_tokenizer, tiny_llama
from tiny import TINY
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    AutoProcessor,
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    PreTrainedModel,
    RobertaConfig,
    WhisperFeatureExtractor,
)

from hf_focus.arguments import DataArguments, ModelArguments
from hf_focus.errors import FocusConfigError, FocusDataError, UnsupportedArchitectureError
from hf_focus.metric_entities import find_entities
from hf_focus.metric_wer import edit_distance
from hf_focus.metrics import load_metric
from hf_focus.preparation import find_source
from hf_focus.scoring import evaluate_saved
from hf_focus.task_spans import MAX_ANSWER, best_spans
from hf_focus.tasks import find_task

QUICK = settings(max_examples=25, deadline=None)
RATE = 8000
TAGS = ["O", "B-ANIMAL", "I-ANIMAL"]


def tagged(i: int) -> dict[str, list[str]]:
    """A sentence in which the words after "the" are an animal."""
    words = [WORDS[(3 * i + j) % 9] for j in range(5)]
    inside = [j > 0 and words[j - 1] == "the" for j in range(5)]
    after = [j > 1 and words[j - 2] == "the" for j in range(5)]
    tags = ["B-ANIMAL" if now else "I-ANIMAL" if then else "O" for now, then in zip(inside, after, strict=True)]
    return {"tokens": words, "ner_tags": tags}


def asked(i: int) -> dict[str, Any]:
    """The answer is the word behind "X"."""
    words = [WORDS[(3 * i + j) % 9] for j in range(4)]
    place = i % 5
    context = " ".join([*words[:place], "X", WORDS[i % 4], *words[place:]])
    begin = context.index("X ") + 2
    return {
        "question": "who",
        "context": context,
        "answers": {"text": [WORDS[i % 4]], "answer_start": [begin]},
    }


def spoken(i: int) -> dict[str, Any]:
    """A low tone is one word, a high one another."""
    low = i % 2 == 0
    noise = np.random.default_rng(i).normal(0, 0.01, 2000)
    tone = np.sin(2 * np.pi * (300 if low else 2000) / RATE * np.arange(2000)) + noise
    return {"audio": {"array": tone.tolist(), "sampling_rate": RATE}, "text": "quick fox" if low else "lazy dog"}


def written(i: int) -> dict[str, str]:
    return {"source": " ".join(WORDS[(i + j) % 4] for j in range(3)), "target": WORDS[i % 4]}


ROWS = {
    "token-classification": tagged,
    "question-answering": asked,
    "seq2seq": written,
    "speech-recognition": spoken,
}


def features() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, hop_length=160, chunk_length=1, n_fft=200)


def tiny_bert_for(cls: type) -> PreTrainedModel:
    torch.manual_seed(0)
    return cls(BertConfig(**SIZES))


def tiny_named(name: str) -> PreTrainedModel:
    ends = {"eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 0}
    sizes = {"max_source_positions": 25, "max_target_positions": 16} if name == "whisper" else {}
    return TINY[name].build(vocab_size=SIZES["vocab_size"], **ends, **sizes)


CASES = {
    "tokens": ("token-classification", lambda: tiny_bert_for(BertForTokenClassification), "accuracy"),
    "spans": ("question-answering", lambda: tiny_bert_for(BertForQuestionAnswering), "f1"),
    "t5": ("seq2seq", lambda: tiny_named("t5"), "accuracy"),
    "bart": ("seq2seq", lambda: tiny_named("bart"), "accuracy"),
    "whisper": ("speech-recognition", lambda: tiny_named("whisper"), "wer"),
}
AUTO = {
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "seq2seq": AutoModelForSeq2SeqLM,
    "speech-recognition": AutoModelForSpeechSeq2Seq,
}


def write_rows(folder: Path, task: str, train: int = 24, evaluation: int = 7) -> dict[str, Any]:
    names = {}
    for split, numbers in (("train", range(train)), ("eval", range(train, train + evaluation))):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(ROWS[task](i)) + "\n" for i in numbers), encoding="utf-8")
        names[f"{split}_files"] = [str(path)]
    return names


@pytest.mark.parametrize("case", CASES)
def test_a_task_trains_and_its_folder_loads(tmp_path: Path, case: str) -> None:
    task, build, metric = CASES[case]
    started = tmp_path / "start"
    model = build()
    model.save_pretrained(started)
    task_tokenizer().save_pretrained(started)
    if task == "speech-recognition":
        features().save_pretrained(started)
    data = write_rows(tmp_path, task)
    result = run(
        tmp_path,
        data,
        task=task,
        model_args={"model_name_or_path": str(started)},
        max_steps=40 if case == "whisper" else 30,
        batch_size=6,
        eval_at_start=True,
        logging_steps=15,
        data_args={"block_size": 16 if task == "speech-recognition" else 48},
    )
    first = next(line for line in result.log if "eval_loss" in line)
    better = -1 if metric == "wer" else 1
    assert result.metrics["loss"] < 0.8 * first["eval_loss"]
    assert better * result.metrics[metric] > better * first[f"eval_{metric}"]
    loaded = AUTO[task].from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == f"Focus{type(model).__name__}"
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in result.model.state_dict().items())
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == find_task(task).pipeline_tag
    assert {r.metric_type for r in card.data.eval_results} >= {metric, "loss"}
    assert AUTO[task].__name__ in str(card)
    # The saved folder alone is scored alike
    arguments = DataArguments(eval_files=data["eval_files"], block_size=16 if case == "whisper" else 48)
    again = evaluate_saved(ModelArguments(str(tmp_path / "out")), arguments, task, batch_size=5, cpu=True)
    for name in ("loss", metric):
        assert again[name] == pytest.approx(result.metrics[name], rel=1e-4)


def test_a_processor_of_the_saved_folder_hears(tmp_path: Path) -> None:
    task_tokenizer().save_pretrained(tmp_path)
    features().save_pretrained(tmp_path)
    tiny_named("whisper").save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    result = run(
        tmp_path,
        {"train_files": write_rows(tmp_path, "speech-recognition")["train_files"]},
        task="speech-recognition",
        model_args={"model_name_or_path": str(tmp_path)},
        max_steps=1,
    )
    assert result.model.config.model_type.endswith("whisper")
    loaded = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(processor)


BAD = {
    "no tags": ("token-classification", {"tags_column": "tags"}, "tags_column"),
    "tags are no lists": ("token-classification", {"tags_column": "text"}, "tags_column"),
    "more tags than words": ("token-classification", {"tokens_column": "short"}, "tags"),
    "no question": ("question-answering", {"question_column": "asked"}, "question_column"),
    "answers are texts": ("question-answering", {"answers_column": "context"}, "answers_column"),
    "question too long": ("question-answering", {"block_size": 7}, "block_size"),
    "windows overlap wholly": ("question-answering", {"doc_stride": 48}, "doc_stride"),
    "answer elsewhere": ("question-answering", {"answers_column": "misplaced"}, "answer"),
    "no target": ("seq2seq", {"target_column": "german"}, "target_column"),
    "no audio": ("speech-recognition", {"audio_column": "sound"}, "audio_column"),
    "audio is text": ("speech-recognition", {"audio_column": "text"}, "audio_column"),
    "another rate": ("speech-recognition", {"audio_column": "slow"}, "samples a second"),
    "too long": ("speech-recognition", {"audio_column": "long"}, "recordings"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_columns_are_refused_by_name(case: str) -> None:
    task, changes, word = BAD[case]
    row = ROWS[task](0)
    added = {
        "token-classification": {"text": "a", "short": ["one"]},
        "question-answering": {"misplaced": {"text": ["nowhere"], "answer_start": [0]}},
        "seq2seq": {},
        "speech-recognition": {
            "slow": {"array": [0.0, 0.1], "sampling_rate": 16000},
            "long": {"array": [0.0] * (RATE + 1), "sampling_rate": RATE},
        },
    }[task]
    of = source(task_tokenizer(), is_encoder_decoder=True)
    of.features = features()
    size = changes.get("block_size", 48)
    # Two rows, so that there are two labels
    rows = Dataset.from_list([{**row, **added}, {**ROWS[task](1), **added}])
    with pytest.raises((FocusDataError, FocusConfigError), match=word):
        find_task(task).encode(rows, None, of, DataArguments(**changes), size)


def test_a_decoder_alone_and_attention_out_of_reach_are_refused(tmp_path: Path) -> None:
    data = write_rows(tmp_path, "seq2seq")
    with pytest.raises(FocusConfigError, match="encoder-decoder"):
        run(tmp_path, data, tiny_llama(), task="seq2seq")
    import transformers

    config = transformers.ProphetNetConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=16,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_encoder_attention_heads=2,
        num_decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    model = transformers.ProphetNetForConditionalGeneration(config)
    with pytest.raises(UnsupportedArchitectureError, match=r"(?i)prophetnet"):
        run(tmp_path, data, model, task="seq2seq")


def test_words_carry_their_tag_once() -> None:
    rows = Dataset.from_dict(
        {"tokens": [["fox", "jumps"], [], ["dog"]], "ner_tags": [[1, 0], [], [2]]},
        features=Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=TAGS))}),
    )
    encoded = find_task("token-classification").encode(rows, None, source(task_tokenizer()), DataArguments(), 10)
    assert encoded.config["id2label"] == dict(enumerate(TAGS))
    # Bytes are tokens: the first of a word carries its tag; the special ones in front and behind none
    assert encoded.train["labels"][0] == [-100, 1, -100, -100, 0, *[-100] * 5]
    assert len(encoded.train) == 2


@settings(max_examples=8, deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS[:9]), min_size=1, max_size=9, unique=True),
    data=st.data(),
    size=st.integers(24, 60),
)
def test_answers_are_found_again_in_every_window_that_holds_them(words: list[str], data: Any, size: int) -> None:
    context = " ".join(words)
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(first + 1, len(words) - 1)))
    answer = " ".join(words[first : last + 1])
    begin = len(" ".join(words[:first])) + (first > 0)
    row = {"question": "who?", "context": context, "answers": {"text": [answer], "answer_start": [begin]}}
    none = {**row, "answers": {"text": [], "answer_start": []}}
    rows = Dataset.from_list([row, none])
    tokenizer = task_tokenizer()
    encoded = find_task("question-answering").encode(rows, None, source(tokenizer), DataArguments(doc_stride=12), size)
    windows = encoded.train.to_list()
    assert {window["question"] for window in windows} == {0, 1}
    covered = set()
    found = 0
    for window in windows:
        assert len(window["input_ids"]) <= size
        start, end = window["start_positions"], window["end_positions"]
        if window["question"] == 1:
            assert (start, end) == (0, 0)
            continue
        at = context.index(window["passage"])
        covered |= set(range(at, at + len(window["passage"])))
        holds = answer in window["passage"]
        if (start, end) != (0, 0):
            assert window["passage"][window["starts"][start] : window["ends"][end]] == answer
            found += 1
        elif holds:
            # The same words elsewhere
            assert context.count(answer) > 1
    # What two windows share is wholly in one of them
    assert found or len(answer) > 12
    assert covered == set(range(len(context)))


@QUICK
@given(seed=st.integers(0, 1000), length=st.integers(2, 45))
def test_best_spans_equal_a_loop(seed: int, length: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, length, generator=noise), torch.randn(2, length, generator=noise)
    allowed = torch.rand(2, length, generator=noise) < 0.7
    allowed[:, 1] = True
    places, scores = best_spans(start, end, allowed)
    for b in range(2):
        pairs = [
            ((start[b, i] + end[b, j]).item(), [i, j])
            for i in range(length)
            for j in range(i, min(i + MAX_ANSWER, length))
            if allowed[b, i] and allowed[b, j]
        ]
        best = max(pairs)
        assert scores[b].item() == pytest.approx(best[0])
        assert places[b].tolist() == best[1]


@QUICK
@given(first=st.text("abc", max_size=7), second=st.text("abc", max_size=7), third=st.text("abc", max_size=7))
def test_edit_distance_is_a_distance(first: str, second: str, third: str) -> None:
    def plain(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(plain(a[1:], b) + 1, plain(a, b[1:]) + 1, plain(a[1:], b[1:]) + (a[0] != b[0]))

    distance = edit_distance(first, second)
    assert distance == edit_distance(second, first)
    assert (distance == 0) == (first == second)
    assert distance <= edit_distance(first, third) + edit_distance(third, second)
    assert abs(len(first) - len(second)) <= distance <= max(len(first), len(second))
    if len(first) + len(second) <= 9:
        assert distance == plain(first, second)


def test_metrics_of_tasks_by_hand() -> None:
    wer = load_metric("wer")
    # One word replaced, one left out, one too many, of six
    result = wer.compute(predictions=["a x c", "d", "e f g"], references=["a b c", "d e"[:1], "e f"])
    assert result["wer"] == pytest.approx(2 / 6)
    assert find_entities(["B-A", "I-A", "I-B", "O", "I-A", "B-A"]) == {
        ("A", 0, 2),
        ("B", 2, 3),
        ("A", 4, 5),
        ("A", 5, 6),
    }
    entities = load_metric("entities")
    predicted, right = [["B-A", "I-A", "O"], ["B-B", "O"]], [["B-A", "I-A", "O"], ["B-A", "B-A"]]
    found = entities.compute(predictions=predicted, references=right)
    # The second sentence's B is no A: both of its entities are missed, with two ends each
    assert found == pytest.approx({"precision": 1 / 2, "recall": 1 / 3, "f1": 0.4, "boundary_errors": 4 / 3})
    found = entities.compute(predictions=[["B-A", "I-A", "B-A", "O"]], references=[["O", "B-A", "I-A", "I-A"]])
    assert found["boundary_errors"] == 2
    found = entities.compute(predictions=[["O", "B-A", "O", "B-B"]], references=[["B-A", "I-A", "O", "B-B"]])
    assert found["boundary_errors"] == 1 / 2
    assert load_metric("entities").compute(predictions=[["NOUN"]], references=[["NOUN"]]) == {}
    answers = load_metric("answers")
    rows = {
        "predictions": ["The fox!", "a dog", "grey cat", "cat"],
        "references": [["fox"], ["fox"], ["cat", "big cat"], []],
        "scores": [2.0, 1.0, 0.0, 1.0],
        "none_scores": [3.0, 1.5, -1.0, 5.0],
        "questions": [0, 0, 1, 2],
    }
    # Right; half right (two words against one); rightly without an answer
    result = answers.compute(**rows)
    assert result == pytest.approx({"exact_match": 2 / 3, "f1": (1 + 2 / 3 + 1) / 3})


def test_pairs_keep_their_end_and_nested_columns_are_found() -> None:
    rows = Dataset.from_list([{"translation": {"en": "fox", "de": "Vögel"}}, {"translation": {"en": " ", "de": "x"}}])
    args = DataArguments(source_column="translation.en", target_column="translation.de", source_prefix="say ")
    tokenizer = byte_tokenizer()
    of = source(tokenizer, is_encoder_decoder=True)
    encoded = find_task("seq2seq").encode(rows, None, of, args, 12).train
    assert len(encoded) == 1
    assert tokenizer.decode(encoded[0]["input_ids"]) == "say fox"
    assert encoded[0]["labels"][-1] == tokenizer.eos_token_id
    short = find_task("seq2seq").encode(rows, None, of, args, 3).train
    assert len(short[0]["labels"]) == 3
    assert short[0]["labels"][-1] == tokenizer.eos_token_id


def test_words_are_read_as_the_text_they_are_of(tmp_path: Path) -> None:
    """A RoBERTa's tokenizer glues a list of words together, unless each begins with a space."""
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    (tmp_path / "vocab.json").write_text(json.dumps({symbol: number for number, symbol in enumerate(symbols)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    RobertaConfig(vocab_size=len(symbols)).save_pretrained(tmp_path)
    args = ModelArguments(str(tmp_path))
    words, text = ["the", "cat", "sat"], "the cat sat"
    glued, apart = (find_source(args, splits_words=splits).tokenizer for splits in (False, True))
    assert glued(words, is_split_into_words=True)["input_ids"] != glued(text)["input_ids"]
    assert apart(words, is_split_into_words=True)["input_ids"] == apart(text)["input_ids"]
    assert apart(text)["input_ids"][2:] == glued(text)["input_ids"][1:]
    assert find_task("token-classification").splits_words
