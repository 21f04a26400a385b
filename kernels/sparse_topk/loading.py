"""What `from_pretrained` makes of its keywords: here, and in other modules that load from the hub.

Apart from `hub`, for other packages to use.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch

_KEYWORDS = (
    "device", "dtype", "revision", "token", "cache_dir", "force_download", "local_files_only",
)  # fmt: skip
_OURS = {"torch_dtype": "dtype", "map_location": "device", "device_map": "device"}


def refuse_unknown(keywords: Mapping[str, Any]) -> None:
    """Raise TypeError if there are any, and name the one that was probably meant."""
    for name in keywords:
        meant = _OURS.get(name) or next(iter(get_close_matches(name, _KEYWORDS, 1)), None)
        hint = f"did you mean {meant}?" if meant else f"there are {', '.join(_KEYWORDS)}"
        raise TypeError(f"from_pretrained() got an unexpected keyword argument {name!r}; {hint}")


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype to load weights in, as transformers takes it: a torch.dtype or its name, such as
    "bfloat16". None if it is "auto" or None: that of the file.

    Raises ValueError if it is no floating-point dtype.
    """
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            'dtype must be a floating-point torch.dtype, its name, such as "bfloat16", or "auto", '
            f"got {dtype!r}"
        )
    return found
