"""Memory that a training frees stays in the process, where the C library can be told so."""

import subprocess
import sys

import pytest

from opsin.train import allocator

FAULTS = """
import resource, sys, torch
from opsin.train.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.empty(2**24).fill_(1.0)  # 64 MiB: 16384 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


def run(mode: str, env: dict[str, str] | None = None) -> tuple[str, int]:
    out = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True, env=env)
    kept, faults = out.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' allocators are left alone")
def test_pages_are_not_fetched_again(monkeypatch):
    for name in [name for name in allocator.os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    kept, faults = run("keep")
    if kept == "False":
        pytest.skip("the C library is not GNU's")
    _, without = run("leave")
    assert faults < 100 < without


def test_what_the_user_has_tuned_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not allocator.keep_freed_memory()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()
