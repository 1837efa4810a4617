"""The Hugging Face Hub, from which collections are loaded and to which they are uploaded."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from clora.errors import CloraError


@dataclass(frozen=True)
class Destination:
    """Where a collection is uploaded to.

    Attributes:
        repo_id: the repository, ``owner/name``; without an owner it is the user's.
        private: create it private, and refuse one that is public.
        samples: upload the sample pictures too, which show pictures from training.
    """

    repo_id: str
    private: bool = False
    samples: bool = False


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


def check_destination(destination: Destination) -> Destination:
    """Refuses, before long work, an upload that cannot succeed. Nothing is created.

    Returns:
        The destination with its owner: the user, if it names none.

    Raises:
        CloraError: the id is not valid, nobody is logged in, the token may not write there, there is no connection, or the
            repository is public where a private one is asked for.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    repo_id = destination.repo_id
    with _failing(f"push to hub: {repo_id!r} is not a repository id, expected owner/name"):
        validate_repo_id(repo_id)
    remedy = "run `hf auth login` or set HF_TOKEN to a token that may write"
    if get_token() is None:
        raise CloraError(f"push to hub: no login for {repo_id}; {remedy}")
    with _failing(f"push to hub: the Hub does not accept the login for {repo_id}; {remedy}"):
        user = HfApi().whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise CloraError(f"push to hub: the token may only read, {repo_id} needs one that writes; {remedy}")
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", ()))]
    destination = replace(destination, repo_id=repo_id if "/" in repo_id else f"{owners[0]}/{repo_id}")
    if destination.repo_id.partition("/")[0] not in owners:
        raise CloraError(f"push to hub: expected a repository of {' or '.join(owners)}, found {repo_id}")
    _refuse_public(destination)
    return destination


def _refuse_public(destination: Destination) -> None:
    from huggingface_hub import HfApi

    api, repo_id = HfApi(), destination.repo_id
    with _failing(f"push to hub: {repo_id} cannot be looked up"):
        is_public = destination.private and api.repo_exists(repo_id) and not api.repo_info(repo_id).private
    if is_public:
        raise CloraError(
            f"push to hub: {repo_id} exists and is public, expected a private one; name another repository"
        )


def upload(folder: Path, destination: Destination, files: Sequence[str]) -> str:
    """Creates the repository unless it exists, and uploads some files of a folder; returns the repository's address.

    Raises:
        CloraError: they cannot be uploaded; the message has the command that does it later.
    """
    from huggingface_hub import HfApi

    api, repo_id = HfApi(), destination.repo_id
    # Of several names after one --include, hf takes the second as another argument.
    included = chain.from_iterable(("--include", file) for file in files)
    private = ["--private"] if destination.private else []
    later = shlex.join(["hf", "upload", repo_id, str(folder), *included, *private])
    with _failing(f"{folder} is complete, but it could not be uploaded (later: {later})"):
        api.create_repo(repo_id, exist_ok=True, private=destination.private)
        _refuse_public(destination)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(files), commit_message="Upload the collection"
        )
    return f"{api.endpoint}/{repo_id}"


@contextmanager
def _failing(message: str) -> Iterator[None]:
    """Begins any error of the block with a message: huggingface_hub and its HTTP library share no error class."""
    try:
        yield
    except Exception as error:
        raise CloraError(f"{message}: {error}") from error
