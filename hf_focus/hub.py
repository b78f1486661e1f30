"""The Hub's answers as clear errors, and the repository to push to: made, and asked whether it can be pushed to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .errors import FocusHubError, bad_value
from .folder_checks import ADAPTER_FILE, CONFIG_FILE, is_focus_config, read_json

_LOGIN = "a token with write permission: `hf auth login`, or HF_TOKEN in the environment"

_AGAIN = "a Hub that answers; what it holds is whole, the old or the new, and another try completes"

# What the Hub answers -> argument, what was received, what would be accepted. The first that fits counts
_ERRORS: tuple[tuple[type[Exception], tuple[int, ...], str, str, str], ...] = (
    (HFValidationError, (), "repo_id", "{repo_id}", "name or owner/name, of letters, digits, '-', '_' and '.'"),
    (LocalTokenNotFoundError, (), "token", "none", _LOGIN),
    (OfflineModeIsEnabled, (), "HF_HUB_OFFLINE", "1", "0, to reach the Hub"),
    (RevisionNotFoundError, (), "revision", "{revision}", "a branch, tag or commit of {repo_id}"),
    # The Hub answers 401 for a repository that it does not show
    (
        RepositoryNotFoundError,
        (),
        "repo_id",
        "{repo_id}",
        "one that exists and that the token may see",
    ),
    # Of a file that could not be fetched: the cause is the connection
    (LocalEntryNotFoundError, (), "Hub", "no usable answer for {repo_id}", _AGAIN),
    (EntryNotFoundError, (), "repo_id", "{repo_id}", "a repository that has the file"),
    (HfHubHTTPError, (401,), "token", "one that the Hub refuses", _LOGIN),
    (HfHubHTTPError, (402, 403), "repo_id", "{repo_id}", "a repository that the token may write to"),
    (HfHubHTTPError, (409, 412), "repo_id", "{repo_id}", "a name that is free, and no other push at the same time"),
    (BadRequestError, (), "files", "what the Hub refuses", "files and metadata that it takes"),
    (HTTPError, (), "Hub", "no usable answer for {repo_id}", _AGAIN),
    (ConnectionError, (), "Hub", "no usable answer for {repo_id}", _AGAIN),
)
_CAUGHT = (RuntimeError, *(kind for kind, *_ in _ERRORS))


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Errors of huggingface_hub become `FocusHubError`s that say what to do."""
    try:
        yield
    except _CAUGHT as raised:
        # What fails in an upload of large files comes as the cause of a RuntimeError
        error = raised.__cause__ if isinstance(raised, RuntimeError) else raised
        status = getattr(getattr(error, "response", None), "status_code", None)
        for kind, statuses, argument, received, accepted in _ERRORS:
            if isinstance(error, kind) and (not statuses or status in statuses):
                received, accepted = (text.format(repo_id=repo_id, revision=revision) for text in (received, accepted))
                reason = " ".join(str(error).split())
                raise FocusHubError(f"{bad_value(argument, received, accepted)} The answer: {reason}") from raised
        raise


def prepare_repo(
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    kind: str = "model",
    write: bool = True,
    overwrite: bool = False,
) -> str:
    """Make the repository, if it is not there, and see that the token may write to it and what it holds.

    Args:
        repo_id: `name`, for the token's own user, or `owner/name`.
        private: whether a new repository is private. Default: the owner's setting.
        revision: branch, made from `main` if it is not there. Default: main.
        token: of the Hub. Default: the one that `hf auth login` saved, or HF_TOKEN.
        kind: what will be pushed, "model" or "adapter".
        write: whether the token has to have the permission to write; False for pull requests.
        overwrite: accept a repository that holds something else than a FocusA model of this kind.

    Returns:
        the full id, `owner/name`.

    Raises:
        FocusHubError: a name the Hub does not take, no token or no permission, a repository that holds something else,
            or the Hub cannot be reached.
    """
    api = HfApi(token=token)
    with hub_errors(repo_id, revision):
        validate_repo_id(repo_id)
        if token is False or not (isinstance(token, str) or get_token()):
            raise FocusHubError(bad_value("token", None, _LOGIN))
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # A repository of somebody else exists too
        api.auth_check(repo_id, write=write)
        if write and revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not overwrite:
            _refuse_other_models(api, repo_id, revision, kind)
    return repo_id


def _refuse_other_models(api: HfApi, repo_id: str, revision: str | None, kind: str) -> None:
    """A repository of the same name with another model: its weights would be gone."""
    there = api.list_repo_files(repo_id, revision=revision)
    for name, holds in ((CONFIG_FILE, "model"), (ADAPTER_FILE, "adapter")):
        if name in there:
            config = read_json(Path(api.hf_hub_download(repo_id, name, revision=revision)))
            if not is_focus_config(config) or holds != kind:
                held = config.get("model_type") or config.get("peft_type")
                accepted = f"a free name, or a repository with a FocusA {kind}; overwrite=True replaces what is there"
                raise FocusHubError(bad_value("repo_id", f"{repo_id}, which holds {held}", accepted))
