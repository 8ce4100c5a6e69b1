"""A run under way: everything that training works on, handed through as one object."""

from collections import ChainMap
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast

from recipe.arguments import PretrainArguments
from recipe.arguments.checks import recorded_values
from recipe.base.errors import UserError, describe_error
from recipe.base.progress import print_line
from recipe.checks import CheckedRun
from recipe.data.batches import Rank, Resume, TrainingData
from recipe.data.streaming import Buffer, to_arrays, to_tensors
from recipe.modeling.model import count_parameters
from recipe.modeling.objectives import OBJECTIVES, MaskedLMObjective, compile_in_place, use_kernels
from recipe.modeling.optimizer import build_optimizer, build_scheduler
from recipe.publish.card import build_card, write_card
from recipe.publish.hub import Publisher
from recipe.publish.names import hub_sources
from recipe.run.checkpoint import (
    CheckpointWriter,
    archive_later_checkpoints,
    check_identity,
    check_space,
    export_model,
    load_training_state,
    procedure_changes,
    read_state,
    save_checkpoint,
)
from recipe.run.directory import RunDirectory, checkpoint_path
from recipe.run.hardware import environment
from recipe.run.launch import on_main
from recipe.run.metrics import TrainState
from recipe.run.plots import Curves, plot_runs
from recipe.run.trackers import log_metrics, restart_trackers


@dataclass
class Session:
    """What a run trains with, and how it saves, goes back and ends.

    Attributes:
        objective, optimizer: prepared by the accelerator; the objective holds the model.
        state: how far training is; advanced in place.
        identity: what a checkpoint must have in common with the run that resumes it.
        changes: what resumes have changed of how the weights are trained, see `procedure_changes`.
        last_saved_step: update of the newest checkpoint, complete or being written.
        can_plot: whether figures are drawn; False once that has failed.
    """

    accelerator: Accelerator
    args: PretrainArguments
    run: RunDirectory
    objective: nn.Module
    optimizer: AcceleratedOptimizer
    state: TrainState
    identity: dict[str, Any]
    writer: CheckpointWriter
    publisher: Publisher
    changes: list[dict[str, Any]]
    last_saved_step: int = 0
    can_plot: bool = True

    @property
    def rank(self) -> Rank:
        """Rank of the process and world size."""
        return Rank(self.accelerator.process_index, self.accelerator.num_processes)

    @property
    def unwrapped(self) -> MaskedLMObjective:
        """The objective without what the engine has put around it."""
        return self.accelerator.unwrap_model(self.objective)

    def report(self, record: dict[str, Any], line: str) -> None:
        """Send a record to metrics.jsonl and the trackers, and its line to the log."""
        self.run.append_metrics(record)
        log_metrics(self.accelerator, record)
        self.run.log([line])

    def build_scheduler(self) -> LambdaLR:
        """Build the schedule of the learning rate, standing where training is."""
        position = self.args.schedule_position(self.state.step, self.state.train_milliseconds)
        return build_scheduler(self.optimizer.optimizer, *self.args.schedule, position)

    def resume_data(self, lanes: dict[str, Any], skipped_updates: int = 0) -> Resume:
        """Say where in the data training goes on, from its state and the lanes of a checkpoint."""
        return Resume(self.state.step + self.state.updates_left_out, lanes, skipped_updates)

    def save(self, lanes: dict[tuple[int, int], Buffer]) -> None:
        """Write checkpoint, status and plot, and push, in the background.

        Training waits for the checkpoint before this one, and for a copy of weights and moments.
        """
        args, state = self.args, self.state
        self.last_saved_step = step = state.step
        is_last = args.is_over(step, state.train_milliseconds)
        copied = self.writer.copy(self.objective, self.optimizer.optimizer, keep=self.accelerator.is_main_process)
        all_lanes = gather_object([to_arrays(lanes)])
        if copied is None:
            return
        model, prefix = self.unwrapped.model, "model."
        weights = {name: tensor for name, tensor in copied["weights"].items() if name.startswith(prefix)}
        tensors = {
            "optimizer": copied["optimizer"],
            "beside_model": {name: tensor for name, tensor in copied["weights"].items() if name not in weights},
            "lanes": to_tensors(deepcopy(dict(ChainMap(*all_lanes)))),
        }
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        if self.accelerator.scaler is not None:
            tensors["scaler"] = self.accelerator.scaler.state_dict()
        kept: dict[str, Any] = {"train_state": asdict(state), "identity": self.identity, "arguments": asdict(args)}
        kept["changes"] = self.changes

        def write() -> Path:
            self.run.check_held()
            return save_checkpoint(self.run.checkpoints, step, model, weights, tensors, kept, args.save_total_limit)

        def after_save(path: Path) -> None:
            self.run.check_held()
            self.run.saved_step = step
            self.run.write_status("running", self.state.step)
            self.plot()
            if not is_last:  # which is pushed when the run is complete
                self.publisher.publish(path, is_last=False)

        self.writer.start(step, write, after_save)

    def plot(self) -> None:
        """Draw loss.png; once that has failed, it is said and not tried again."""
        if not self.can_plot:
            return
        try:
            curves = Curves(self.run.path.name, self.run.read_metrics(), self.args.expected_loss)
            plot_runs([curves], self.run.loss_plot)
        except Exception as error:  # no figure is worth a checkpoint
            self.can_plot = False
            print_line(f"warning: {self.run.loss_plot} is not drawn: {error}")

    def newest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint once it is complete, on all processes."""
        self.writer.wait()
        return on_main(self.accelerator, lambda: self.writer.last)

    def roll_back(self, checkpoint: Path) -> Resume:
        """Return to the weights, moments, counts and metrics of a checkpoint, past the data since."""
        skipped = self.state.go_back(TrainState(**read_state(checkpoint)["train_state"]))
        lanes = load_training_state(checkpoint, self.objective, self.optimizer.optimizer, self.accelerator.scaler)
        self.run.cut_metrics(self.state.step)
        self.run.heartbeat(self.state.step)
        restart_trackers(self.accelerator, self.run, asdict(self.args))
        self.last_saved_step = self.state.step
        self.run.log([f"back to {checkpoint}; the data of {skipped:,} updates after it is left out"])
        return self.resume_data(lanes, skipped)

    def wait_for_checkpoint(self) -> None:
        """Wait until the newest checkpoint is complete.

        Raises:
            UserError: on all processes, if it could not be written.
        """
        self.writer.wait()
        failure, *_ = gather_object([self.writer.failure])
        if failure:
            raise UserError(
                f"the last checkpoint could not be written ({failure}); free some space and give "
                "--resume_from_checkpoint latest, which goes on from the one before it, if there is one"
            )

    def finish(self, tokenizer: PreTrainedTokenizerFast, is_complete: bool) -> None:
        """Export the model with its card and push it, if the run is complete; say what to type next."""
        step = self.state.step
        if not is_complete:
            saved = f"saved in {checkpoint_path(self.run.checkpoints, step)}" if step else "with nothing to save"
            resume = f"stopped after update {step:,}, {saved}; go on with --resume_from_checkpoint latest"
            self.run.log([resume, *self.publisher.waiting()])
            return
        lines = []
        if self.accelerator.is_main_process:
            self.run.check_held()
            last = checkpoint_path(self.run.checkpoints, step)
            checkpoint = last if last.exists() else self.writer.last
            assert checkpoint, "a complete run has a checkpoint of its last update, or began with it"
            try:
                export_model(self.run.model, checkpoint, tokenizer)
                write_card(self.run.path, self.run.model)
                self.publisher.publish(last, is_last=True)
                lines = self.publisher.finish()
            except Exception as error:  # each library has its own
                raise UserError(
                    f"all {step:,} updates are done and saved, but what follows has failed ({describe_error(error)}); "
                    "the same command with --resume_from_checkpoint latest finishes it"
                ) from error
        self.run.write_status("complete", step)
        self.run.log([*lines, *self.run.describe()])


def prepare(
    accelerator: Accelerator, objective: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Prepare objective and optimizer as the engine wants them."""
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    accelerator.unwrap_model(prepared).serve_fsdp()
    return prepared, optimizer


