"""Options of `finetune_glue.py`."""

from dataclasses import dataclass, field
from typing import Literal

from recipe.arguments.checks import check_values, identity
from recipe.base.errors import UserError, require


@dataclass(kw_only=True)
class GlueArguments:
    output_dir: str
    """Folder of the results: results.jsonl, summary.json, table.md, glue.png, submission.zip."""
    model_name_or_path: str = identity()
    """Folder or hub id of the pretrained model, with its tokenizer."""

    # Data
    glue_dir: str | None = identity(default=None)
    """Folder of the official TSVs (`RTE/train.tsv` and so on); None: `nyu-mll/glue` from the hub."""
    tasks: list[str] | None = None
    """Which of the tasks to run; None: all nine."""
    max_seq_length: int = identity(default=512)
    """Tokens that an example is cut to (paper: 512)."""

    # Grid: a job for each task x learning rate x batch size x seed
    learning_rates: list[float] | None = None
    """Peak learning rates to try (paper: 1e-5, 2e-5, 3e-5). None: fairseq's choice for the task."""
    batch_sizes: list[int] | None = None
    """Examples in an update to try (paper: 16, 32). None: fairseq's choice for the task."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Seeds of the head, the order and dropout; the result of a setting is the median over them (paper: 5)."""
    init_from_mnli: bool = False
    """Run RTE, STS-B and MRPC from the best MNLI model too, with a new head (paper, section 5.1)."""

    # Update
    num_train_epochs: int = identity(default=10)
    """Passes over the training set; the best of them by the task's dev metric counts (paper: 10)."""
    warmup_ratio: float = identity(default=0.06)
    """Share of the updates that are linear warmup; then linear decay to zero (paper: 0.06)."""
    weight_decay: float = identity(default=0.1)
    """Decoupled weight decay; none on biases and layer norms (paper: 0.1)."""
    adam_beta1: float = identity(default=0.9)
    """Adam's first decay rate."""
    adam_beta2: float = identity(default=0.98)
    """Adam's second decay rate."""
    adam_epsilon: float = identity(default=1e-6)
    """Adam's epsilon."""
    per_device_train_batch_size: int = 32
    """Most examples in a micro-batch; larger batches are accumulated."""
    per_device_eval_batch_size: int = 128
    """Examples in an evaluation batch."""
    data_parallel_tasks: list[str] = field(default_factory=list)
    """Tasks whose jobs are spread over all processes, one after the other; of all other tasks each process takes whole
    jobs."""

    # Run
    save_models: bool = False
    """Keep the best model of each task in `output_dir/models`."""
    compare_with: Literal["base", "large"] = "base"
    """Which published RoBERTa the results are printed beside."""
    dry_run: bool = False
    """Check everything, print the jobs and stop."""

    def __post_init__(self) -> None:
        check_values(self)
        require(bool(self.output_dir), "output_dir", "empty", "name a folder")
        require(bool(self.model_name_or_path), "model_name_or_path", "empty", "name a folder or a hub id")
        for name in ("tasks", "data_parallel_tasks", "learning_rates", "batch_sizes", "seeds"):
            values = getattr(self, name)
            if values is not None and len(set(values)) < len(values):
                raise UserError(f"`{name}` is {values}; leave out what is there twice")
        for name in ("tasks", "learning_rates", "batch_sizes", "seeds"):
            require(getattr(self, name) != [], name, "empty", "name at least one")
        for name, values in {"learning_rates": self.learning_rates, "batch_sizes": self.batch_sizes}.items():
            require(all(0 < value < float("inf") for value in values or []), name, values, "give positive numbers")
        require(all(0 <= seed < 2**63 for seed in self.seeds), "seeds", self.seeds, "give numbers from 0 to 2**63")
        for name in ("num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give 1 or more")
        require(self.max_seq_length >= 8, "max_seq_length", self.max_seq_length, "give 8 or more")
        require(0 <= self.warmup_ratio <= 1, "warmup_ratio", self.warmup_ratio, "give a share from 0 to 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "give 0 or more")
        require(self.adam_epsilon > 0, "adam_epsilon", self.adam_epsilon, "give a positive number")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "give a number from 0 up to 1")
