"""Whether a run that is resumed has the settings it began with, and how it was extended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from ..basis import Lens
from ..config import TrainConfig, shared_folder
from ..errors import InputError
from .inputs import INPUTS, Fingerprints

_FREE = (  # what may differ from the run that is resumed, since the result does not depend on it
    "out",
    "push_to_hub",
    "overwrite",
    "resume",
    "moved",
    "preset",
    # where it is computed
    "device",
    "model_device_map",
    "trust_remote_code",
    "shard_latents",
    "timeout",
    "micro_tokens",
    # when it gives up: bad records are skipped, whatever share is allowed
    "max_bad_records",
    # where the lens is: its maps are compared
    "lens",
    # how its text is read, which gives the same rows
    "token_cache",
    "no_token_cache",
    # how it is watched
    "log",
    "log_tokens",
    "eval_every",
    "eval_tokens",
    "checkpoint_minutes",
    "checkpoint_tokens",
    "keep_checkpoints",
)

_FIXED_BY_BATCHTOPK = "micro_tokens"  # it selects within a part of a batch

# What runs do whose checkpoints do not name these settings.
_BEFORE_THEY_WERE_SETTINGS = {
    "drop_positions": [],
    "drop_tokens": [],
    "drop_norm": "off",
    "dataset_split": "train",
    "heldout_share": 0.05,
    "sae.init": "unit",
    "sae.activation": "topk",
    "sae.k_max": None,
    "optimizer": "adam",
    "betas": [0.9, 0.999],
}


_WEIGHTS_SEED = "sae.seed"
_FLAGS = {_WEIGHTS_SEED: "seeds"}  # of settings that have another name on the command line


class History(NamedTuple):
    """What a checkpoint tells of a run beside its settings."""

    inputs: Fingerprints
    """Of what it reads: see `inputs`."""
    extensions: list[dict[str, int]]
    """Each time that --resume raised --tokens: {"at": tokens trained on by then, "from": --tokens
    before, "to": --tokens since}."""

    def first_tokens(self, config: TrainConfig) -> int:
        """--tokens as the run began. The peak learning rate, the warm-up and the tokens after
        which a latent is dead follow it, also when the run is extended."""
        return self.extensions[0]["from"] if self.extensions else config.tokens


def history_of(config: TrainConfig, inputs: Fingerprints, saved: dict[str, Any] | None) -> History:
    """The history of the run that goes on with `config` from the `saved` checkpoint, if any."""
    if saved is None:
        return History(inputs, [])
    extensions, before = list(saved.get("extensions", [])), saved["settings"]["tokens"]
    if config.tokens > before:
        at = next(iter(saved["runs"].values()))["trainer"]["tokens"]
        extensions.append({"at": at, "from": before, "to": config.tokens})
    return History(inputs, extensions)


def model_dtype_of(config: TrainConfig, saved: dict[str, Any] | None, device_type: str) -> Any:
    """The `model_dtype` that the run of `config` has. One that goes on from a `saved` checkpoint
    keeps what it began with, which auto may not give on this machine. In a checkpoint that does not
    tell, of 0.2 or before, that was float32 on a CPU."""
    if saved is None or config.data.model_dtype != "auto":
        return config.data.model_dtype
    return saved.get("model_dtype", "float32" if device_type == "cpu" else "auto")


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The settings by their names on the command line; JSON-serializable."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return settings.pop("data") | settings


def joint_settings(configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """The settings of SAEs that train together, as one command line names them: those of `sae`
    that differ are lists."""
    settings = settings_of(configs[0])
    saes = [settings_of(config)["sae"] for config in configs]
    for name in settings["sae"]:
        values = list(dict.fromkeys(sae[name] for sae in saes))
        settings["sae"][name] = values[0] if len(values) == 1 else values
    return settings | {"out": str(shared_folder(configs))}


def check_same(configs: Sequence[TrainConfig], saved: dict[str, Any]) -> None:
    """Raise InputError if `configs` would not continue the run of the `saved` settings. Its inputs
    are not compared here: see `inputs.check_inputs`."""
    before, free = _BEFORE_THEY_WERE_SETTINGS | _flat(saved), (*_FREE, *INPUTS, "tokens")
    if configs[0].sae.activation == "batchtopk":
        free = tuple(name for name in free if name != _FIXED_BY_BATCHTOPK)
    for name, value in _flat(joint_settings(configs)).items():
        if name == "tokens" and value < before[name]:
            raise InputError(
                f"--tokens must be at least {before[name]} to resume this run, as it began, got "
                f"{value}; give as many, or more to extend it"
            )
        if name not in free and value != before.get(name):
            flag = _FLAGS.get(name, name)
            raise InputError(
                f"--{flag} must be {_shown(before.get(name))} to resume this run, as it began, got "
                f"{_shown(value)}; give the same settings, or another --out"
            )


def differ_in_weights_seed(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs are one but for the seed of their initial weights, by what config.json says
    of their training: both ended, with the same settings and the same extensions.

    Settings that change no result may differ, as in a run that is resumed."""
    both = (one, other)
    if not all("heldout" in about and isinstance(about.get("training"), dict) for about in both):
        return False  # stopped before its end, or not trained here
    settings = [_BEFORE_THEY_WERE_SETTINGS | _flat(about["training"]) for about in both]
    seeds = [
        each.get("seed") if each.get(_WEIGHTS_SEED) is None else each[_WEIGHTS_SEED]
        for each in settings
    ]
    names = (settings[0].keys() | settings[1].keys()) - {*_FREE, _WEIGHTS_SEED}
    return (
        seeds[0] != seeds[1]
        and one.get("extensions") == other.get("extensions")
        and all(settings[0].get(name) == settings[1].get(name) for name in names)
    )


def check_lens(saved: dict[str, Any], lens: Lens | None) -> None:
    """Raise InputError unless the run of the `saved` checkpoint began with the maps of `lens`."""
    before: str | None = saved.get("lens")
    now = None if lens is None else lens.digest
    if before != now:
        began, given = ("without a lens" if x is None else f"with {x[:12]}…" for x in (before, now))
        raise InputError(
            f"--lens must be that which this run began with to resume it: it began {began} "
            f"(SHA-256 of the maps), got {given.replace('without a lens', 'none')}"
        )


def check_processes(configs: Sequence[TrainConfig], before: int, now: int) -> None:
    """Raise InputError if the number of processes that have tokens of their own differs from that
    `before`, and the result depends on it: batchtopk selects within a process."""
    if configs[0].sae.activation == "batchtopk" and before != now:
        raise InputError(
            f"the number of processes must be {before} to resume this run, as it began, since "
            f"--sae.activation batchtopk selects within a process, got {now}"
        )


def _shown(value: Any) -> str:
    """A setting as it is given on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
