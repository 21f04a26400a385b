"""The K largest scores of each token. In reading order:

dispatch.py   `topk_encode`, and which of two ways to take
product.py    the fused way: a matrix product whose scores never leave the registers
chunked.py    the other way: torch.mm into a bounded workspace, a chunk of tokens at a time
keys.py       scores as integers in the same order
select.py     the exact K largest, from the best of each group of latents
rescore.py    what only a few groups need: their scores, computed again
"""

from .dispatch import topk_encode

__all__ = ["topk_encode"]
