"""The K largest scores of each token, by two kernels. In reading order:

encode.py    `topk_encode`: how many keys to keep, and the two launches
product.py   a matrix product whose scores never leave the registers: it keeps the T largest of
             each group of latents, as keys
keys.py      scores as integers in the same order
select.py    the exact K largest of a row, from its keys
reopen.py    what few rows need: groups that may hide more, computed again
"""

from .encode import topk_encode

__all__ = ["topk_encode"]
