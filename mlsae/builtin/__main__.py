"""Train the built-in language model anew.

    python -m mlsae.builtin --out runs/builtin            # about an hour on 2 cores
    python -m mlsae.builtin --out runs/builtin --resume   # go on where it stopped

It leaves a Hugging Face folder with a card, which ships as `mlsae/builtin/model`.

Legend: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

from ..errors import InputError, exit_on_bad_input
from . import SKIPPED_DIRS, corpus, read_text
from .card import write_card
from .scoring import Tokens, bigram_loss, heldout_loss, near_copies, tokenize

EOS = "<|endoftext|>"
VOCAB_SIZE = 4096
STATE = "state.pt"
_EXTRA_DISTRIBUTIONS = (
    "torch",
    "numpy",
    "pandas",
    "sympy",
    "networkx",
    "datasets",
    "huggingface_hub",
    "fsspec",
    "Jinja2",
    "rich",
    "Pygments",
    "setuptools",
)


def dependency_sources() -> Iterator[str]:
    """Yield the Python sources of some installed dependencies: further training text."""
    for name in _EXTRA_DISTRIBUTIONS:
        for file in sorted(distribution(name).files or []):
            token_mask = file.suffix == ".py" and SKIPPED_DIRS.isdisjoint(file.parts)
            if token_mask and (text := read_text(Path(str(file.locate())))):
                yield text


@dataclass(frozen=True)
class BuiltinConfig:
    """How the built-in model is trained."""

    out: Path
    """Folder for the model and, while training, its resumable state."""
    resume: bool = False
    """Go on from the state in `out`."""
    tokens: int = 13_000_000
    """Tokens to train on."""
    stdlib_epochs: int = 3
    """Passes over the standard library; the other sources fill the rest of the tokens."""
    d_model: int = 192
    """Width of the residual stream."""
    n_layers: int = 6
    """Transformer blocks."""
    n_heads: int = 6
    """Attention heads a block."""
    seq_len: int = 512
    """Tokens a row (T)."""
    batch_rows: int = 16
    """Rows a step (B)."""
    lr: float = 4e-3
    """Peak learning rate, of Muon for the blocks' matrices and of AdamW for the rest."""
    warmup_share: float = 0.02
    """Share of the steps over which the learning rate rises; it then falls as a cosine."""
    save_every: int = 100
    """Steps between two states saved."""
    seed: int = 0
    """Seed of the initial weights and of the order of rows."""


def train_tokenizer(documents: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `VOCAB_SIZE` tokens, the first of them EOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=EOS, eos_token=EOS)


def _token_files(config: BuiltinConfig) -> tuple[Tokens, ...]:
    """The tokens of the library's train files, the other sources and the held-out files."""
    paths = [config.out / f"tokens-{name}.npy" for name in ("train", "extra", "heldout")]
    if not all(path.exists() for path in paths):
        print("training the tokenizer", flush=True)
        tokenizer = train_tokenizer(corpus("train"))
        tokenizer.save_pretrained(config.out)
        texts = (corpus("train"), dependency_sources(), corpus("heldout"))
        for path, documents in zip(paths, texts, strict=True):
            np.save(path, tokenize(tokenizer, documents, path.stem))
    return tuple(np.load(path) for path in paths)


def _row_order(config: BuiltinConfig, n_train: int, n_extra: int) -> np.ndarray[Any, Any]:
    """Which row of [train; extra] each row of the run reads: seeded, the same when resumed."""
    generator = np.random.default_rng(config.seed)
    n_rows = config.tokens // config.seq_len
    own = np.tile(np.arange(n_train), config.stdlib_epochs)[:n_rows]
    rest = n_rows - len(own)
    passes = math.ceil(rest / max(n_extra, 1))
    extra = np.concatenate([generator.permutation(n_extra) for _ in range(passes)] or [own[:0]])
    return generator.permutation(np.concatenate([own, n_train + extra[:rest]]))


def _optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (orthogonalized momentum) for the blocks' matrices, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        # torch.optim.Muon came with torch 2.9: the one thing here that 2.8 lacks.
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
    """Train tokenizer and model, and leave a Hugging Face folder with a card in `config.out`."""
    if config.resume and not (config.out / STATE).exists():
        raise InputError(f"--resume needs a state saved in --out, got none in {config.out}")
    config.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # Data: one array of rows, visited in a seeded order.
    tokens = _token_files(config)
    length = config.seq_len
    parts = [ids[: len(ids) // length * length].reshape(-1, length) for ids in tokens[:2]]
    rows, order = np.concatenate(parts), _row_order(config, *map(len, parts))

    torch.manual_seed(config.seed)
    model = _new_model(config).to(device)
    seconds = _fit(config, model, rows, order)
    _ship(config, model, tokens, seconds)


def _fit(
    config: BuiltinConfig,
    model: Any,
    rows: np.ndarray[Any, Any],
    order: np.ndarray[Any, Any],
) -> float:
    """Train on `rows` (R, T) in their `order`, saving a resumable state; return the seconds."""
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
        chosen = order[step * config.batch_rows : (step + 1) * config.batch_rows]
        batch = torch.from_numpy(rows[chosen].astype(np.int64)).to(device)  # (B, T)
        # On CPUs bf16 autocast measured 1.6 times slower than float32 at this size.
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
    """Save bf16 weights, and a card with the loss of exactly those."""
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
            "sources": ", ".join(f"{name} {version(name)}" for name in _EXTRA_DISTRIBUTIONS),
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
