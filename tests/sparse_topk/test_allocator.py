"""Freed memory is kept. Tested in a process of its own, because the setting is the process's."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import torch
from sparse_topk import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for i in range(15):
    if i == 10:  # malloc has found its pages
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1.0)  # 64 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_large_tensors_use_the_same_pages_again():
    def faults(mode):
        command = [sys.executable, "-c", CODE, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("default") > 10 * faults("keep")
