"""Sharing on the Hub: folders checked and pushed in one commit, fetched whole or not at all, with clear errors."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    snapshot_download,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from .cards import CARD_FILE, CardFacts, address_card, find_pipeline_tag, model_card
from .errors import FocusCheckpointError, bad_value
from .folder_checks import (
    ADAPTER_FILE,
    CONFIG_FILE,
    SHARED,
    WEIGHTS,
    SharedFolder,
    check_folder,
    is_placeholder,
    is_weight_file,
    refuse_traces,
)
from .folders import written_beside
from .hub import hub_errors, prepare_repo
from .modeling import focus_model_class

# PEFT's tasks -> the Hub's
_ADAPTER_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    base_model: str | None = None,
    tags: Sequence[str] = (),
) -> CommitInfo:
    """Check a folder with a FocusA model or adapter, and push it in one commit.

    What is pushed: weights, configs, tokenizer or processor, the model's code, card and pictures, and the log; never
    checkpoints, trackers' files or pickles. Other weights that the repository holds are removed in the same commit, so
    that it never holds parts of two models. A card that says to load from its own folder says `repo_id` there; without
    a card, one is made of what config.json says, unless the repository has one.

    Args:
        folder: as `save_pretrained`, `Trainer` or `scripts/finetune.py` wrote it.
        repo_id, private, revision, token: see `prepare_repo`.
        commit_message, commit_description: of the commit. Default: "Upload model", or "Upload adapter".
        create_pr: open a pull request instead of writing to the branch.
        overwrite: replace what the repository holds, where that is no FocusA model of the same kind.
        base_model, tags: for the card, where the push makes one; what is no id on the Hub is left out of it.

    Returns:
        the commit: a string with its address, with `oid`, `repo_url`, and for a pull request `pr_url`.

    Raises:
        FocusCheckpointError, FocusConfigError: see `check_folder`; nothing was sent.
        FocusHubError: a file that tells paths of this machine, a repository that holds something else, or what
            `prepare_repo` says. The repository is as it was; another push completes.
    """
    checked = check_folder(folder)
    refuse_traces(checked)
    repo_id = prepare_repo(
        repo_id,
        private=private,
        revision=revision,
        token=token,
        kind=checked.kind,
        write=not create_pr,
        overwrite=overwrite,
    )
    api = HfApi(token=token)
    with hub_errors(repo_id, revision):
        there = api.list_repo_files(repo_id, revision=revision)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, str(checked.path / name)) for name in checked.files if name != CARD_FILE
        ]
        card = None
        if checked.card is not None:
            card = address_card((checked.path / CARD_FILE).read_text(encoding="utf-8"), repo_id)
        elif CARD_FILE not in there or is_placeholder(
            Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision))
        ):
            card = str(card_of_config(checked, repo_id, base_model, tags))
        if card is not None:
            operations.append(CommitOperationAdd(CARD_FILE, card.encode()))
        operations += [CommitOperationDelete(name) for name in _stale(checked, there)]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Upload {checked.kind}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _stale(checked: SharedFolder, there: list[str]) -> list[str]:
    """Files of the repository that a reader would mix with, or take for, what is pushed."""
    other = ADAPTER_FILE if checked.kind == "model" else CONFIG_FILE
    return [name for name in there if (is_weight_file(name) or name == other) and name not in checked.files]


def card_of_config(
    checked: SharedFolder, repo_id: str, base_model: str | None = None, tags: Sequence[str] = ()
) -> ModelCard:
    """A card of what config.json, or adapter_config.json, says; nothing is known of training and results.

    Raises:
        FocusConfigError: tags that the Hub does not take.
    """
    config = checked.config
    facts = CardFacts(
        name=repo_id.rpartition("/")[2],
        pipeline_tag=None,
        repo_id=repo_id,
        kind=checked.kind,
        # Loaded from this repository, it is no base of itself
        base_model=None if base_model == repo_id else base_model,
        focus=config["focus_config"],
        tags=tags,
        has_code=bool(config.get("auto_map")),
    )
    if checked.kind == "adapter":
        # PEFT writes the one or the other
        architecture = (config.get("auto_mapping") or {}).get("base_model_class")
        facts.base_model = config["base_model_name_or_path"]
        facts.pipeline_tag = _ADAPTER_TASKS.get(config.get("task_type")) or find_pipeline_tag(architecture)
    else:
        architecture = config["architectures"][0].removeprefix("Focus")
        facts.pipeline_tag = find_pipeline_tag(architecture)
        facts.auto_class = focus_model_class(getattr(transformers, architecture))._auto_class
    return model_card(facts)


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    max_shard_size: int | str = "50GB",
    tags: list[str] | str | None = None,
    **push: Any,
) -> CommitInfo:
    """Save a model in a temporary folder and push that: what `model.push_to_hub` does on a FocusA model.

    Args:
        model: a FocusA model.
        repo_id: see `prepare_repo`.
        max_shard_size: bytes, or a string such as "5GB", of a file of weights.
        tags: for the card, where the push makes one.
        push: more arguments of `push_folder`.

    Raises:
        FocusHubError, FocusConfigError: see `push_folder`.
    """
    with TemporaryDirectory(prefix="hf_focus-") as temporary:
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        tags = [tags] if isinstance(tags, str) else list(tags or ())
        return push_folder(temporary, repo_id, base_model=model.config.name_or_path, tags=tags, **push)


# Arguments of `save_pretrained(push_to_hub=True)` that are the push's alone
_PUSH_ARGUMENTS = (
    "repo_id",
    "private",
    "revision",
    "commit_message",
    "commit_description",
    "create_pr",
    "overwrite",
    "tags",
)


def take_push_arguments(folder: str | Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Take out of the arguments of `save_pretrained` those that `push_folder` gets, the repository's name included.

    Without `repo_id` it is named as the folder. `token` stays: saving uses it too.
    """
    taken = {name: arguments.pop(name) for name in _PUSH_ARGUMENTS if name in arguments}
    return {"repo_id": Path(folder).resolve().name, "token": arguments.get("token"), **taken}


