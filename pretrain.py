"""Pretrain RoBERTa, post-norm or pre-norm, or BERT or ALBERT, with masked language modelling.

accelerate launch pretrain.py --config recipe/configs/pretrain/roberta-base.yaml
"""

import recipe.run.stopping  # noqa: F401  before all else: it notes the launcher and the time

# isort: split
from contextlib import nullcontext
from dataclasses import asdict

from recipe.arguments import PretrainArguments, parse_config
from recipe.arguments.corpus_files import local_files
from recipe.base.errors import run_script


def main() -> None:
    """Check, open the data, build, train, finish."""
    args = parse_config(PretrainArguments, __doc__)
    for corpus in [] if args.dry_run else [*args.corpora, *args.eval_corpora]:
        local_files(corpus)
    # What takes seconds to import comes after the options, so that --help and a wrong field are answered at once.
    from recipe.checks import check_run
    from recipe.data.modes import open_data
    from recipe.plan import describe_plan, print_plan
    from recipe.run.launch import holding, open_run, start_accelerator
    from recipe.run.trackers import tracking
    from recipe.session import build_session
    from recipe.training import train

    accelerator = start_accelerator(args.report_to, args.output_dir, serves_fsdp=True, ddp_comm_hook=args.ddp_comm_hook)
    run = open_run(args.output_dir, accelerator)
    if args.dry_run:
        print_plan(args, accelerator, run)
        return

    with nullcontext() if args.prepare_only else holding(run, accelerator):
        check = check_run(args, accelerator, run)
        assert check.tokenizer and check.config and check.preprocessor  # noqa: PT018  a failed check ends the run
        run.log([*describe_plan(args, check.config, accelerator.num_processes), *check.lines])

        data = open_data(
            check.args, check.preprocessor, accelerator.process_index, verifies=accelerator.is_local_main_process
        )
        run.log(data.describe())
        if args.prepare_only:
            return

        with run.noting_failure():
            session, resume = build_session(check, accelerator, run, data)
            with tracking(accelerator, run, asdict(check.args)):
                is_complete = train(session, data, resume)
            session.finish(check.tokenizer, is_complete)


if __name__ == "__main__":
    run_script(main)
