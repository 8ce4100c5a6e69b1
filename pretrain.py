"""Pretrain RoBERTa, or BERT or ALBERT, with masked language modelling.

accelerate launch pretrain.py --config recipe/configs/pretrain/roberta-base.yaml
"""

import recipe.run.stopping  # noqa: F401  before all else: it notes the launcher and the time

# isort: split
import os
from dataclasses import asdict

import torch
from accelerate.utils import gather_object

from recipe.arguments import PretrainArguments, identity_of, parse_config
from recipe.base.errors import report_user_errors
from recipe.data.cached import CachedData
from recipe.data.streamed import StreamedData
from recipe.data.tokenizer import load_tokenizer, tokenizer_checksum
from recipe.modeling.model import build_config, build_model, count_parameters
from recipe.modeling.objectives import OBJECTIVES, compile_in_place
from recipe.modeling.optimizer import build_optimizer
from recipe.plan import describe_plan, print_plan
from recipe.publish.card import build_card, write_card
from recipe.publish.hub import Publisher, check_push, fetch_checkpoint
from recipe.run import checkpoint as ckpt
from recipe.run.directory import RunDirectory, checkpoint_path
from recipe.run.hardware import environment
from recipe.run.launch import on_main, start_accelerator
from recipe.run.metrics import TrainState
from recipe.run.trackers import tracking
from recipe.training import prepare, train


def main() -> None:
    args = parse_config(PretrainArguments, __doc__)
    accelerator = start_accelerator(args.report_to, args.output_dir, serves_fsdp=True, ddp_comm_hook=args.ddp_comm_hook)
    run = RunDirectory(args.output_dir, accelerator.is_main_process, gather_object([os.getpid()]))

    def log(lines: list[str]) -> None:
        for line in lines:
            accelerator.print(line, flush=True)

    if args.dry_run:
        print_plan(args, accelerator, run)
        return
    if not args.prepare_only:
        run.check(args.resume_from_checkpoint)
    tokenizer = load_tokenizer(args.tokenizer_name or args.model_name_or_path)
    config = build_config(args.model_config, args.model_name_or_path, tokenizer, args.max_seq_length, args.model_type)
    log(describe_plan(args, config, accelerator.num_processes))
    args.check_lanes(accelerator.num_processes)
    data = (StreamedData if args.streaming else CachedData)(args, tokenizer)
    identity = identity_of(args) | {"tokenizer": tokenizer_checksum(tokenizer)}
    wanted = on_main(accelerator, lambda: fetch_checkpoint(args))
    checkpoint, saved, lines = ckpt.open_checkpoint(run.checkpoints, wanted, identity, asdict(args))
    args.hub_model_id, warnings = on_main(accelerator, lambda: check_push(args, is_fresh=checkpoint is None))
    publisher = Publisher(args, accelerator.is_main_process, tokenizer.save_pretrained, build_card)
    log(lines + warnings)
    torch.manual_seed(args.seed)
    model = build_model(config, args.model_name_or_path, args.predicts_pairs)
    data.prepare(accelerator.process_index)
    log(data.describe())
    if args.prepare_only:
        return
    ckpt.check_space(run.checkpoints, count_parameters(model), args.save_total_limit)
    identity |= {"data": data.identity()}
    state, lanes = TrainState(), {}
    if checkpoint:
        ckpt.check_identity(saved["identity"], identity, checkpoint)
        state = TrainState.restore(saved["train_state"], len(args.corpora), checkpoint)
    objective = OBJECTIVES[args.objective](model, args.masked_share, args.gradient_checkpointing)
    if args.torch_compile:
        log(compile_in_place(objective, accelerator.device, in_one=not accelerator.is_fsdp2))
    adamw = build_optimizer(objective, args.learning_rate, args.adam_betas, args.adam_epsilon, args.weight_decay)
    objective, optimizer = prepare(accelerator, objective, adamw)
    if checkpoint:
        lanes = ckpt.load_training_state(checkpoint, objective, adamw, accelerator.scaler)
    run.write_config(asdict(args), environment(accelerator) | {"tokenizer_checksum": identity["tokenizer"]})
    run.cut_metrics(state.step)
    if accelerator.is_main_process:
        ckpt.archive_later_checkpoints(run.checkpoints, state.step)
    run.write_status("running", state.step)
    with run.noting_failure(lambda: state.step), tracking(accelerator, run.path, asdict(args)):
        is_complete = train(
            accelerator, args, objective, optimizer, data, state, run, identity, checkpoint, lanes, publisher
        )
    if not is_complete:
        log([f"stopped after update {state.step:,}; go on with --resume_from_checkpoint latest", *publisher.waiting()])
        return
    if accelerator.is_main_process:
        last = checkpoint_path(run.checkpoints, state.step)
        ckpt.export_model(run.model, last if last.exists() else checkpoint, tokenizer)
        write_card(run.path, run.model)
        publisher.publish(last, is_last=True)
    run.write_status("complete", state.step)
    log([*publisher.finish(), *run.describe()])


if __name__ == "__main__":
    with report_user_errors():
        main()
