"""Retrain the built-in language model.

    python -m mlsae.builtin --out runs/builtin            # about an hour on 2 cores
    python -m mlsae.builtin --out runs/builtin --resume   # resume after an interruption

The result is a Hugging Face model folder with a model card; `mlsae/builtin/model` is one.

Legend: B rows per step, R rows in all, T positions.
"""

from __future__ import annotations

import math
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

from ..errors import InputError, exit_on_bad_input
from . import corpus
from .card import write_card
from .scoring import Tokens, bigram_loss, heldout_loss, near_copies, tokenize
from .sources import (
    DEPENDENCIES,
    VOCAB_SIZE,
    dependency_sources,
    load_tokens,
    row_order,
    split_rows,
)

STATE = "state.pt"


@dataclass(frozen=True)
class BuiltinConfig:
    """How the built-in model is trained."""

    out: Path
    """Folder for the model and, during training, the state to resume from."""
    resume: bool = False
    """Resume from the state in `out`."""
    tokens: int = 13_000_000
    """Tokens to train on."""
    stdlib_epochs: int = 3
    """Passes over the standard library; other sources make up the rest of the tokens."""
    d_model: int = 192
    """Width of the residual stream."""
    n_layers: int = 6
    """Transformer blocks."""
    n_heads: int = 6
    """Attention heads per block."""
    seq_len: int = 512
    """Tokens per row (T)."""
    batch_rows: int = 16
    """Rows per step (B)."""
    lr: float = 4e-3
    """Peak learning rate: of Muon for the blocks' matrices, and of AdamW for the rest."""
    warmup_share: float = 0.02
    """Share of the steps over which the learning rate rises linearly; it then falls as a cosine."""
    save_every: int = 100
    """Steps between saved states."""
    seed: int = 0
    """Seed of the initial weights and of the order of the rows."""


def _optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (orthogonalized momentum) for the blocks' matrices, AdamW for the other parameters."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in matrix_ids]
    return [
        # torch.optim.Muon needs torch 2.9; the rest of the project runs on 2.8.
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def _new_model(config: BuiltinConfig) -> Any:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            intermediate_size=4 * config.d_model,
            max_position_embeddings=config.seq_len,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def train(config: BuiltinConfig) -> None:
    """Train the tokenizer and the model, and write a Hugging Face model folder to `config.out`."""
    if config.resume and not (config.out / STATE).exists():
        raise InputError(f"--resume needs a saved state in --out, and {config.out} has none")
    config.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    tokens = load_tokens(config.out)
    own, extra = (split_rows(ids, config.seq_len) for ids in tokens[:2])
    n_rows = config.tokens // config.seq_len
    order = row_order(config.seed, n_rows, len(own), len(extra), config.stdlib_epochs)

    torch.manual_seed(config.seed)
    model = _new_model(config).to(device)
    seconds = _fit(config, model, np.concatenate([own, extra]), order)
    _ship(config, model, tokens, seconds)


def _fit(
    config: BuiltinConfig,
    model: Any,
    rows: np.ndarray[Any, Any],
    order: np.ndarray[Any, Any],
) -> float:
    """Train on `rows` (R, T) in the given `order`, saving states; returns the seconds it took."""
    optimizers = _optimizers(model, config.lr)
    device, state_path = model.device, config.out / STATE
    first_step, seconds, losses = 0, 0.0, []
    if config.resume:
        state = torch.load(state_path, weights_only=True)
        first_step, seconds, losses = state["step"], state["seconds"], state["losses"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    n_steps = len(order) // config.batch_rows
    started = time.perf_counter() - seconds
    bar = tqdm(range(first_step, n_steps), initial=first_step, total=n_steps, unit=" steps")
    for step in bar:
        decay = 0.5 * (1 + math.cos(math.pi * step / n_steps))
        lr = config.lr * min((step + 1) / (config.warmup_share * n_steps + 1), decay)
        indices = order[step * config.batch_rows : (step + 1) * config.batch_rows]
        batch = torch.from_numpy(rows[indices].astype(np.int64)).to(device)  # (B, T)
        # On CPUs, bf16 autocast measured 1.6 times slower than float32 at this size.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}; lower --lr")
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
        if (step + 1) % config.save_every == 0 or step + 1 == n_steps:
            state = {
                "step": step + 1,
                "seconds": time.perf_counter() - started,
                "losses": losses,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            torch.save(state, state_path.with_suffix(".tmp"))
            os.replace(state_path.with_suffix(".tmp"), state_path)
    return time.perf_counter() - started


def _ship(config: BuiltinConfig, model: Any, tokens: tuple[Tokens, ...], seconds: float) -> None:
    """Save bf16 weights, and a model card with the loss of exactly these weights."""
    device, length = model.device, config.seq_len
    train_ids, _, heldout_ids = tokens
    heldout = list(corpus("heldout"))
    copied = near_copies(heldout, dependency_sources())
    originals = [text for text, copy in zip(heldout, copied, strict=True) if not copy]
    no_tables = [text for text in heldout if "Python Character Mapping Codec" not in text[:300]]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.out)
    model.to(torch.bfloat16).save_pretrained(config.out)
    shipped: Any = AutoModelForCausalLM.from_pretrained(config.out, dtype=torch.float32)
    shipped.to(device)
    n_steps = config.tokens // length // config.batch_rows
    cuda = device.type == "cuda"
    write_card(
        config.out,
        {
            "heldout_loss": heldout_loss(shipped, heldout_ids, length),
            "loss_without_tables": heldout_loss(shipped, tokenize(tokenizer, no_tables), length),
            "loss_without_copies": heldout_loss(shipped, tokenize(tokenizer, originals), length),
            "n_copies": sum(copied),
            "n_heldout": len(heldout),
            "bigram_loss": bigram_loss(train_ids, heldout_ids, VOCAB_SIZE),
            "heldout_tokens": len(heldout_ids),
            "train_tokens": n_steps * config.batch_rows * length,
            "library_tokens": len(train_ids),
            "library_epochs": config.stdlib_epochs,
            "parameters": sum(p.numel() for p in shipped.parameters()),
            "hours": seconds / 3600,
            "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
            "python": platform.python_version(),
            "sources": ", ".join(f"{name} {version(name)}" for name in DEPENDENCIES),
            "recipe": f"Muon and AdamW, peak learning rate {config.lr}, {n_steps} steps of "
            f"{config.batch_rows} rows of {length} tokens, seed {config.seed}",
        },
    )


def main() -> None:
    """The program."""
    config = tyro.cli(
        BuiltinConfig,
        description=(__doc__ or "").split("Legend:")[0],
        use_underscores=True,
        prog="python -m mlsae.builtin",
    )
    with exit_on_bad_input():
        train(config)


if __name__ == "__main__":
    main()
