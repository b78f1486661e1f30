"""Data sets of documents for fine-tuning: from the Hub by name, or from local files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.features import Value

from .arguments import DataArguments
from .errors import FocusDataError, bad_value
from .json_lines import GOOD_LINES, find_bad_line, load_good_lines, stream_lines

# Extension -> builder of `datasets`
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Splits that are evaluated on where none is asked for, in this order
EVAL_SPLITS = ("validation", "valid", "dev", "test")


def load_documents(args: DataArguments, seed: int = 0, by_character: bool = True) -> tuple[Dataset, Dataset | None]:
    """The training and evaluation documents that `args` names.

    Args:
        args: exactly one of `dataset` and `train_files` is set.
        seed: which documents are held out, where a share is.
        by_character: hold out the end of every document where there are too few to hold out whole ones.

    Returns:
        train and eval rows, with the columns of the source; eval is None with `eval_share=0` and nothing else given.
        With `args.streaming`, train, and eval of a named data set, are an `IterableDataset`.

    Raises:
        FocusDataError: a file or data set is missing, empty, not readable, or neither or both were given.
    """
    if bool(args.dataset) == bool(args.train_files):
        accepted = "either --dataset or --train-files"
        raise FocusDataError(bad_value("dataset, train_files", (args.dataset, args.train_files), accepted))
    if args.dataset:
        train, evaluation = _load_named(args)
    else:
        train = load_files(
            args.train_files, "train_files", args.sample_by, args.cache_dir, args.bad_lines, args.streaming
        )
        evaluation = None
    if args.eval_files:
        evaluation = load_files(args.eval_files, "eval_files", args.sample_by, args.cache_dir, args.bad_lines)
    if evaluation is None and args.eval_share:
        train, evaluation = hold_out(
            train, args.eval_share, seed, args.text_column if by_character else None, by_character
        )
    return train, evaluation


def load_files(
    names: Sequence[str | Path],
    argument: str = "files",
    sample_by: str = "document",
    cache_dir: str | None = None,
    bad_lines: str = "error",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Rows of local files of one format.

    Args:
        names: paths, all with the same extension of `BUILDERS`.
        argument: name of the argument they came from, for messages.
        sample_by: what one row of a .txt file is: `"document"` (the file), `"paragraph"` or `"line"`.
        cache_dir: where `datasets` keeps what it read; None: its default.
        bad_lines: what to do with a line of a .jsonl file that is no JSON object: `"error"` or `"skip"`.
        streaming: read them when the rows are asked for; a bad line is met then.

    Raises:
        FocusDataError: a file is missing, empty, of another format, or not readable as its extension says.
    """
    paths = [Path(name) for name in names]
    for path in paths:
        if path.suffix.lower() not in BUILDERS:
            raise FocusDataError(bad_value(argument, str(path), f"a file ending in {', '.join(BUILDERS)}"))
        if not path.is_file():
            raise FocusDataError(bad_value(argument, str(path), "an existing file"))
        if path.stat().st_size == 0:
            raise FocusDataError(bad_value(argument, str(path), "a file that is not empty"))
    builders = {BUILDERS[path.suffix.lower()] for path in paths}
    if len(builders) != 1:
        raise FocusDataError(bad_value(argument, [str(path) for path in paths], "one or more files of one format"))
    builder = builders.pop()
    if streaming and all(path.suffix.lower() == ".jsonl" for path in paths):
        # `datasets` would say neither file nor line of a bad one, in the middle of the training
        return _not_empty(stream_lines(paths, argument, bad_lines), argument, [str(path) for path in paths])
    options = {"sample_by": sample_by} if builder == "text" else {}
    try:
        rows = load_dataset(
            builder,
            data_files=[str(path) for path in paths],
            split="train",
            cache_dir=cache_dir,
            streaming=streaming,
            **options,
        )
        has_rows = _has_rows(rows)
    except Exception as error:
        # `datasets` wraps whatever the parser raised: the type says nothing
        bad = find_bad_line([path for path in paths if path.suffix.lower() == ".jsonl"])
        if bad and bad_lines == "skip":
            return _without_bad_lines(paths, argument, cache_dir)
        if bad:
            raise FocusDataError(bad_value(argument, bad, GOOD_LINES)) from error
        accepted = f"well-formed {builder} files with at least one row ({_first_line(error)})"
        raise FocusDataError(bad_value(argument, [str(path) for path in paths], accepted)) from error
    if not has_rows:
        raise FocusDataError(bad_value(argument, [str(path) for path in paths], "data with at least one row"))
    return rows


