"""The sizes of a trained SAE that `--init_from` names, as defaults of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..config import TrainArguments
from ..errors import InputError


def sized_as_init(default: TrainArguments, arguments: Sequence[str]) -> TrainArguments:
    """`default`, with the latents, k, standardization and activation of the SAE that `--init_from`
    names on a command line, if it does: they need not be given. If they are, `check_fits` compares
    them."""
    # tyro takes its defaults before it parses, so the argument is read first.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--init_from", "--init-from", dest="init_from", nargs="?")
    parser.add_argument("--sae.expansion", dest="expansion", nargs="*")
    given, _ = parser.parse_known_args(arguments)
    if given.init_from is None:
        return default
    from .init_from import read_initial  # with torch, which --help does not wait for

    with suppress(InputError):  # training says what is wrong, in one line for all processes
        saved = read_initial(given.init_from)
        sizes: dict[str, Any] = {"k": (saved.k,), "standardize": saved.standardize}
        if saved.activation == "batchtopk":
            sizes |= {"activation": "batchtopk", "k_max": saved.k_max}
        expansion, rest = divmod(saved.n_latents, saved.d_in)
        if not rest:
            sizes["expansion"] = (expansion,)
        elif given.expansion is None:
            sizes["n_latents"] = (saved.n_latents,)
        return replace(default, sae=replace(default.sae, **sizes))
    return default
