"""Load a Hugging Face transformer: as many of its blocks as are read, in which dtype, and on which
devices."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn

from .. import builtin
from ..errors import InputError, check_installed, first_line
from .config import DataConfig
from .residuals import find_blocks

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's own words
_USABLE = 0.9  # of a device's free memory, for the weights that accelerate places there
_SETTING_TYPES = (bool, int, float, str, list, tuple, type(None))


def load_config(name: str) -> Any:
    """The configuration of the language model in the transformer `name`: a small file."""
    with _raise_unloadable(name):
        return transformers.AutoConfig.from_pretrained(_path_or_id(name)).get_text_config()


def load_tokenizer(name: str) -> Any:
    """The tokenizer of the transformer `name`."""
    with _raise_unloadable(name):
        return transformers.AutoTokenizer.from_pretrained(_path_or_id(name))


def load_transformer(
    config: DataConfig, device: torch.device, n_layers: int | None = None, reserved: int = 0
) -> Any:
    """The causal language model that `config` names, without dropout and gradients.

    It is on `device`, the SAE's, or where `model_device_map` puts it, which leaves `reserved` bytes
    of `device` free. It computes in `model_dtype`. With `n_layers`, only the first so many blocks
    are loaded, if the architecture allows it (see `_shortened_config`).

    Raises InputError if the model cannot be loaded, or a package that it needs is not installed.
    """
    dtype: Any = config.model_dtype
    if dtype == "auto" and device.type != "cuda":
        dtype = torch.float32
    options: dict[str, Any] = {"dtype": dtype}
    if config.model_device_map is not None:
        check_installed("accelerate", "--model_device_map")
        _check_device_map(config.model_device_map)
        options["device_map"] = config.model_device_map
        if config.model_device_map in _STRATEGIES:
            options["max_memory"] = _free_memory(device, reserved)
    if config.model_quantize is not None:
        for package in ("accelerate", "bitsandbytes"):
            check_installed(package, "--model_quantize")
        bits = {f"load_in_{config.model_quantize}": True}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**bits)
        options.setdefault("device_map", {"": device})  # bitsandbytes forbids moving it later
    with _raise_unloadable(config.model):
        if n_layers is not None:
            options["config"] = _shortened_config(config.model, n_layers)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            _path_or_id(config.model), **options
        )
    if "device_map" not in options:
        model = model.to(device)
    return model.eval().requires_grad_(False)


def _path_or_id(name: str) -> str:
    return str(builtin.MODEL_DIR) if name == builtin.NAME else name


@contextmanager
def _raise_unloadable(name: str) -> Iterator[None]:
    """Raise InputError if loading the transformer `name` fails."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"MODEL must be {builtin.NAME!r}, a local folder, or the name of a causal language "
            f"model on the Hugging Face hub, and {name!r} cannot be loaded: {first_line(error)}"
        ) from error


def _check_device_map(device_map: str) -> None:
    """Raise InputError if `device_map` is neither a strategy nor a device of this machine."""
    if device_map in _STRATEGIES:
        return
    try:
        torch.empty(1, device=device_map)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--model_device_map must be {', '.join(_STRATEGIES)}, or a device of this machine, "
            f"got {device_map!r}: {first_line(error)}"
        ) from error


def _free_memory(device: torch.device, reserved: int) -> dict[int | str, int]:
    """Bytes that weights may take on each device, by accelerate's name for it."""
    from accelerate.utils import get_max_memory

    sae_device = device.index if device.type == "cuda" else device.type
    usable = {name: int(_USABLE * size) for name, size in get_max_memory().items()}
    return {name: max(0, size - reserved * (name == sae_device)) for name, size in usable.items()}


def _shortened_config(name: str, n_layers: int) -> Any:
    """The configuration of the transformer `name`, cut to its first `n_layers` blocks, or the whole
    one if the cut would change those blocks.

    In some architectures a block depends on how many there are: the last blocks of Gemma 3n share
    the keys of earlier ones, counted from the end. So both models are built without weights, and
    their blocks compared.
    """
    whole_config = transformers.AutoConfig.from_pretrained(_path_or_id(name))
    short_config = copy.deepcopy(whole_config)
    text_config = short_config.get_text_config()
    if text_config.num_hidden_layers == n_layers:
        return whole_config
    text_config.num_hidden_layers = n_layers
    for types in ("layer_types", "mlp_layer_types"):  # transformers checks their lengths
        if getattr(text_config, types, None) is not None:
            setattr(text_config, types, getattr(text_config, types)[:n_layers])
    with torch.device("meta"):
        whole = transformers.AutoModelForCausalLM.from_config(whole_config)
        short = transformers.AutoModelForCausalLM.from_config(short_config)
    pairs = zip(find_blocks(whole), find_blocks(short), strict=False)  # the first n_layers
    same_blocks = all(_same_structure(*pair) for pair in pairs)
    same_shapes = _parameter_shapes(short).items() <= _parameter_shapes(whole).items()
    return short_config if same_blocks and same_shapes else whole_config


def _same_structure(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules consist of modules of the same types with the same settings."""
    a_parts, b_parts = list(a.modules()), list(b.modules())
    return len(a_parts) == len(b_parts) and all(
        type(a_part) is type(b_part) and _settings(a_part) == _settings(b_part)
        for a_part, b_part in zip(a_parts, b_parts, strict=True)
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are plain values, not tensors or modules."""
    attributes = vars(module).items()
    return {name: value for name, value in attributes if isinstance(value, _SETTING_TYPES)}


def _parameter_shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}