def _without_bad_lines(paths: list[Path], argument: str, cache_dir: str | None) -> Dataset:
    """The good lines of .jsonl files; after them what .json files hold, which may be one array over many lines."""
    arrays = [path for path in paths if path.suffix.lower() != ".jsonl"]
    lines = [path for path in paths if path not in arrays]
    rows = _not_empty(load_good_lines(lines, cache_dir), argument, [str(path) for path in lines])
    if not arrays:
        return rows
    others = load_files(arrays, argument, cache_dir=cache_dir)
    try:
        return concatenate_datasets([rows, others])
    except ValueError as error:
        accepted = f"files of the same columns ({_first_line(error)})"
        raise FocusDataError(bad_value(argument, [str(path) for path in paths], accepted)) from error


def _load_named(args: DataArguments) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    def load(split: str | None) -> Any:
        try:
            return load_dataset(
                args.dataset, args.dataset_config, split=split, cache_dir=args.cache_dir, streaming=args.streaming
            )
        except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
            accepted = f"a data set of the Hub, reachable from here, or a folder of data files ({_first_line(error)})"
            raise FocusDataError(bad_value("dataset", args.dataset, accepted)) from error
        except DatasetGenerationError as error:
            accepted = f"well-formed data ({_first_line(error)})"
            raise FocusDataError(bad_value("dataset", args.dataset, accepted)) from error
        except ValueError as error:
            asked = {"dataset": args.dataset, "dataset_config": args.dataset_config, "split": split}
            raise FocusDataError(bad_value("dataset", asked, _first_line(error))) from error

    train = load(args.train_split)
    if args.eval_split:
        return _not_empty(train, "train_split", args.train_split), _not_empty(
            load(args.eval_split), "eval_split", args.eval_split
        )
    splits: DatasetDict | IterableDatasetDict = load(None)
    found = next((name for name in EVAL_SPLITS if name in splits), None)
    return _not_empty(train, "dataset", args.dataset), splits[found] if found else None


def hold_out(
    rows: Dataset, share: float, seed: int, text_column: str | None = None, by_character: bool = True
) -> tuple[Dataset, Dataset]:
    """Split rows into training and evaluation ones: whole rows drawn at random, or, where that would hold out none,
    the end of every document.

    Raises:
        FocusDataError: too few rows, and they may not be cut; or a stream.
    """
    if isinstance(rows, IterableDataset):
        accepted = (
            "0 with a stream, of which nothing is held out, or evaluation data of its own (eval_files, eval_split)"
        )
        raise FocusDataError(bad_value("eval_share", share, accepted))
    count = int(len(rows) * share)
    if count:
        parts = rows.train_test_split(test_size=count, seed=seed)
        return parts["train"], parts["test"]
    if not by_character:
        accepted = f"at least {int(1 / share) + 1} training rows, evaluation data of their own, or eval_share 0"
        raise FocusDataError(bad_value("eval_share", share, accepted))
    column = find_text_column(rows, text_column)
    cut = [int(len(text or "") * (1 - share)) for text in rows[column]]
    head = [text[:at] for text, at in zip(rows[column], cut, strict=True) if text]
    tail = [text[at:] for text, at in zip(rows[column], cut, strict=True) if text]
    return Dataset.from_dict({column: head}), Dataset.from_dict({column: tail})


def _features(rows: Dataset | IterableDataset) -> Features:
    """The types of the columns; a stream may not know them before its first row."""
    return rows.features or Dataset.from_list([next(iter(rows))]).features


def find_text_column(rows: Dataset | IterableDataset, asked: str | None = None, argument: str = "text_column") -> str:
    """The column of the text: the one asked for, `text`, or the only column of strings.

    Raises:
        FocusDataError: there is none, several, or it holds no strings.
    """
    strings = [name for name, kind in _features(rows).items() if isinstance(kind, Value) and "string" in kind.dtype]
    if asked is None and "text" in strings:
        return "text"
    if asked is None and len(strings) == 1:
        return strings[0]
    if asked not in strings:
        raise FocusDataError(bad_value(argument, asked, f"one of the columns of strings, {strings}"))
    return asked


def _has_rows(rows: Dataset | IterableDataset) -> bool:
    return next(iter(rows), None) is not None if isinstance(rows, IterableDataset) else len(rows) > 0


def _not_empty(rows: Dataset | IterableDataset, argument: str, value: Any) -> Dataset | IterableDataset:
    try:
        has_rows = _has_rows(rows)
    except FocusDataError:
        raise
    except ValueError as error:
        # Of a stream, what is wrong with the first rows shows when they are read
        raise FocusDataError(bad_value(argument, value, f"well-formed data ({_first_line(error)})")) from error
    if not has_rows:
        raise FocusDataError(bad_value(argument, value, "data with at least one row"))
    return rows


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().partition("\n")[0] or type(cause).__name__
