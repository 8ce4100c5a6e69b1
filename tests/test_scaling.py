"""Several machines and engines, and a run that goes from one to another."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from recipe.average import average_run, parse_options
from testing.helpers import PATIENCE_SECONDS, PYTHONPATH, ROOT, SMALL_MODEL, command_line, learning, wait_for, weights
from tests.test_systems import SIZES, SYSTEMS

TWO_PROCESSES = ["--multi_gpu", "--num_processes=2", "--mixed_precision=no", "--dynamo_backend=no"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", *TWO_PROCESSES]
pytestmark = pytest.mark.long
ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
NAMESPACES = ["unshare", "--map-root-user", "--net"]
HAS_NAMESPACES = (shutil.which("ip") and shutil.which("nsenter") and shutil.which("unshare")) and not subprocess.run(
    [*NAMESPACES, "ip", "link", "add", "type", "veth"], capture_output=True
).returncode


@pytest.fixture
def exact_flags(flags: dict[str, object]) -> dict[str, object]:
    """A run without dropout, whose draws depend on the number of processes; accumulating on one process and on two."""
    sizes = SMALL_MODEL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return flags | {
        "train_batch_size": 32,
        "model_config": json.dumps(sizes),
        "logging_steps": 1,
    }


def assert_same_losses(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    first, second = (learning(run / "metrics.jsonl") for run in (one, two))
    assert len(first) == len(second)
    for line, other in zip(first, second, strict=True):
        assert line["tokens"] == other["tokens"]
        assert line.get("data_digest") == other.get("data_digest")
        for name in {"loss", "grad_norm", "eval_loss"} & line.keys():
            assert other[name] == pytest.approx(line[name], rel=tolerance)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_machines_on_loopback_give_the_losses_of_one_process(exact_flags, run_pretrain, tmp_path: Path):
    run_pretrain(exact_flags)
    words = ["--num_machines=2", "--main_process_ip=127.0.0.1", f"--main_process_port={free_port()}", "pretrain.py"]
    words += command_line(exact_flags | {"output_dir": tmp_path / "two"})
    machines = [
        subprocess.Popen([*LAUNCH, f"--machine_rank={rank}", *words], cwd=ROOT, env=os.environ | ON_CPU)
        for rank in range(2)
    ]
    assert [machine.wait(timeout=PATIENCE_SECONDS) for machine in machines] == [0, 0]
    assert_same_losses(tmp_path / "run", tmp_path / "two")


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no right to make network namespaces")
def test_two_machines_with_a_cable_give_the_losses_of_one_process(exact_flags, run_pretrain, tmp_path: Path):
    run_pretrain(exact_flags)
    words = [
        "--main_process_ip=10.99.0.1",
        "pretrain.py",
        *command_line(exact_flags | {"output_dir": tmp_path / "two"}),
    ]
    command = [*NAMESPACES, ROOT / "tests/two_machines.sh", sys.executable, *TWO_PROCESSES, *words]
    subprocess.run(command, cwd=ROOT, env=os.environ | ON_CPU, check=True)
    assert_same_losses(tmp_path / "run", tmp_path / "two")


def test_gradients_in_bf16_are_refused_where_torch_would(exact_flags, tmp_path: Path):
    words = ["pretrain.py", *command_line(exact_flags | {"ddp_comm_hook": "bf16"})]
    command = [*LAUNCH, "--main_process_port=0", *words]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | ON_CPU, capture_output=True, text=True)
    assert result.returncode != 0
    assert "error: `ddp_comm_hook` is bf16, which is for DDP on GPUs" in result.stderr
    assert not (tmp_path / "run").exists()


def test_torchrun_brings_a_run_back_after_a_process_died(exact_flags, run_pretrain, tmp_path: Path):
    """Without the variable, and under `accelerate launch`, the store keeps the addresses of the dead."""
    flags = exact_flags | {"max_steps": 60, "save_steps": 5}
    run_pretrain(flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    words = command_line(flags | {"output_dir": tmp_path / "two", "resume_from_checkpoint": "latest"})
    environment = os.environ | ON_CPU | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launcher = subprocess.Popen([*command, "pretrain.py", *words], cwd=ROOT, env=environment)
    checkpoint = tmp_path / "two" / "checkpoints" / "step-00000020"
    wait_for(checkpoint.exists)
    before = json.loads((tmp_path / "two" / "status.json").read_text())["pids"]
    os.kill(before[1], signal.SIGKILL)
    assert launcher.wait(timeout=PATIENCE_SECONDS) == 0
    status = json.loads((tmp_path / "two" / "status.json").read_text())
    assert status["state"] == "complete"
    assert not set(status["pids"]) & set(before)
    assert_same_losses(tmp_path / "run", tmp_path / "two")


# Accelerate 1.15 does not engage FSDP on a CPU by itself; all else is its own code and torch's, on gloo.
FSDP_ON_CPU = """
import os
import pretrain
import recipe.run.launch
import recipe.session
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from recipe.base.errors import run_script
from torch.distributed.fsdp import FSDPModule