def drop_stale_weights(folder: str | Path) -> None:
    """Where a folder holds both single and sharded weights of a model, remove the older.

    transformers leaves `model.safetensors` beside the shards that are saved after it, and loads it.
    """
    weights = WEIGHTS["model"]
    single, index = Path(folder, weights.single), Path(folder, weights.index)
    if single.is_file() and index.is_file():
        if single.stat().st_mtime_ns < index.stat().st_mtime_ns:
            single.unlink()
        else:
            index.unlink()


def pull_folder(
    repo_id: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Download a FocusA model or adapter from the Hub into a folder, checked.

    Every file is compared with the Hub's hash of it. The folder is written beside under another name and then renamed:
    it is there whole, or not at all.

    Args:
        repo_id: `owner/name`.
        folder: where to; missing parents are made.
        revision: branch, tag or commit. Default: main.
        token: see `prepare_repo`; not needed for public repositories.
        overwrite: replace a model's folder, or an empty one, that is there.

    Returns:
        the folder.

    Raises:
        FocusConfigError: the folder exists and may not be replaced, or the card's metadata is wrong.
        FocusHubError: the repository or revision does not exist or is not shown to this token, or cannot be reached.
        FocusCheckpointError: it holds no FocusA model, or a file that is damaged.
    """
    api = HfApi(token=token)
    with written_beside(folder, overwrite) as new:
        with hub_errors(repo_id, revision):
            validate_repo_id(repo_id)
            info = api.model_info(repo_id, revision=revision, files_metadata=True)
            snapshot_download(repo_id, revision=info.sha, token=token, local_dir=new, allow_patterns=list(SHARED))
        # The download's notes on itself
        shutil.rmtree(new / ".cache", ignore_errors=True)
        _check_hashes(new, info.siblings)
        check_folder(new)
    return Path(folder)


def _check_hashes(folder: Path, listed: list[RepoSibling]) -> None:
    """Compare the files of a folder with the Hub's hashes: SHA-256 of large files, git's own of the others."""
    for entry in listed:
        file = folder / entry.rfilename
        if file.is_file():
            content = file.stat().st_size
            digest = hashlib.sha256() if entry.lfs else hashlib.sha1(b"blob %d\0" % content, usedforsecurity=False)
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != (entry.lfs.sha256 if entry.lfs else entry.blob_id):
                accepted = "a file with the hash that the Hub has of it; fetch it again"
                raise FocusCheckpointError(bad_value(entry.rfilename, f"hash {digest.hexdigest()}", accepted))


def replace_model(new: Path, folder: Path) -> None:
    """Move the files of `new` into `folder`, weights that are left of an earlier model removed.

    config.json comes last and goes first: without it, nothing there is taken for a model.
    """
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    for file in [*folder.iterdir()]:
        if file.is_file() and is_weight_file(file.name):
            file.unlink()
    for file in sorted(new.iterdir(), key=lambda file: file.name == CONFIG_FILE):
        if file.is_dir():
            shutil.rmtree(folder / file.name, ignore_errors=True)
        os.replace(file, folder / file.name)
