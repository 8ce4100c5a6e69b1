"""The kernels themselves are tested in `interpreted_kernels.py`; here, what needs a process without the interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode

from recipe.modeling import kernels
from recipe.modeling.kernels import dropout_add_norm, dropout_add_norm_sum, shape_of_work, why_no_kernels
from testing.helpers import PYTHONPATH, ROOT

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="needs triton")


@needs_triton
@pytest.mark.parametrize("kind", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_kernels_pass_their_tests_in_the_interpreter(kind):
    """In a process of its own, since it is chosen when the module is imported; without the fixtures of other tests."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-m", kind]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    file = "tests/modeling/interpreted_kernels.py"
    tests = subprocess.run([*command, file], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert tests.returncode == 0, tests.stdout + tests.stderr


@needs_triton
@pytest.mark.parametrize("width", [768, 1024, 8192])
@pytest.mark.parametrize("dropped", [0, 429496730])
@pytest.mark.parametrize("keeps_sum", [False, True])
def test_kernels_compile_for_a_hopper(dropped, width, keeps_sum, tmp_path: Path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if not Path(triton.knobs.nvidia.ptxas.path).exists():
        pytest.skip("needs ptxas")
    types = {"weight": "*fp32", "bias": "*fp32", "statistics": "*fp32", "sums": "*fp32", "num_rows": "i32"}
    work = {"DROPPED": dropped, "EPS": 1e-5} | shape_of_work(width)
    options = {"num_warps": work.pop("num_warps")}
    work |= {} if dropped else {"seed": None}
    work |= {} if keeps_sum else {"summed": None, "grad_summed": None}
    for kernel in (kernels.forward_kernel, kernels.backward_kernel):
        names = kernel.arg_names
        constants = {name: work[name] for name in names if name in work}
        if keeps_sum and kernel is kernels.backward_kernel:
            constants["hidden"] = None
        signature = {name: "constexpr" if name in constants else types.get(name, "*bf16") for name in names}
        signature |= {"seed": "*i64"} if dropped else {}
        aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if signature[name].startswith("*")}
        source = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, GPUTarget("cuda", 90, 32), options)
        ptx = compiled.asm["ptx"]
        assert "sm_90" in ptx
        assert len(compiled.asm["cubin"]) > 1000
        assert ".local" not in ptx  # the row stays in registers
        assert "ld.global.v4" in ptx  # 16 bytes at once
        assert not re.search(r"ld\.global\.\w*16 ", ptx)
        # A row's place is a number of 64 bits, and the next row is on its way while one is computed.
        assert re.search(r"tt.addptr .*xi64", compiled.asm["ttir"])
        assert ("cp.async" in ptx) == (kernel is kernels.backward_kernel)


class Driver:
    """What Triton and torch ask a card's driver when they look into a kernel."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@needs_triton
def test_torch_compile_sees_what_the_kernels_write(monkeypatch):
    from triton.runtime import driver

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(driver, "_active", Driver())
    with FakeTensorMode():  # nothing runs
        norm, seed = nn.LayerNorm(96), torch.tensor(1)

        @torch.compile(fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
        def run(hidden, residual):
            ours = dropout_add_norm(hidden, residual, norm, 0.1, seed, torch.bfloat16)
            ours = dropout_add_norm(ours.tanh(), ours, norm, 0.0, None, torch.bfloat16)
            ours, summed = dropout_add_norm_sum(ours, ours, norm, 0.1, seed)
            return ours + summed

        hidden, residual = torch.empty(2, 4, 5, 96, requires_grad=True)
        run(hidden.bfloat16(), residual).sum().backward()
    written = [
        node.kwargs["tensors_to_clone"]
        for graph in graphs
        for node in graph.graph.nodes
        if "triton_kernel_wrapper_functional" in str(node.target)
    ]
    forward, backward = ["normed", "statistics"], ["grad_residual", "sums"]
    assert written[:3] == [forward, forward, [*forward, "summed"]]
    assert written[3:] == [["grad_hidden", *backward], backward, ["grad_hidden", *backward]]


@pytest.mark.parametrize(
    ("triton", "reason"),
    [
        (None, "Triton cannot be imported (ModuleNotFoundError: No module named 'triton')"),
        ("raise OSError('libcuda is\\nnot there')", "Triton cannot be imported (OSError: libcuda is not there)"),
        ("language = None", "Triton cannot be imported (AttributeError: module 'triton' has no attribute 'knobs')"),
    ],
)
def test_module_imports_where_triton_is_missing_or_broken(triton, reason, tmp_path: Path):
    (tmp_path / "triton.py").write_text(
        triton or "raise ModuleNotFoundError(\"No module named 'triton'\")", encoding="utf-8"
    )
    code = "import torch; from recipe.modeling.kernels import why_no_kernels as why; print(why(torch.device('cuda')))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), PYTHONPATH])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == f"{reason}\n"


@needs_triton
def test_devices_without_kernels_are_named(monkeypatch):
    why = why_no_kernels.__wrapped__
    assert why(torch.device("cpu")) == "there are none for the device cpu"
    cuda = torch.device("cuda")
    if not torch.cuda.is_available():
        assert "CUDA" in why(cuda) or "NVIDIA" in why(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert why(cuda) == "Tesla T4 has not the compute capability 8.0 that bfloat16 needs"
    assert why(cuda, 8193) == "the width 8,193 is over 8,192"