def sharded(*args, **kwargs):
    accelerator = Accelerator(*args, **kwargs)
    shared = accelerator.state._shared_state
    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    shared |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # which it takes over again and again
    return accelerator

def counted(*args):
    objective, optimizer = prepare(*args)
    names = [name for name, module in objective.named_modules() if isinstance(module, FSDPModule)]
    os.write(2, f"wrapped: {len(names)}\\n".encode())  # at once, as processes have one stderr in common
    return objective, optimizer

prepare = recipe.session.prepare
recipe.run.launch.Accelerator = sharded
recipe.session.prepare = counted
run_script(pretrain.main)
"""


@pytest.fixture
def run_fsdp(tmp_path: Path):
    """A function that runs pretrain.py on two processes under the FSDP2 of accelerate_configs/fsdp2.yaml.

    It returns how many groups of weights each process had.
    """
    script = tmp_path / "fsdp_on_cpu.py"
    config = yaml.safe_load((ROOT / "accelerate_configs/fsdp2.yaml").read_text())["fsdp_config"]
    environment = os.environ | ON_CPU | {"PYTHONPATH": PYTHONPATH}
    environment |= {name.upper(): str(value) for name, value in config.items()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]

    def run(flags: dict[str, object], precision: str = "no", before: str = "") -> list[int]:
        script.write_text(before + FSDP_ON_CPU)
        result = subprocess.run(
            [*command, *command_line(flags)],
            cwd=ROOT,
            env=environment | {"ACCELERATE_MIXED_PRECISION": precision},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return [int(count) for count in re.findall(r"wrapped: (\d+)", result.stderr)]

    return run


def run_ddp(flags: dict[str, object], precision: str = "no") -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "pretrain.py"]
    environment = os.environ | ON_CPU | {"ACCELERATE_MIXED_PRECISION": precision}
    subprocess.run([*command, *command_line(flags)], cwd=ROOT, env=environment, check=True)


@pytest.mark.parametrize(
    ("system", "wrapped"), [("roberta", 3), ("roberta-prelayernorm", 3), ("bert", 3), ("albert", 2)]
)
def test_fsdp_gives_the_losses_of_one_process(
    exact_flags, run_pretrain, run_fsdp, tokenizer_dirs, tmp_path: Path, system: str, wrapped: int
):
    """Two layers and the rest; ALBERT has one layer, run twice."""
    sizes = SIZES[system] | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes |= {"classifier_dropout_prob": 0.0} if system == "albert" else {}
    flags = (
        exact_flags | SYSTEMS[system] | {"model_config": json.dumps(sizes), "tokenizer_name": tokenizer_dirs[system]}
    )
    run_pretrain(flags)
    assert run_fsdp(flags | {"output_dir": tmp_path / "two"}) == [wrapped, wrapped]
    assert_same_losses(tmp_path / "run", tmp_path / "two")
    one, two = weights(tmp_path / "run"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.parametrize(
    "option", [{"gradient_checkpointing": True}, {"max_grad_norm": 0.1}, {"torch_compile": True}], ids=str
)
def test_options_go_with_fsdp(exact_flags, run_pretrain, run_fsdp, tmp_path: Path, option: dict[str, object]):
    flags = exact_flags | option
    run_pretrain(flags)
    run_fsdp(flags | {"output_dir": tmp_path / "two"})
    assert_same_losses(tmp_path / "run", tmp_path / "two")


def test_fsdp_in_bf16_learns_as_ddp_in_bf16(exact_flags, run_fsdp, tmp_path: Path):
    run_ddp(exact_flags, "bf16")
    run_fsdp(exact_flags | {"output_dir": tmp_path / "two"}, "bf16")
    assert_same_losses(tmp_path / "run", tmp_path / "two", tolerance=1e-2)


@pytest.mark.parametrize("order", ["one ddp fsdp", "fsdp one ddp", "ddp fsdp one"])
def test_run_goes_on_under_another_engine(exact_flags, run_pretrain, run_fsdp, tmp_path: Path, order: str):
    """Two updates on one process, two on two under DDP, two under FSDP2: as if all were on one."""
    flags = exact_flags | {"save_steps": 2, "save_total_limit": 5}
    run_pretrain(flags)
    parts = flags | {"output_dir": tmp_path / "parts", "resume_from_checkpoint": "latest"}
    engines = {"one": run_pretrain, "ddp": run_ddp, "fsdp": run_fsdp}
    for done, engine in enumerate(order.split()):
        # Each part goes to the end, and is cut back to its two updates.
        for later in (tmp_path / "parts" / "checkpoints").glob("step-*"):
            if later.name > f"step-{2 * done:08d}":
                shutil.rmtree(later)
        engines[engine](parts)
    assert_same_losses(tmp_path / "run", tmp_path / "parts")
    last = "checkpoints/step-00000006"
    one, two = (torch.load(run / last / "optimizer.pt") for run in (tmp_path / "run", tmp_path / "parts"))
    assert one["optimizer"].keys() == two["optimizer"].keys()
    for name, moments in one["optimizer"].items():
        assert all(torch.allclose(moments[key], two["optimizer"][name][key], atol=1e-6) for key in moments)
    average_run(*parse_options([str(tmp_path / "parts"), "--last", "3"]))  # of one engine each
    record = json.loads((tmp_path / "parts/averages/step-00000006-mean-of-3/average.json").read_text())
    evaluated = [line["eval_loss"] for line in learning(tmp_path / "parts" / "metrics.jsonl") if "eval_loss" in line]
    assert record["last_evaluation"]["eval_loss"] == pytest.approx(evaluated[-1], abs=1e-6)


SPIKE = """
import recipe.training

step, updates = recipe.training.train_step, 0

def spiking(*arguments):
    global updates
    updates += 1
    result = step(*arguments)
    if updates == 25:
        result[:-1] *= 3
    return result

recipe.training.train_step = spiking
"""


def test_all_processes_roll_back_together_whatever_the_engine(exact_flags, run_fsdp, tmp_path: Path):
    flags = exact_flags | {"max_steps": 30, "save_steps": 10, "roll_back_loss_spikes": True}
    script = tmp_path / "spikes.py"
    script.write_text(SPIKE + "import pretrain\nfrom recipe.base.errors import run_script\nrun_script(pretrain.main)\n")
    command = [*LAUNCH, "--main_process_port=0", script, *command_line(flags)]
    subprocess.run(command, cwd=ROOT, env=os.environ | ON_CPU | {"PYTHONPATH": PYTHONPATH}, check=True)
    run_fsdp(flags | {"output_dir": tmp_path / "fsdp"}, before=SPIKE)
    assert_same_losses(tmp_path / "run", tmp_path / "fsdp")
    assert learning(tmp_path / "run" / "metrics.jsonl")[-2]["updates_left_out"] == 5
