"""Start the accelerator as the launcher set it up, and refuse what this code does not serve."""

import atexit
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import disable_progress_bars
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.utils.logging import disable_progress_bar

from recipe.base.errors import UserError
from recipe.base.files import check_output_dir
from recipe.run.directory import RunDirectory
from recipe.run.stopping import LAUNCHED_BY_ACCELERATE, stop_with_launcher
from recipe.run.trackers import check_trackers

UNSERVED_ENGINES = {DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA}
INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
COLLECTIVE_TIMEOUT = timedelta(hours=1)  # since a rank may wait for a source longer than the default, ten minutes
Result = TypeVar("Result")


def start_accelerator(
    report_to: str | list[str] = "none",
    logging_dir: str | None = None,
    serves_fsdp: bool = False,
    ddp_comm_hook: str | None = None,
) -> Accelerator:
    """Start the accelerator as the launcher set it up, with the libraries' progress bars on the main process alone.

    Args:
        serves_fsdp: whether the script supports a sharded model.
        ddp_comm_hook: `bf16` to have DDP send gradients in bf16.

    Raises:
        UserError: an engine or a precision that this code does not support.
    """
    trackers = check_trackers(report_to)
    stop_with_launcher()
    keep_compiled()
    hook = DDPCommunicationHookType(ddp_comm_hook or "no")
    # No buffer of the model ever changes, so none has to be broadcast at each forward.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True, comm_hook=hook)
    handlers = [ddp, InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)]
    project = ProjectConfiguration(logging_dir=logging_dir)
    try:
        accelerator = Accelerator(log_with=trackers or None, project_config=project, kwargs_handlers=handlers)
    except ValueError as error:  # the device does not have the precision
        raise UserError(f"{error} Give accelerate another --mixed_precision") from None
    atexit.register(leave_process_group)
    check_world_size(accelerator)
    disable_progress_bar()  # of transformers, which shows one for each file that it writes
    if not accelerator.is_main_process:
        disable_progress_bars()
        datasets.disable_progress_bars()
    check_engine(accelerator, serves_fsdp, ddp_comm_hook)
    cores = (os.cpu_count() or 1) // accelerator.num_processes
    if accelerator.device.type == "cpu" and torch.get_num_threads() < cores:
        accelerator.print(f"warning: {torch.get_num_threads()} of {cores} cores are used; set OMP_NUM_THREADS={cores}")
    return accelerator


def keep_compiled() -> None:
    """Have `torch.compile` keep what it makes beside the other caches of Hugging Face, where a restart finds it.

    Its own default is under /tmp, which the end of a job or of a machine empties. That stays where the folder cannot be
    written, and so does a folder that the user has chosen.
    """
    folder = Path(HF_HOME, "torchinductor")
    if INDUCTOR_CACHE not in os.environ:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ[INDUCTOR_CACHE] = str(folder)


def check_world_size(accelerator: Accelerator) -> None:
    """Refuse to be one of several processes that were meant to train together, each of which would train alone.

    Of several processes without GPUs, accelerate's launcher starts either all, unknown to each other, or only one.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    # What the launcher sets where more than one process was asked for, and starts one alone.
    is_only_one = LAUNCHED_BY_ACCELERATE in os.environ and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if accelerator.num_processes < launched or (is_only_one and "WORLD_SIZE" not in os.environ):
        number = launched if launched > 1 else "more than 1"
        raise UserError(
            f"`num_processes` of the launcher is {number}, and accelerate trains on {accelerator.num_processes} "
            f"({torch.cuda.device_count()} GPUs are seen); give --num_processes 1 or, to try several on a CPU, start "
            "them by: ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2. If one is meant, unset MASTER_ADDR"
        )


def check_engine(accelerator: Accelerator, serves_fsdp: bool, ddp_comm_hook: str | None) -> None:
    """Set up FSDP2 if it is the engine, and refuse an engine or a precision that this code does not support."""
    device, engine = accelerator.device, accelerator.distributed_type
    is_bf16_on_gpu = device.type == "cuda" and accelerator.mixed_precision == "bf16"
    if is_bf16_on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        lacking = f"bf16, which {torch.cuda.get_device_name()} does not have"
        raise UserError(f"`mixed_precision` is {lacking}; give accelerate --mixed_precision fp16")
    is_fsdp = engine == DistributedType.FSDP
    if engine in UNSERVED_ENGINES or (is_fsdp and not serves_fsdp):
        served = "one process, DDP and FSDP2" if serves_fsdp else "one process and DDP"
        unserved = f"{engine.value}, and this script supports only {served}"
        raise UserError(f"`distributed_type` is {unserved}; choose another of accelerate_configs/")
    if is_fsdp:
        set_up_fsdp(accelerator)
    if ddp_comm_hook and engine not in (DistributedType.MULTI_GPU, DistributedType.NO):
        problem = f"{ddp_comm_hook}, which is for DDP on GPUs, and `distributed_type` is {engine.value}"
        raise UserError(f"`ddp_comm_hook` is {problem}; leave it out")
    if device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise UserError("`mixed_precision` is fp16, which needs a GPU; give accelerate --mixed_precision no or bf16")


def open_run(path: str, accelerator: Accelerator) -> RunDirectory:
    """Open the folder of a run for all its processes, of which the main one writes to it."""
    return RunDirectory(path, accelerator.is_main_process, gather_object([os.getpid()]))


def on_main(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Run a function on the main process, and return its result or raise its `UserError` on all processes."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    result, problem = broadcast_object_list(outcome)
    if problem:
        raise UserError(problem)
    return result


@functools.cache
def host_group() -> distributed.ProcessGroup | None:
    """Make the group by which processes talk without their devices; None is that of all else, where it does so."""
    is_gloo = distributed.get_backend() == "gloo"
    return None if is_gloo else distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)


def sum_over_hosts(array: np.ndarray) -> np.ndarray:
    """Sum an array over all processes, which takes no part of their devices and waits for nothing that these do."""
    total = torch.from_numpy(array.copy())
    if distributed.is_initialized():
        distributed.all_reduce(total, group=host_group())
    return total.numpy()


@contextmanager
def holding(run: RunDirectory, accelerator: Accelerator) -> Iterator[None]:
    """Hold the folder of a run in the main process; on all of them, raise the `UserError` of `RunLock.acquire`."""
    check_output_dir(run.path)
    on_main(accelerator, run.lock.acquire)
    try:
        yield
    finally:
        run.lock.release()


def leave_process_group() -> None:
    """End the threads of the process group while there is an interpreter.

    A thread of gloo's that frees a tensor later aborts the process, which torchrun takes for a failed run. After an
    unforeseen error a group of nccl's is left alone, since destroying it could wait for the other processes.
    """
    if not distributed.is_initialized():
        return
    if distributed.get_backend() == "gloo" or not hasattr(sys, "last_value"):
        distributed.destroy_process_group()
    elif host_group.cache_info().currsize:
        distributed.destroy_process_group(host_group())


def set_up_fsdp(accelerator: Accelerator) -> None:
    """Set up FSDP2's precision, and refuse FSDP1 and fp16."""
    if not accelerator.is_fsdp2:
        raise UserError("`fsdp_version` is 1, which is not supported; start from accelerate_configs/fsdp2.yaml")
    if accelerator.mixed_precision == "fp16":
        raise UserError(
            "`mixed_precision` is fp16, which FSDP2 does not support; give accelerate --mixed_precision bf16"
        )
    if accelerator.mixed_precision == "bf16":
        # Accelerate's own policy would round the gradients' sum over processes, and the losses of the objective.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
