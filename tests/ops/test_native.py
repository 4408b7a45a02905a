"""C++ loops: compiled once, left out where they cannot run, and never in the way."""

import ctypes
import subprocess
from pathlib import Path
from shutil import which

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from opsin.ops import native

SUM = """
extern "C" void sum(const float* x, float* out, long n) {
    out[0] = 0;
    for (long i = 0; i < n; ++i) out[0] += x[i];
}
"""
needs_compiler = pytest.mark.skipif(not any(map(which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file that nobody compiled yet, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPSIN_NATIVE", raising=False)
    path = tmp_path / "sum.cpp"
    path.write_text(SUM)
    native.library.cache_clear()
    yield path
    native.library.cache_clear()
    native.loop.cache_clear()


@needs_compiler
def test_a_function_of_a_file(source):
    x, out = torch.rand(10), torch.empty(1)
    native.loop(str(source), "sum", "ppl")(x.data_ptr(), out.data_ptr(), 10)
    assert torch.allclose(out, x.sum())


@needs_compiler
def test_it_is_compiled_once_until_it_changes(source, monkeypatch):
    assert isinstance(native.library(source), ctypes.CDLL)
    made = list((source.parent / "cache" / "opsin").iterdir())
    assert len(made) == 1, "nothing but the library is left behind"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
    native.library.cache_clear()
    assert native.library(source) is not None
    source.write_text(SUM + "// changed")
    native.library.cache_clear()
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        native.library(source)


@needs_compiler
def test_files_share_a_header_and_change_with_it(source, monkeypatch):
    again = "spread(n, 1, [=](long i) { out[0] += x[i]; });\nfor"
    source.write_text('#include "native.h"\n' + SUM.replace("for", again))
    x, out = torch.rand(10), torch.empty(1)
    native.loop(str(source), "sum", "ppl")(x.data_ptr(), out.data_ptr(), 10)
    assert torch.allclose(out, 2 * x.sum())
    shared = source.parent / "elsewhere" / "native.h"
    shared.parent.mkdir()
    shared.write_bytes(native.HEADER.read_bytes() + b"// changed")
    monkeypatch.setattr(native, "HEADER", shared)
    native.library.cache_clear()
    assert native.library(source) is not None
    source.with_name("beside.h").write_text("// new")
    native.library.cache_clear()
    assert native.library(source) is not None
    assert len(list((source.parent / "cache" / "opsin").iterdir())) == 3


def openmp_libraries() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if "libgomp" in line or "libomp" in line}


@needs_compiler
@pytest.mark.skipif(not native.threading(), reason="PyTorch has another OpenMP than compilers link")
def test_threads_are_those_of_pytorch(source, monkeypatch):
    source.write_text(SUM.replace("for", "\n#pragma omp parallel for reduction(+ : out[0])\nfor"))
    x, out, before = torch.ones(1000), torch.empty(1), openmp_libraries()
    native.loop(str(source), "sum", "ppl")(x.data_ptr(), out.data_ptr(), 1000)
    assert out == 1000 and openmp_libraries() == before
    monkeypatch.setattr(native, "threading", lambda: ())
    native.library.cache_clear()
    native.loop.cache_clear()
    native.loop(str(source), "sum", "ppl")(x.data_ptr(), out.data_ptr(), 1000)
    assert out == 1000 and len(list((source.parent / "cache" / "opsin").iterdir())) == 2


def test_no_compiler_or_no_wish_is_no_loop(source, monkeypatch):
    monkeypatch.setenv("OPSIN_NATIVE", "0")
    assert native.library(source) is None and native.loop(str(source), "sum", "ppl") is None
    monkeypatch.delenv("OPSIN_NATIVE")
    native.library.cache_clear()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(native, "which", lambda name: None)
        assert native.library(source) is None
    native.library.cache_clear()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(native.os, "name", "nt")
        assert native.library(source) is None


@needs_compiler
@pytest.mark.parametrize("wrong", ["source", "cache", "home"])
def test_what_cannot_be_compiled_says_so_in_a_sentence(source, wrong, monkeypatch):
    if wrong == "source":
        source.write_text("no C++")
    elif wrong == "home":
        monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-has-this-name/cache")
    else:
        (source.parent / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(source.parent / "file"))
    with pytest.warns(UserWarning, match=r"sum.cpp was not compiled .*OPSIN_NATIVE=0"):
        assert native.library(source) is None


def test_loops_take_plain_tensors_of_which_nothing_is_recorded():
    x = torch.zeros(2)
    assert native.takes(x)
    assert not native.takes(x.double()) and not native.takes(x.to("meta")) and not native.takes(nn.Parameter(x))
    needed = torch.zeros(2, requires_grad=True)
    assert not native.takes(needed)
    with torch.no_grad():
        assert native.takes(needed)
    with FakeTensorMode() as mode:
        assert not native.takes(mode.from_tensor(x))
    seen = []
    torch.vmap(lambda row: (seen.append(native.takes(row)), row)[1])(torch.zeros(2, 2))
    torch.jit.trace(lambda x: (seen.append(native.takes(x)), x + 1)[1], x, check_trace=False)
    assert seen == [False, False]


def test_graphs_do_not_know_of_loops():
    class Chosen(nn.Module):
        def forward(self, x):
            return x + 1 if native.takes(x) else x - 1

    x = torch.zeros(2)
    assert torch.equal(Chosen()(x), x + 1)
    assert torch.equal(torch.export.export(Chosen(), (x,)).module()(x), x - 1)
    assert torch.equal(torch.compile(Chosen(), backend="eager", fullgraph=True)(x), x - 1)


@needs_compiler
@pytest.mark.parametrize("path", sorted(Path(native.__file__).parents[1].rglob("*.cpp")), ids=lambda path: path.stem)
def test_the_package_s_own_files_compile(source, path, recwarn):
    """Elsewhere the tests of loops that cannot be had are skipped."""
    assert native.library(path) is not None and not recwarn.list