def describe_stamps(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Warn of corpora that are other files than a checkpoint's, as far as times and commits tell."""
    return [
        f"warning: corpus {name} has other times or another commit than when the checkpoint was written; sizes and "
        "samples of its files are the same: if it is no copy, its text may have changed"
        for name, stamp in current.items()
        if saved.get(name, stamp) != stamp
    ]


def build_session(
    check: CheckedRun, accelerator: Accelerator, run: RunDirectory, data: TrainingData
) -> tuple[Session, Resume]:
    """Build what a run trains with, as its checkpoint left it, and write its config.yaml.

    Returns:
        the session, and where in its data training begins.

    Raises:
        UserError: the checkpoint is of other data, or of something else than its manifest says.
    """
    args, checkpoint = check.args, check.checkpoint
    assert check.model and check.tokenizer  # noqa: PT018  a failed check ends the run
    check_space(run.checkpoints, count_parameters(check.model), args.save_total_limit)  # token stores have taken some
    identity, stamps = check.identity | {"data": data.identity()}, data.stamps()
    state = TrainState()
    lines: list[str] = []
    if checkpoint:
        check_identity(check.saved["identity"], identity, checkpoint)
        lines += describe_stamps(check.saved["identity"].get("stamps", {}), stamps)
        state = TrainState.restore(check.saved["train_state"], len(args.corpora), checkpoint)
        run.saved_step = state.step
    run.write_status("running", state.step)  # all that is refused has been
    objective = OBJECTIVES[args.objective](check.model, args.masked_share, args.gradient_checkpointing)
    rows = args.per_device_train_batch_size
    lines += use_kernels(
        objective, accelerator.device, accelerator.mixed_precision, rows, args.max_seq_length, args.bf16_residual
    )
    if args.torch_compile:
        lines += compile_in_place(objective, accelerator.device)
    betas = args.adam_beta1, args.adam_beta2
    adamw = build_optimizer(objective, args.learning_rate, betas, args.adam_epsilon, args.weight_decay)
    prepared, optimizer = prepare(accelerator, objective, adamw)
    publisher = Publisher(args, accelerator.is_main_process, check.tokenizer.save_pretrained, build_card)
    writer = CheckpointWriter(print_line, checkpoint)
    identity["stamps"] = stamps
    changes = procedure_changes(check.saved, asdict(args))
    session = Session(
        accelerator, args, run, prepared, optimizer, state, identity, writer, publisher, changes, state.step
    )
    session.run.log(lines)
    lanes = load_training_state(checkpoint, prepared, adamw, accelerator.scaler) if checkpoint else {}
    beside = {"tokenizer_checksum": identity["tokenizer"], "hub_sources": hub_sources(args), "changes": changes}
    run.write_config(recorded_values(args), environment(accelerator) | beside)
    if accelerator.is_main_process:
        run.log(archive_later_checkpoints(run.checkpoints, state.step))
    run.cut_metrics(state.step)
    return session, session.resume_data(lanes)
