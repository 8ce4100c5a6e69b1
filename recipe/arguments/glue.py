"""Options of `finetune_glue.py`."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from recipe.arguments.checks import (
    DecayRate,
    DropoutRate,
    NonNegativeFloat,
    PathName,
    PositiveFloat,
    PositiveInt,
    Rule,
    Seed,
    SequenceLength,
    check_values,
    identity,
)
from recipe.base.errors import UserError, require


@dataclass(kw_only=True)
class GlueArguments:
    """Options of `finetune_glue.py`; in `GROUPS`, the option that each group of them begins with."""

    GROUPS: ClassVar = {
        "output_dir": "Run",
        "glue_dir": "Tasks and grid",
        "num_train_epochs": "Update",
        "save_models": "Results",
    }

    output_dir: PathName
    """Folder of the results: results.jsonl, summary.json, table.md, glue.png, submission.zip."""
    model_name_or_path: PathName = identity()
    """Folder or hub id of the pretrained model."""
    tokenizer_name: PathName | None = identity(default=None)
    """Folder or hub id of the tokenizer. Null: the one beside the model."""
    glue_dir: PathName | None = identity(default=None)
    """Folder of the official TSV files (`RTE/train.tsv` and so on). Null: `nyu-mll/glue` from the hub."""
    tasks: list[str] | None = None
    """Names of the tasks to run. Null: all nine."""
    max_seq_length: SequenceLength = identity(default=512)
    """Length in tokens to which an example is cut (paper: 512)."""
    learning_rates: list[PositiveFloat] | None = None
    """Peak learning rates to try (paper: 1e-5, 2e-5, 3e-5). Null: fairseq's choice for the task."""
    batch_sizes: list[PositiveInt] | None = None
    """Numbers of examples in an update to try (paper: 16, 32). Null: fairseq's choice for the task."""
    seeds: list[Seed] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Seeds of the head, the order and dropout; the result of a setting is the median over them (paper: 5 seeds)."""
    init_from_mnli: bool = False
    """Run RTE, STS-B and MRPC from the best MNLI model too, with a new head (paper, section 5.1)."""

    num_train_epochs: PositiveInt = identity(default=10)
    """Number of passes over the training set; the best of them by the task's dev metric counts (paper: 10)."""
    warmup_ratio: Annotated[float, Rule("from 0 to 1", lambda x: 0 <= x <= 1)] = identity(default=0.06)
    """Share of the updates in which the learning rate rises linearly; then it falls linearly to zero (paper: 0.06)."""
    adam_beta1: DecayRate = identity(default=0.9)
    """AdamW averages gradients with this decay rate (paper: 0.9)."""
    adam_beta2: DecayRate = identity(default=0.98)
    """AdamW averages squared gradients with this decay rate (paper: 0.98)."""
    adam_epsilon: PositiveFloat = identity(default=1e-6)
    """AdamW adds this to the denominator of its step (paper: 1e-6)."""
    weight_decay: NonNegativeFloat = identity(default=0.1)
    """Each update shrinks weights by the learning rate times this, except biases and layer norms (paper: 0.1)."""
    classifier_dropout: DropoutRate | None = identity(default=None)
    """Dropout in the new head (fairseq: 0). Null: the model's own, which Hugging Face applies before and after the
    head's first layer (RoBERTa and BERT: 0.1)."""
    per_device_train_batch_size: PositiveInt = 32
    """Number of examples that one device holds at once in training; larger batches are accumulated."""
    per_device_eval_batch_size: PositiveInt = 128
    """Number of examples that one device holds at once in evaluation."""
    data_parallel_tasks: list[str] = field(default_factory=list)
    """Names of the tasks whose jobs are spread over all processes, one job after the other. Each process takes whole
    jobs of all other tasks."""

    save_models: bool = False
    """Keep the best model of each task in `output_dir/models`."""
    update_model_card: bool = False
    """Add the results to the card of the model, which is the `model` folder, or an average, of a run of
    `pretrain.py`."""
    compare_with: Literal["base", "large"] = "base"
    """Size of the published RoBERTa whose results are printed beside these."""
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
            require(values != [] or name == "data_parallel_tasks", name, "empty", "name at least one")
