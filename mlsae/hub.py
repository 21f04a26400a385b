"""The Hugging Face hub: how an MLSAE loads and saves itself, and how a run is pushed.

A push is checked before the run starts, and done at its end.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import (
    HfApi,
    ModelCard,
    ModelHubMixin,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # is public

from sparse_topk import SparseTopKSAE
from sparse_topk.loading import parse_dtype, refuse_unknown

from . import formats
from .basis import Lens
from .card import model_card
from .distributed import Group
from .errors import InputError, first_line
from .files import write_file
from .formats import SavedSAE

_FILES = [
    "config.json", "model.safetensors", "README.md", formats.SETTINGS, formats.CARRIED,
    formats.LENS,
]  # fmt: skip
_OFFLINE = "it is not here and HF_HUB_OFFLINE=1 is set; unset that, or first run `hf download"


class HubFiles(ModelHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of huggingface_hub's mixin, for a
    module that can become a `SavedSAE` and be made from one."""

    config: Any
    shards: Group
    lens: Lens | None
    sae: SparseTopKSAE
    about: dict[str, Any]

    @property
    @abstractmethod
    def threshold(self) -> float | None:
        """What an activation must exceed; None if the k largest stay."""

    @abstractmethod
    def to_saved(self) -> SavedSAE:
        """What the files are made of."""

    @classmethod
    @abstractmethod
    def from_saved(
        cls,
        saved: SavedSAE,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = torch.float32,
    ) -> Self:
        """The module that the files hold, in `dtype`; in the files' if None."""

    def save_pretrained(  # type: ignore[override] # `extra` goes into config.json
        self,
        save_directory: Path | str,
        *,
        config: None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: None = None,
        **extra: Any,
    ) -> str | None:
        """Write `config.json` (this config, and `about`, which `extra` is added to),
        `model.safetensors` (`W_enc` (M, D), `W_dec` (M, D), `b_dec` (D,), in their dtype),
        `lens.safetensors` if there is a lens, and the model card `README.md`, unless there is one.
        Each file is replaced at once. Collective when sharded: every process must call it, and
        rank 0 writes.

        With `push_to_hub`, also push it to `repo_id`, and return the commit's address. Raises
        TypeError if `config` or `model_card_kwargs` of the mixin are given: an MLSAE knows both.
        """
        if config is not None or model_card_kwargs:
            raise TypeError(
                "config and model_card_kwargs cannot be given: an MLSAE saves its own config, and "
                "takes what else the model card tells as keywords, such as training={…}"
            )
        self.about.update(extra)
        saved = self.to_saved()
        if self.shards.rank > 0:
            return None
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in formats.own.files(saved).items():
            write_file(folder / name, content)
        if not (folder / "README.md").exists():
            write_file(folder / "README.md", str(self.generate_model_card()).encode())
        return self.push_to_hub(repo_id or folder.name) if push_to_hub else None

    def generate_model_card(self) -> ModelCard:
        """The model card: what it is, its settings, and its validation metrics if known."""
        known = {"threshold": self.threshold, "lens": self.lens and self.lens.about}
        return model_card({**asdict(self.config), **known, **self.about})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = torch.float32,
        *,
        lens: Path | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: Path | str | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **unknown: Any,
    ) -> Self:
        """Load an MLSAE, or a checkpoint of the paper's own code, from a folder or by its name on
        the Hugging Face hub; the last five arguments are the hub's. An MLSAE that was trained with
        a lens has it in its folder; `lens` is that of one which has not, such as the paper's
        `-lens` checkpoints: see `formats.read_lens`. `dtype` is a torch.dtype, its
        name, or "auto": that of the file. With HF_HUB_OFFLINE=1, a name must have been downloaded
        before.

        Raises InputError if a file is missing, damaged, or of another shape than the config, or if
        `lens` is given to an MLSAE that has one or was trained without;
        ValueError if `dtype` is none; TypeError on another keyword.
        """
        refuse_unknown(unknown)
        wanted = parse_dtype(dtype)
        name = str(pretrained_model_name_or_path)
        _check_one(Path(name))
        try:
            if not Path(name).is_dir() and (name.count("/") > 1 or name.startswith(("/", "."))):
                raise FileNotFoundError("there is no such folder")
            loaded: Self = super().from_pretrained(
                name, revision=revision, token=token, cache_dir=cache_dir,
                force_download=force_download, local_files_only=local_files_only,
                device=device, dtype=wanted,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            offline = isinstance(error, LocalEntryNotFoundError) and constants.is_offline_mode()
            raise InputError(
                "RUN must be the folder of a trained MLSAE (config.json and model.safetensors) or "
                f"its name on the Hugging Face hub, and {name} cannot be loaded: "
                + (f"{_OFFLINE} {name}`" if offline else str(error))
            ) from error
        if lens is not None:
            loaded.take_lens(lens, name)
        elif loaded.lens is None and loaded.about.get("released", {}).get("tuned_lens"):
            warnings.warn(
                f"{name} was trained on residuals that a tuned lens had transformed: give lens="
                "FOLDER, that of the lens; on plain residuals its codes mean nothing",
                stacklevel=2,
            )
        return loaded

    def take_lens(self, path: Path | str, name: str) -> None:
        """Take the lens at `path`. Raises InputError if this one, called `name`, has a lens or was
        trained without; or if the lens cannot be read, or is of other layers or another width."""
        config = self.config
        if self.lens is not None:
            raise InputError(
                f"--lens is for an MLSAE whose files do not tell it, and {name} has its own lens; "
                "leave it out"
            )
        lens = formats.lens_for(path, config.layers, self.about, name)
        lens.check_layers(config.layers)
        if lens.d_in != config.d_in:
            raise InputError(
                f"--lens must be of the width of {name}, {config.d_in}, and has {lens.d_in}; give "
                "that which it was trained with"
            )
        self.lens = lens.to(self.sae.W_dec.device)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        **hub: Any,
    ) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            hub.pop("config", None)  # the mixin has read it; `formats` reads it anew
            folder = Path(snapshot_download(model_id, allow_patterns=_FILES, **hub))
        saved = formats.read(folder)
        if formats.released.had_tuned_lens(saved, model_id):
            saved.settings_of("released")["tuned_lens"] = True  # what only the name may tell
        return cls.from_saved(saved, device, dtype)


def _check_one(folder: Path) -> None:
    """Raise InputError if a local folder is no run, and has some in it."""
    if (folder / "config.json").is_file() or not folder.is_dir():
        return
    inside = [
        path for path in formats.folders_in(folder) if (folder / path / "config.json").is_file()
    ]
    if inside:
        raise InputError(
            f"RUN must be the folder of one MLSAE, and {folder} has none but in folders of its "
            f"own; give one of these: {formats.listed([str(folder / path) for path in inside])}"
        )


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
            f"{first_line(error)}; run `hf auth login`, or push the run later (see README)"
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
            f"--push_to_hub {repo_id} failed: {first_line(error)}; the run in {folder} is whole: "
            f"push it with `hf upload {repo_id} {folder} . --exclude 'checkpoints/*'`"
        ) from error
    return str(commit.commit_url)
