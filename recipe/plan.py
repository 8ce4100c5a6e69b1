"""What a run is going to do, in a few lines, before it does it."""

import torch
from transformers import PreTrainedConfig

from recipe.config import PretrainArguments
from recipe.metrics import format_count
from recipe.model import build_model, count_parameters, model_flops_per_token


def describe_plan(args: PretrainArguments, config: PreTrainedConfig, num_processes: int) -> list[str]:
    """Lines with the model's size, the batch arithmetic, and positions, updates and FLOPs in all."""
    with torch.device("meta"):
        parameters = count_parameters(build_model(config, None, args.predicts_pairs))
    accumulation = args.gradient_accumulation_steps(num_processes)
    short = args.positions(min(args.max_steps, args.seq_length_warmup_steps))
    positions = args.positions(args.max_steps)
    flops = sum(
        count * model_flops_per_token(config, length, args.mlm_probability, args.predicts_pairs)
        for count, length in ((short, args.seq_length(0)), (positions - short, args.max_seq_length))
    )
    return [
        f"model: {config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{config.vocab_size:,} entries, {format_count(parameters)} parameters",
        f"update: {args.train_batch_size:,} blocks of {args.max_seq_length} = {num_processes} processes x "
        f"{args.per_device_train_batch_size} a micro-batch x {accumulation} accumulated",
        f"run: {args.max_steps:,} updates, {format_count(positions)} positions, {format_count(flops)} FLOPs; "
        f"learning rate {args.learning_rate:g} after {args.warmup_steps:,} updates, then to zero",
    ]
