"""Pretrain RoBERTa, or BERT or ALBERT, with masked language modelling.

accelerate launch pretrain.py --config recipe/configs/pretrain/roberta-base.yaml
"""

import os
from dataclasses import asdict

import torch
from accelerate.utils import gather_object
from transformers.utils.logging import disable_progress_bar

from recipe import checkpoint as ckpt
from recipe.config import PretrainArguments, identity_of, parse_config, report_user_errors
from recipe.loader import CachedData, StreamedData
from recipe.metrics import TrainState
from recipe.model import build_config, build_model, count_parameters
from recipe.objectives import OBJECTIVES, compile_in_place
from recipe.optimizer import build_optimizer, build_scheduler
from recipe.plan import describe_plan
from recipe.run_directory import RunDirectory, environment
from recipe.tokenizer import load_tokenizer, tokenizer_checksum
from recipe.training import prepare, start_accelerator, train


def main() -> None:
    args = parse_config(PretrainArguments, __doc__)
    disable_progress_bar()  # transformers' own, one for each file that it writes
    accelerator = start_accelerator(serves_fsdp=True, ddp_comm_hook=args.ddp_comm_hook)
    run = RunDirectory(args.output_dir, accelerator.is_main_process, gather_object([os.getpid()]))
    if not args.prepare_only:
        run.check(args.resume_from_checkpoint)

    def log(lines: list[str]) -> None:
        for line in lines:
            accelerator.print(line, flush=True)

    tokenizer = load_tokenizer(args.tokenizer_name or args.model_name_or_path)
    model_config = build_config(
        args.model_config, args.model_name_or_path, tokenizer, args.max_seq_length, args.model_type
    )
    log(describe_plan(args, model_config, accelerator.num_processes))
    args.check_lanes(accelerator.num_processes)
    data = (StreamedData if args.streaming else CachedData)(args, tokenizer)
    identity = identity_of(args) | {"tokenizer": tokenizer_checksum(tokenizer)}
    checkpoint, saved = None, {}
    if args.resume_from_checkpoint is not None:
        checkpoint, saved, lines = ckpt.open_checkpoint(
            run.checkpoints, args.resume_from_checkpoint, identity, asdict(args)
        )
        log(lines)
    torch.manual_seed(args.seed)
    model = build_model(model_config, args.model_name_or_path, args.predicts_pairs)
    if args.streaming or not args.dry_run:  # a stream is opened in seconds
        data.prepare(accelerator.process_index)
        log(data.describe())
    if args.dry_run or args.prepare_only:
        return
    ckpt.check_disk_space(run.path, count_parameters(model))
    identity |= {"data": data.identity()}
    state, lanes = TrainState(), {}
    if checkpoint:
        ckpt.check_identity(saved["identity"], identity, checkpoint)
        state = TrainState(**saved["train_state"])
    objective = OBJECTIVES[args.objective](model, args.masked_share, args.gradient_checkpointing)
    if checkpoint:
        ckpt.load_weights(checkpoint, objective)
    if args.torch_compile:
        log(compile_in_place(objective, accelerator.device, in_one=not accelerator.is_fsdp2))
    betas = (args.adam_beta1, args.adam_beta2)
    adamw = build_optimizer(objective, args.learning_rate, betas, args.adam_epsilon, args.weight_decay)
    objective, optimizer = prepare(accelerator, objective, adamw)
    if checkpoint:
        lanes = ckpt.load_optimizer(checkpoint, objective, adamw, accelerator.scaler)
    scheduler = build_scheduler(adamw, args.warmup_steps, args.max_steps, state.step)

    run.write_config(asdict(args), environment(accelerator))
    run.cut_metrics(state.step)
    if accelerator.is_main_process:
        ckpt.set_aside_later(run.checkpoints, state.step)
    run.write_status("running", state.step)
    try:
        is_complete = train(accelerator, args, objective, optimizer, scheduler, data, state, run, identity, lanes)
    except BaseException as error:
        run.write_status("failed", state.step, f"{type(error).__name__}: {error}")
        raise
    if not is_complete:
        log([f"stopped after update {state.step:,}; go on with --resume_from_checkpoint latest"])
        return
    if accelerator.is_main_process:
        last = ckpt.checkpoint_path(run.checkpoints, state.step)
        ckpt.export_model(run.model, last if last.exists() else checkpoint, tokenizer)
    run.write_status("complete", state.step)
    log([f"model: {run.model}", f"loss plot: {run.loss_plot}"])


if __name__ == "__main__":
    with report_user_errors():
        main()
