"""Load a Hugging Face transformer: how much of it, in which dtype, and on which devices.

Legend: D width of the residual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn

from .. import builtin
from ..config import DataConfig
from ..errors import InputError, check_installed, first_line
from .residuals import find_blocks

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's own words
_SHARE = 0.9  # of a device's free memory, for the weights that accelerate places there
_PLAIN = (bool, int, float, str, list, tuple, type(None))


def load_config(name: str) -> Any:
    """The configuration of the language model in the transformer `name`: a small file."""
    with _named(name):
        return transformers.AutoConfig.from_pretrained(_source(name)).get_text_config()


def load_tokenizer(name: str) -> Any:
    """The tokenizer of the transformer `name`."""
    with _named(name):
        return transformers.AutoTokenizer.from_pretrained(_source(name))


def load_transformer(
    config: DataConfig, device: torch.device, n_layers: int | None = None, reserved: int = 0
) -> Any:
    """The causal language model that `config` names, ready to be read.

    It is on `device`, the SAE's, or where `model_device_map` puts it; of that map, `reserved`
    bytes of `device` are left free. It computes in `model_dtype`. With `n_layers`, the blocks
    above the first so many are not loaded, where the model allows it (see `_shortened`).

    Raises InputError if it cannot be had, or a package that it needs is not installed.
    """
    dtype: Any = config.model_dtype
    if dtype == "auto" and device.type != "cuda":
        dtype = torch.float32
    options: dict[str, Any] = {"dtype": dtype}
    if config.model_device_map is not None:
        check_installed("accelerate", "--model_device_map")
        _check_place(config.model_device_map)
        options["device_map"] = config.model_device_map
        if config.model_device_map in _STRATEGIES:
            options["max_memory"] = _free_memory(device, reserved)
    if config.model_quantize is not None:
        for package in ("accelerate", "bitsandbytes"):
            check_installed(package, "--model_quantize")
        token_mask = {f"load_in_{config.model_quantize}": True}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**token_mask)
        options.setdefault("device_map", {"": device})  # where bitsandbytes leaves it for good
    with _named(config.model):
        if n_layers is not None:
            options["config"] = _shortened(config.model, n_layers)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            _source(config.model), **options
        )
    if "device_map" not in options:
        model = model.to(device)
    return model.eval().requires_grad_(False)


def _source(name: str) -> str:
    return str(builtin.MODEL_DIR) if name == builtin.NAME else name


@contextmanager
def _named(name: str) -> Iterator[None]:
    """What goes wrong in loading the transformer `name`, as InputError."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"MODEL must be {builtin.NAME!r}, a local folder, or the name of a causal language "
            f"model on the Hugging Face hub, and {name!r} cannot be loaded: {first_line(error)}"
        ) from error


def _check_place(device_map: str) -> None:
    if device_map in _STRATEGIES:
        return
    try:
        torch.empty(1, device=device_map)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--model_device_map must be {', '.join(_STRATEGIES)}, or a device that is there, got "
            f"{device_map!r}: {first_line(error)}"
        ) from error


def _free_memory(device: torch.device, reserved: int) -> dict[int | str, int]:
    """Bytes that weights may take on each device, by accelerate's names of them."""
    from accelerate.utils import get_max_memory

    own = device.index if device.type == "cuda" else device.type
    free = {where: int(_SHARE * size) for where, size in get_max_memory().items()}
    return {where: max(0, size - reserved * (where == own)) for where, size in free.items()}


def _shortened(name: str, n_layers: int) -> Any:
    """The configuration of the transformer `name` with its first `n_layers` blocks only; the whole
    one where these would not be the same blocks.

    In some architectures what a block does depends on how many there are (blocks of Gemma 3n
    share the keys of earlier ones, counted from the end). So both models are built without
    weights, and the blocks compared.
    """
    whole = transformers.AutoConfig.from_pretrained(_source(name))
    short = copy.deepcopy(whole)
    text_config = short.get_text_config()
    if text_config.num_hidden_layers == n_layers:
        return whole
    text_config.num_hidden_layers = n_layers
    for types in ("layer_types", "mlp_layer_types"):  # whose lengths transformers checks
        if getattr(text_config, types, None) is not None:
            setattr(text_config, types, getattr(text_config, types)[:n_layers])
    with torch.device("meta"):
        one, other = (transformers.AutoModelForCausalLM.from_config(c) for c in (whole, short))
    same = all(map(_alike, find_blocks(one), find_blocks(other)))  # up to the shorter one's end
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (one, other)]
    return short if same and shapes[1].items() <= shapes[0].items() else whole


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are built of the same modules with the same plain attributes."""
    ones, others = list(one.modules()), list(other.modules())
    return len(ones) == len(others) and all(
        type(a) is type(b) and _plain(a) == _plain(b) for a, b in zip(ones, others, strict=True)
    )


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
