"""Start the accelerator as the launcher set it up, and refuse what this code does not serve."""

import atexit
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import datasets
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
from huggingface_hub.utils import disable_progress_bars
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.utils.logging import disable_progress_bar

from recipe.base.errors import UserError
from recipe.run.directory import RunDirectory
from recipe.run.stopping import stop_with_launcher
from recipe.run.trackers import check_trackers

UNSERVED_ENGINES = {
    DistributedType.DEEPSPEED,
    DistributedType.MEGATRON_LM,
    DistributedType.XLA,
}


# A rank may have to wait for a source longer than the ten minutes that the others would have patience for.
COLLECTIVE_TIMEOUT = timedelta(hours=1)


Result = TypeVar("Result")


def start_accelerator(
    report_to: str | list[str] = "none",
    logging_dir: str | None = None,
    serves_fsdp: bool = False,
    ddp_comm_hook: str | None = None,
) -> Accelerator:
    """The accelerator as the launcher set it up; the libraries' own progress bars are kept to the main process.

    Args:
        report_to: trackers, see `check_trackers`.
        logging_dir: for trackers that write files.
        serves_fsdp: whether the script can have its model split up.
        ddp_comm_hook: `bf16` to have DDP send gradients in it.

    Raises:
        UserError: an engine or a precision that this code does not serve.
    """
    trackers = check_trackers(report_to)
    stop_with_launcher()
    # No buffer of the model ever changes, so none has to be sent around at each forward.
    ddp = DistributedDataParallelKwargs(
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        comm_hook=DDPCommunicationHookType(ddp_comm_hook or "no"),
    )
    try:
        accelerator = Accelerator(
            log_with=trackers or None,
            project_config=ProjectConfiguration(logging_dir=logging_dir),
            kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
        )
    except ValueError as error:  # of a precision that the device does not have
        raise UserError(f"{error} Give accelerate another --mixed_precision") from None
    atexit.register(leave_process_group)
    disable_progress_bar()  # transformers', one for each file that it writes
    if not accelerator.is_main_process:
        disable_progress_bars()
        datasets.disable_progress_bars()
    is_bf16_on_gpu = accelerator.device.type == "cuda" and accelerator.mixed_precision == "bf16"
    if is_bf16_on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"`mixed_precision` is bf16, which {torch.cuda.get_device_name()} does not have; give accelerate "
            "--mixed_precision fp16"
        )
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if accelerator.distributed_type in UNSERVED_ENGINES or (is_fsdp and not serves_fsdp):
        raise UserError(
            f"`distributed_type` is {accelerator.distributed_type.value}, and here only one process"
            f"{', DDP and FSDP2' if serves_fsdp else ' and DDP'} are served; take another of accelerate_configs/"
        )
    if is_fsdp:
        set_up_fsdp(accelerator)
    if ddp_comm_hook and accelerator.distributed_type not in (DistributedType.MULTI_GPU, DistributedType.NO):
        raise UserError(
            f"`ddp_comm_hook` is {ddp_comm_hook}, which is for DDP on GPUs, and `distributed_type` is "
            f"{accelerator.distributed_type.value}; leave it out"
        )
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":
            raise UserError(
                "`mixed_precision` is fp16, which needs a GPU; give accelerate --mixed_precision no or bf16"
            )
        cores = (os.cpu_count() or 1) // accelerator.num_processes
        if torch.get_num_threads() < cores:
            accelerator.print(
                f"warning: {torch.get_num_threads()} of {cores} cores in use; set OMP_NUM_THREADS={cores}"
            )
    return accelerator


def open_run(path: str, accelerator: Accelerator) -> RunDirectory:
    """Open the folder of a run for all its processes, of which the main one writes to it."""
    return RunDirectory(path, accelerator.is_main_process, gather_object([os.getpid()]))


def on_main(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """What a function comes to that the main process runs for all.

    Raises:
        UserError: the function's, on all processes.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1]:
        raise UserError(outcome[1])
    return outcome[0]


def leave_process_group() -> None:
    """End the process group's own threads while there is an interpreter: one of gloo's that lets go of a tensor later
    aborts the process, which torchrun takes for a failed run.

    After an error that nobody foresaw nccl's is left alone: to take it down could wait for the other processes.
    """
    if distributed.is_initialized() and (distributed.get_backend() == "gloo" or not hasattr(sys, "last_value")):
        distributed.destroy_process_group()


def set_up_fsdp(accelerator: Accelerator) -> None:
    """
    Raises:
        UserError: FSDP1, or fp16.
    """
    if not accelerator.is_fsdp2:
        raise UserError("`fsdp_version` is 1, which is not served; start from accelerate_configs/fsdp2.yaml")
    if accelerator.mixed_precision == "fp16":
        raise UserError(
            "`mixed_precision` is fp16, which is not served with FSDP2; give accelerate --mixed_precision bf16"
        )
    if accelerator.mixed_precision == "bf16":
        # Accelerate's own would round the gradients' sum over processes, and the losses that the objective returns.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
