"""The Hugging Face Hub, from which collections are loaded and to which they are uploaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from clora.errors import CloraError


def is_repo_id(text: str) -> bool:
    """Returns True for a valid id of a repository with its owner, ``owner/name``; the Hub is not asked."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text


def cached_revision(repo_id: str) -> str | None:
    """Returns the commit of a pipeline in the Hub's local cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    # The cache has the files of a revision in a folder that is named by its commit.
    file = try_to_load_from_cache(repo_id, "model_index.json") if is_repo_id(repo_id) else None
    return Path(file).parent.name if isinstance(file, str) else None


def download(repo_id: str, filename: str) -> Path:
    """Returns the path of a repository's file, downloaded unless the cache has it.

    Raises:
        CloraError: no such repository or file, or no connection.
    """
    from huggingface_hub import hf_hub_download

    with _failing(
        f"{repo_id!r} is not a local file or folder, and {filename} could not be downloaded from the Hub; check the id and your connection"
    ):
        return Path(hf_hub_download(repo_id, filename))


def check_repo(repo_id: str) -> None:
    """Refuses, without asking the Hub, an upload that cannot succeed.

    Raises:
        CloraError: the id is not valid, or nobody is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    with _failing(f"push to hub: {repo_id!r} is not a repository id, expected owner/name"):
        validate_repo_id(repo_id)
    if get_token() is None:
        raise CloraError(
            f"push to hub: no login for {repo_id}; run `hf auth login` or set HF_TOKEN to a token that may write"
        )


def create_repo(repo_id: str) -> str:
    """Creates a repository unless it exists. Called before long work, so that its result can be uploaded.

    Returns:
        The id with its owner: the user, if `repo_id` names none.

    Raises:
        CloraError: no connection, or no right to write there.
    """
    from huggingface_hub import HfApi

    with _failing(f"push to hub: {repo_id} cannot be created or written"):
        return HfApi().create_repo(repo_id, exist_ok=True).repo_id


def upload(folder: Path, repo_id: str, patterns: Sequence[str]) -> str:
    """Uploads the files of a folder that match the patterns; returns the address of the repository.

    Raises:
        CloraError: they cannot be uploaded; the message has the command that does it later.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _failing(f"{folder} is complete, but it could not be uploaded (later: hf upload {repo_id} {folder})"):
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(patterns), commit_message="Upload the collection"
        )
    return f"{api.endpoint}/{repo_id}"


@contextmanager
def _failing(message: str) -> Iterator[None]:
    """Begins any error of the block with a message: huggingface_hub and its HTTP library share no error class."""
    try:
        yield
    except Exception as error:
        raise CloraError(f"{message}: {error}") from error
