import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

from recipe.base.errors import UserError
from recipe.run.launch import INDUCTOR_CACHE, keep_compiled, on_main, start_accelerator
from testing.helpers import PYTHONPATH, ROOT


@pytest.mark.parametrize(
    ("engine", "version", "precision", "expected"),
    [
        ("DEEPSPEED", 2, "no", "only one process, DDP and FSDP2;"),
        ("FSDP", 1, "no", "`fsdp_version` is 1"),
        ("FSDP", 2, "fp16", "fp16, which FSDP2 does not support"),
    ],
)
def test_engines_that_are_not_supported_are_refused(monkeypatch, accelerator, engine, version, precision, expected):
    shared = accelerator.state._shared_state
    shared["distributed_type"], shared["_mixed_precision"] = DistributedType[engine], precision
    shared["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=version)
    monkeypatch.setattr("recipe.run.launch.Accelerator", lambda **kwargs: accelerator)
    with pytest.raises(UserError, match=expected):
        start_accelerator(serves_fsdp=True)
    with pytest.raises(UserError, match="only one process and DDP;"):
        start_accelerator()


def test_bf16_under_fsdp_keeps_sums_in_float32(monkeypatch, accelerator):
    shared = accelerator.state._shared_state
    shared["distributed_type"], shared["_mixed_precision"] = DistributedType.FSDP, "bf16"
    shared["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2)
    monkeypatch.setattr("recipe.run.launch.Accelerator", lambda **kwargs: accelerator)
    policy = start_accelerator(serves_fsdp=True).state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)


def test_errors_of_the_main_process_are_raised_with_their_message(accelerator):
    def fail() -> None:
        raise UserError("`field` is 3; give 2")

    assert on_main(accelerator, lambda: 7) == 7
    with pytest.raises(UserError, match="`field` is 3; give 2"):
        on_main(accelerator, fail)


def test_hook_for_gradients_needs_gpus(monkeypatch, accelerator):
    accelerator.state._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    monkeypatch.setattr("recipe.run.launch.Accelerator", lambda **kwargs: accelerator)
    with pytest.raises(
        UserError, match=r"`ddp_comm_hook` is bf16, which is for DDP on GPUs, .* MULTI_CPU; leave it out"
    ):
        start_accelerator(ddp_comm_hook="bf16")


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({"WORLD_SIZE": "2"}, "2"),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "more than 1"),
    ],
)
def test_processes_that_would_train_each_alone_are_refused(monkeypatch, accelerator, environment, number):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("recipe.run.launch.Accelerator", lambda **kwargs: accelerator)
    with pytest.raises(UserError, match=rf"`num_processes` of the launcher is {number}, and accelerate trains on 1 "):
        start_accelerator()


# Two processes whose devices talk by something else, as those with GPUs do by nccl.
COUNTS = """
import numpy as np
from torch import distributed
from recipe.run.launch import host_group, sum_over_hosts

distributed.init_process_group("gloo")
rank, distributed.get_backend = distributed.get_rank(), lambda: "nccl"
total = sum_over_hosts(np.array([rank, 1, 2**53 + rank]))
assert total.tolist() == [1, 2, 2**54 + 1]
assert host_group() is not None and host_group() is host_group()
distributed.destroy_process_group()
"""


def test_hosts_add_up_integers_by_a_group_of_their_own(tmp_path: Path):
    script = tmp_path / "counts.py"
    script.write_text(COUNTS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def test_what_is_compiled_is_kept_beside_the_caches_of_hugging_face(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("recipe.run.launch.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(INDUCTOR_CACHE, "chosen")
    keep_compiled()
    assert os.environ[INDUCTOR_CACHE] == "chosen"
    assert not (tmp_path / "home").exists()
    monkeypatch.delenv(INDUCTOR_CACHE)
    keep_compiled()
    assert Path(os.environ[INDUCTOR_CACHE]) == tmp_path / "home" / "torchinductor"
    (tmp_path / "file").touch()
    monkeypatch.delenv(INDUCTOR_CACHE)
    monkeypatch.setattr("recipe.run.launch.HF_HOME", str(tmp_path / "file"))  # no folder can be made in it
    keep_compiled()
    assert INDUCTOR_CACHE not in os.environ
