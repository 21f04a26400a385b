"""Pushing a run to the Hugging Face hub: checked before the run starts, done at its end."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # is public

from .errors import InputError


def check_push(repo_id: str) -> None:
    """Raise InputError if a run could not be pushed to `repo_id`: it is no name, the hub is
    turned off or cannot be reached, one is not logged in, or the name is another's."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(
            f"--push_to_hub must be like user/name, got {repo_id!r}: {error}"
        ) from error
    if constants.is_offline_mode():
        raise InputError(
            f"--push_to_hub {repo_id} needs the network, and HF_HUB_OFFLINE=1 is set; unset it, or "
            "push the run later (see README)"
        )
    if get_token() is None:
        raise InputError(
            f"--push_to_hub {repo_id} needs you to be logged in, and there is no token; "
            "run `hf auth login`, or set HF_TOKEN"
        )
    try:
        account = HfApi().whoami()
    except Exception as error:  # the client lets through what its HTTP library raises
        raise InputError(
            f"--push_to_hub {repo_id} needs the hub to know you, and it does not: "
            f"{_first_line(error)}; run `hf auth login`, or push the run later (see README)"
        ) from error
    names = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    owner, _, name = repo_id.rpartition("/")
    if owner and owner not in names:
        raise InputError(
            f"--push_to_hub must be a name of yours, {' or '.join(f'{n}/{name}' for n in names)}, "
            f"got {repo_id}"
        )


def push_run(folder: Path, repo_id: str, files: Collection[str]) -> str:
    """Push the `files` of a run's folder to `repo_id`, made where it is not there, in one commit:
    the commit's address. Raises InputError if the hub does not take them; the folder stays."""
    api = HfApi()
    try:
        name = api.create_repo(repo_id, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message="Push a multi-layer SAE",
        )
    except Exception as error:  # as above; whatever it is, the run is on the disk
        raise InputError(
            f"--push_to_hub {repo_id} failed: {_first_line(error)}; the run in {folder} is whole: "
            f"push it with `hf upload {repo_id} {folder} . --exclude 'checkpoints/*'`"
        ) from error
    return str(commit.commit_url)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
