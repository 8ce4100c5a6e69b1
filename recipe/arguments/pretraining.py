"""Options of `pretrain.py`."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from recipe.arguments.checks import (
    PLAN_FIELDS,
    DecayRate,
    NonNegativeFloat,
    NonNegativeInt,
    PathName,
    PositiveFloat,
    PositiveInt,
    Rule,
    Seed,
    SequenceLength,
    Share,
    check_repo_id,
    check_values,
    divisors,
    identity,
)
from recipe.arguments.corpus import CorpusArguments, check_corpora
from recipe.arguments.languages import check_language
from recipe.arguments.phases import PhaseArguments, Timeline
from recipe.base.errors import UserError, require
from recipe.base.formatting import count_of

# Blocks of these packings have one part: they can be cut short, and do not depend on what comes after the next block.
ONE_PART_PACKINGS = ("full_sentences", "contiguous")
EXCHANGED_PACKINGS = ("segment_pair", "sentence_pair")  # pairs of these exchange their second parts
PAIR_PACKINGS = (*EXCHANGED_PACKINGS, "sentence_order")
OBJECTIVE_PACKINGS = {"next_sentence": EXCHANGED_PACKINGS, "sentence_order": ("sentence_order",)}
# Values that need all of the data at once, which `streaming` does not have.
NOT_STREAMED = {
    ("masking", "static"): "is static, which knows a block by its number, and a stream has new blocks in every pass",
    ("objective", "next_sentence"): "is next_sentence, which exchanges parts of more documents than a stream holds",
    ("deduplicate", True): "needs every document's checksum before the first block is packed",
    ("prepare_only", True): "makes token stores, and a stream does without",
}

# Of transformers, whose others follow the loss.
SchedulerType = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
STEP_ARGUMENTS = ("num_decay_steps", "num_stable_steps", "timescale")  # of schedules, in their steps
MILLISECONDS = 3_600_000  # of an hour


@dataclass(kw_only=True)
class PretrainArguments:
    """Options of `pretrain.py`; in `GROUPS`, the option that each group of them begins with."""

    GROUPS: ClassVar = {
        "output_dir": "Run",
        "corpora": "Data",
        "model_type": "Model",
        "train_batch_size": "Update",
        "logging_steps": "Log, evaluation and checkpoints",
        "push_to_hub": "Hub and card",
        "prepare_only": "Preparation and plan",
    }

    output_dir: PathName
    """Folder of the run: config.yaml, status.json, metrics.jsonl, checkpoints/, model/, loss.png."""

    corpora: list[CorpusArguments] = identity()
    """Text to train on."""
    tokenizer_name: PathName | None = identity(default=None)
    """Folder or hub id of the tokenizer. Null: the tokenizer of `model_name_or_path`."""
    language: str = identity(default="en")
    """Code of the text's language (ISO 639-1, `en`, or three letters of 639-3), for the sentence splitter."""
    sentence_splitter: Literal["sentencex", "newline"] = identity(default="sentencex")
    """How sentences are found: by the library sentencex, or by line, in text that has one sentence a line."""
    deduplicate: bool = identity(default=False)
    """Drop each document that is an exact copy of an earlier one in `corpora`. `streaming` must be off, and each
    process needs 32 bytes of memory a document for a while at each start."""
    decontaminate_against: list[PathName] = identity(default_factory=list)
    """Files or globs (`.tsv` of GLUE, or any text with a sentence a line or field) whose sentences must not be trained
    on: a document that shares 13 words in a row with one of them is dropped, as is one that holds all words of a
    sentence of 8 to 12. What tokenised text has apart counts as joined: `do n't` is `don't`."""
    max_unreadable_documents: NonNegativeInt = 0
    """Number of malformed documents in a corpus (in `streaming`, in a lane's part of it in a pass) that are skipped,
    counted and logged before the run stops with an error. Empty documents are always skipped and counted."""
    packing: Literal[
        "full_sentences", "doc_sentences", "contiguous", "segment_pair", "sentence_pair", "sentence_order"
    ] = identity(default="full_sentences")
    """What a block holds (paper, section 4.2). `full_sentences`: whole sentences, across the ends of documents.
    `doc_sentences`: whole sentences of one document. `contiguous`: tokens cut anywhere, without padding. `segment_pair`
    and `sentence_pair`: two parts, half of them from different documents. `sentence_order`: two consecutive segments,
    half of them swapped. Which ones is drawn anew for each visit of a block."""
    objective: Literal["masked_lm", "next_sentence", "sentence_order"] = identity(default="masked_lm")
    """What the model predicts: the masked tokens alone, in blocks of any packing; also whether the second part of a
    block follows the first (`segment_pair`, `sentence_pair`); or also which part comes first (`sentence_order`)."""
    masking: Literal["dynamic", "static"] = identity(default="dynamic")
    """`dynamic`: a block has new masks, and a pair a new second part, on every visit (paper, section 4.1). `static`:
    both repeat after ten visits, as in the data of BERT; up to there the run is the same as a dynamic one."""
    eval_corpora: list[CorpusArguments] = identity(default_factory=list)
    """Text to evaluate on, in the same form as `corpora`. Empty: blocks of `corpora` are held out."""
    eval_blocks: NonNegativeInt = identity(default=512)
    """Number of blocks in each evaluation, shared among the corpora by weight and never trained on; 0 means no
    evaluation. Held-out blocks of `corpora` have neighbours from the same documents in training; blocks of
    `eval_corpora` do not."""
    max_seq_length: SequenceLength = identity(default=512)
    """Length of a block in tokens, `<s>` and `</s>` included (paper: 512)."""
    mlm_probability: Share = identity(default=0.15)
    """Share of the tokens to predict: 80 % become `<mask>`, 10 % a random token, 10 % stay (paper, section 2.3)."""
    eval_mlm_probability: Share = identity(default=0.15)
    """Share of the tokens to predict in evaluation, so that losses compare whatever the masks of training."""
    streaming: bool = identity(default=False)
    """Tokenise and pack while training, with nothing on disk, instead of making a token store first."""
    num_lanes: PositiveInt = identity(default=64)
    """Number of parts that `streaming` deals the corpora to and reads side by side. It must divide `train_batch_size`,
    and training processes times `dataloader_num_workers` must divide it."""
    shuffle_buffer_size: PositiveInt = identity(default=65_536)
    """Number of blocks that `streaming` holds back for shuffling, over all lanes and corpora, but at most an eighth of
    a pass over a corpus; they take 2 bytes a token in memory and in each checkpoint."""
    token_store_dir: PathName | None = None
    """Folder of the token stores. Null: `token_stores` in the cache of `datasets` (HF_DATASETS_CACHE)."""
    preprocessing_num_workers: PositiveInt | None = None
    """Number of processes that tokenise for each training process; the result does not depend on it. Null: the training
    process tokenises, on all threads."""
    dataloader_num_workers: NonNegativeInt = 2
    """Number of processes that read ahead for each training process: they mask and collate or, in `streaming`, tokenise
    and pack. 0: the training process does it."""

    model_type: Literal["roberta", "roberta-prelayernorm", "bert", "albert"] = identity(default="roberta")
    """Architecture of the model; `roberta-prelayernorm` is RoBERTa with the layer norms before the parts of a layer and
    one at the end, which leaves the residual stream as it is and bears higher learning rates."""
    model_config: dict[str, Any] = identity(default_factory=dict)
    """Fields of `RobertaConfig`, `RobertaPreLayerNormConfig`, `BertConfig` or `AlbertConfig` that differ from the
    released base model."""
    model_name_or_path: PathName | None = identity(default=None)
    """Folder or hub id of a pretrained model of this type to continue from, with its own tokenizer and a new schedule.
    Null: the weights are new."""

    train_batch_size: PositiveInt = identity(default=8192)
    """Number of blocks in an update, over all processes and micro-batches (paper: 8192). Processes must divide it."""
    per_device_train_batch_size: PositiveInt = 32
    """Number of blocks in a micro-batch, which one device holds at once; of shorter blocks (`phases`) as many more. The
    accumulation is derived from it."""
    per_device_eval_batch_size: PositiveInt = 32
    """Number of blocks in a micro-batch of the evaluation."""
    torch_compile: bool = False
    """Compile the objective, which takes a minute or two at the start; where that fails, training continues without."""
    bf16_residual: bool = True
    """Under bf16 autocast on a GPU, where dropout, residual and layer norm run as one kernel, have layers hand on bf16;
    false: float32, which rounds less and moves twice the bytes."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, a third more time."""
    ddp_comm_hook: Literal["bf16"] | None = None
    """Format in which processes exchange gradients under DDP: `bf16` halves the bytes, for slow networks, and rounds.
    Null: float32."""
    max_steps: PositiveInt = 500_000
    """Number of updates of the whole run (paper: 500K)."""
    phases: list[PhaseArguments] = field(default_factory=list)
    """Parts of the run, in their order, with a `max_seq_length`, `train_batch_size`, `mlm_probability` or `weights` of
    their own; their `steps` add up to `max_steps`. Empty: the run is one. A resume may change what is to come."""
    max_train_hours: PositiveFloat | None = None
    """Hours after its start by which a process has saved a checkpoint and stopped, to be resumed: the time limit of a
    queue. With `schedule_by: hours`, those that the whole run trains. Null: no limit."""
    schedule_by: Literal["steps", "hours"] = "steps"
    """What the learning rate follows: the updates, up to `max_steps`; or the share that is used of `max_train_hours`,
    over preemptions, after which the run is complete. `max_steps` ends it even so: give more than will fit."""
    learning_rate: PositiveFloat = 6e-4
    """Peak learning rate (paper: 6e-4 for base, 4e-4 for large)."""
    warmup_steps: Annotated[
        int | float, Rule("updates, or a share of the run below 1", lambda n: 0 <= n < 1 or (n > 0 and n % 1 == 0))
    ] = 24_000
    """Number of updates at the start in which the learning rate rises linearly (paper: 24K for base, 30K for large), or
    below 1 the share of `max_steps` or, with `schedule_by: hours`, of `max_train_hours`."""
    lr_scheduler_type: SchedulerType = "linear"
    """Schedule of the learning rate by transformers' name; `linear` falls to zero at `max_steps` (paper). A run of
    `constant_with_warmup` can be continued from any checkpoint, in another folder, by `warmup_stable_decay`."""
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the schedule, by transformers' names: of `warmup_stable_decay` `num_decay_steps`, in which the rate
    falls to zero at the end. Numbers of steps may be shares, as of `warmup_steps`."""
    adam_beta1: DecayRate = 0.9
    """AdamW averages gradients with this decay rate (paper: 0.9)."""
    adam_beta2: DecayRate = 0.98
    """AdamW averages squared gradients with this decay rate (paper: 0.98)."""
    adam_epsilon: PositiveFloat = 1e-6
    """AdamW adds this to the denominator of its step (paper: 1e-6)."""
    weight_decay: NonNegativeFloat = 0.01
    """Each update shrinks weights by the learning rate times this, except biases and layer norms, which fairseq shrinks
    too (paper: 0.01)."""
    max_grad_norm: NonNegativeFloat = 0.0
    """Norm to which gradients are clipped; 0 means no clipping (paper: 0)."""
    max_nonfinite_updates: PositiveInt = 20
    """Number of updates in a row with a non-finite loss or gradient, which are skipped, before the run stops."""
    loss_spike_ratio: Annotated[float, Rule("more than 1", lambda x: x > 1)] = 1.5
    """Ratio to the median of the 100 losses before it above which a training loss is logged and counted as a spike."""
    roll_back_loss_spikes: bool = False
    """After a spike, return to the newest checkpoint, if there is one, and skip the data up to the spike."""
    seed: Seed = identity(default=42)
    """Seed of the weights, the order, the masks and dropout."""

    logging_steps: PositiveInt = 50
    """Number of updates between two lines of the log."""
    eval_steps: PositiveInt = 5_000
    """Number of updates between two evaluations; another one follows the last update."""
    save_steps: PositiveInt = 5_000
    """Number of updates between two checkpoints; another one follows the last update."""
    save_total_limit: PositiveInt = 3
    """Number of checkpoints to keep; older ones are deleted once a newer one is complete."""
    resume_from_checkpoint: PathName | None = None
    """`latest`, which starts anew where there is no checkpoint, so that one command line serves start and restart; the
    path of a checkpoint; or, in a folder that holds no run yet, one on the hub: `hub://user/name@step-00010000`."""
    expected_loss: float | None = None
    """Held-out loss that this config has reached, drawn as a line in loss.png. Null: not run yet."""
    report_to: str | list[str] = "none"
    """Tracker, or list of trackers, that gets the figures of metrics.jsonl too, by the names that accelerate knows
    (`trackio`, `tensorboard`, `wandb` and others); or `none`."""
    push_to_hub: bool = False
    """Push checkpoints to the model hub, in the background, as the user of `hf auth login` or HF_TOKEN."""
    hub_model_id: str | None = None
    """Repository on the hub, `user/name` or `organisation/name`. Null: the name of `output_dir`, under the user."""
    hub_strategy: Literal["end", "every_save", "checkpoint"] = "every_save"
    """What is pushed. `end`: the last model. `every_save`: the model of every checkpoint. `checkpoint`: every
    checkpoint with all that is needed to resume from it, by `--resume_from_checkpoint hub://user/name@step-00010000`."""
    license: str | None = None
    """Licence of the weights on the model card, by its name on the hub (`apache-2.0`, `cc-by-4.0`, `other`). To push,
    one has to be named."""
    hub_private_repo: bool | None = None
    """Whether a repository is private when it is created. Null: if a corpus is local, and otherwise as the user or
    organisation has chosen on the hub."""
    prepare_only: bool = False
    """Tokenise and pack, shared among all processes of all nodes, and stop."""
    dry_run: bool = False
    """Check everything, print the plan and stop; the exit status is an error if a check fails."""
    num_gpus: PositiveInt | None = None
    """Number of GPUs to plan for with `dry_run`. Null: the processes of this launch."""
    gpu: str | None = None
    """Kind of GPU to plan for with `dry_run`, such as `h200`. Null: what this machine has."""
    price_per_gpu_hour: PositiveFloat | None = None
    """Price of an hour of one GPU to plan with in `dry_run`, in any currency."""

    def __post_init__(self) -> None:
        check_values(self)
        require(bool(self.output_dir), "output_dir", "empty", "name a folder")
        require(bool(self.corpora), "corpora", "empty", "name at least one corpus")
        check_language(self.language)
        check_corpora("corpora", self.corpora)
        check_corpora("eval_corpora", self.eval_corpora)
        for name in PLAN_FIELDS:
            is_in_place = self.dry_run or getattr(self, name) is None
            require(is_in_place, name, getattr(self, name), "it is for a plan only: add --dry_run")
        if self.tokenizer_name is None:
            remedy = "name a folder or hub id, or `model_name_or_path` (an overlay comes after the file it changes)"
            require(self.model_name_or_path is not None, "tokenizer_name", "missing", remedy)
        else:
            remedy = (
                "`model_name_or_path` is given too, and a pretrained model keeps its own tokenizer: leave this one out"
            )
            require(self.model_name_or_path is None, "tokenizer_name", self.tokenizer_name, remedy)
        self.timeline = Timeline(self)
        share, length = self.eval_mlm_probability, self.max_seq_length
        remedy = f"that is less than one masked token in a block of `max_seq_length` ({length}): raise either"
        require(share * (length - 2) >= 1, "eval_mlm_probability", share, remedy)
        fitting = OBJECTIVE_PACKINGS.get(self.objective, (self.packing,))
        misfit = f"{self.objective}, which cannot use blocks of `packing` {self.packing}"
        require(self.packing in fitting, "objective", misfit, f"give it {' or '.join(fitting)}")
        self.check_schedule()
        if self.push_to_hub:
            remedy = "`push_to_hub` is true: name the licence of the weights by its name on the hub, such as apache-2.0"
            require(bool(self.license), "license", "missing", remedy)
        if self.hub_model_id is not None:
            check_repo_id("hub_model_id", self.hub_model_id)
        if self.streaming:
            for (name, value), reason in NOT_STREAMED.items():
                if getattr(self, name) == value:
                    raise UserError(f"`{name}` {reason}: change it, or switch `streaming` off")
            remedy = "a stream of other `packing` cannot change its length: give one length, or switch `streaming` off"
            lengths = self.timeline.lengths
            require(len(lengths) == 1 or self.packing in ONE_PART_PACKINGS, "packing", self.packing, remedy)
            for stage in self.timeline.stages:
                if (size := stage.train_batch_size) % self.num_lanes:
                    nearest = min(divisors(size), key=lambda n: abs(n - self.num_lanes))
                    raise UserError(
                        f"`num_lanes` ({self.num_lanes}) does not divide `train_batch_size` ({size})"
                        f"{self.timeline.owner(stage)}; the nearest number that does is {nearest}"
                    )

    def check_schedule(self) -> None:
        """Raise a `UserError` if the learning rate cannot rise as it should, or has no hours to follow."""
        warmup = self.warmup_steps
        remedy = f"`max_steps` is {self.max_steps}, and the learning rate would never reach its peak: lower it"
        require(warmup <= self.max_steps, "warmup_steps", warmup, remedy)
        remedy = "`lr_scheduler_type` is constant, which has none: give it constant_with_warmup, or no warmup"
        require(self.lr_scheduler_type != "constant" or not warmup, "warmup_steps", warmup, remedy)
        if self.schedule_by == "steps":
            return
        remedy = "give the hours that the whole run trains, over all its starts, or --schedule_by steps"
        require(self.max_train_hours is not None, "schedule_by", "hours, and `max_train_hours` is null", remedy)
        given = {f"lr_scheduler_kwargs.{name}": self.lr_scheduler_kwargs.get(name, 0) for name in STEP_ARGUMENTS}
        for name, steps in ({"warmup_steps": warmup} | given).items():
            remedy = "`schedule_by` is hours, of which this is a share: give one below 1, such as 0.06"
            require(not isinstance(steps, int | float) or steps < 1, name, steps, remedy)
        for number, phase in enumerate(self.phases):
            remedy = "`schedule_by` is hours, of which nobody knows the updates: give so many; the plan says what fits"
            require(phase.steps >= 1, "steps", phase.steps, remedy, f" of phase {number + 1}")
        has_scale = warmup or given["lr_scheduler_kwargs.timescale"] or self.lr_scheduler_type != "inverse_sqrt"
        remedy = "by which inverse_sqrt falls: give a share, or it a `timescale`"
        require(bool(has_scale), "warmup_steps", warmup, remedy)

    @property
    def schedule_length(self) -> int:
        """Length of the learning rate's schedule: updates or, by hours, milliseconds of training."""
        if self.schedule_by == "steps" or self.max_train_hours is None:
            return self.max_steps
        return math.ceil(self.max_train_hours * MILLISECONDS)

    def schedule_steps(self, steps: Any) -> Any:
        """Return steps of the schedule, or the whole number that a share of it makes."""
        is_share = isinstance(steps, float) and 0 < steps < 1
        return math.ceil(steps * self.schedule_length) if is_share else steps

    @property
    def schedule(self) -> tuple[str, dict[str, Any], int, int]:
        """Name and arguments of the schedule, the steps of its warmup, and all its steps; see `schedule_length`."""
        given = self.lr_scheduler_kwargs
        arguments = given | {name: self.schedule_steps(given[name]) for name in STEP_ARGUMENTS if name in given}
        return self.lr_scheduler_type, arguments, self.schedule_steps(self.warmup_steps), self.schedule_length

    def schedule_position(self, step: int, milliseconds: int) -> int:
        """Return where in its schedule an update is made: after `step` others, and `milliseconds` of training."""
        return step if self.schedule_by == "steps" else min(milliseconds, self.schedule_length)

    def is_over(self, step: int, milliseconds: int) -> bool:
        """Tell whether `step` updates are all, the last of which began after so many `milliseconds` of training."""
        return step >= self.max_steps or self.schedule_position(step, milliseconds) >= self.schedule_length

    @property
    def predicts_pairs(self) -> bool:
        """Whether the objective has a part about pairs of segments."""
        return self.objective in OBJECTIVE_PACKINGS

    @property
    def masked_share(self) -> float:
        """Largest share of a row that is masked, in training or evaluation."""
        return max(self.timeline.masked_share, self.eval_mlm_probability)

    def check_lanes(self, num_processes: int) -> None:
        """Raise a `UserError` if processes times workers do not divide `num_lanes`."""
        workers, processes = max(1, self.dataloader_num_workers), count_of(num_processes, "process", "processes")
        if not self.streaming or self.num_lanes % (num_processes * workers) == 0:
            return
        remedies = ["`streaming: false`"]
        sizes = [stage.train_batch_size for stage in self.timeline.stages]
        if fitting := [n for n in divisors(math.gcd(*sizes)) if n % (num_processes * workers) == 0]:
            nearest = min(fitting, key=lambda n: abs(n - self.num_lanes))
            remedies.insert(0, f"--num_lanes {nearest}, which begins another experiment")
        if self.num_lanes % num_processes == 0:
            fewer = max(n for n in divisors(self.num_lanes // num_processes) if n <= workers)
            remedies.insert(0, f"--dataloader_num_workers {fewer}")
        raise UserError(
            f"`num_lanes` ({self.num_lanes}) is not a multiple of {processes} x {workers} "
            f"`dataloader_num_workers` = {num_processes * workers}; give {', or '.join(remedies)}"
        )

    def micro_batch_sizes(self, num_processes: int, update: int) -> list[int]:
        """Return the blocks of each micro-batch that a process has of an update; the last one may be smaller.

        A micro-batch has as many positions whatever the length of its blocks, but no more blocks than the smallest
        batch of a ramp, so that its shape is the same in all of a phase.
        """
        settings = self.timeline.at(update)
        most = self.per_device_train_batch_size * (self.max_seq_length // settings.max_seq_length)
        size = min(most, self.timeline.smallest_batch(settings.phase) // num_processes)
        whole, rest = divmod(settings.train_batch_size // num_processes, size)
        return [size] * whole + [rest] * (rest > 0)

    def describe_micro_batches(self, num_processes: int, first: int, last: int) -> str:
        """Describe how the processes share updates from the `first` to the `last`, which may be a ramp."""
        sizes = [self.micro_batch_sizes(num_processes, update) for update in (first, last)]
        rows, times = (dict.fromkeys(map(of, sizes)) for of in (max, len))
        text = f"{count_of(num_processes, 'process', 'processes')} x {' to '.join(map(str, rows))} a micro-batch x "
        text += f"{' to '.join(map(str, times))} accumulated"
        return text + (f", of which the last has {sizes[-1][-1]}" if sizes[-1][-1] < sizes[-1][0] else "")

    def check_processes(self, num_processes: int) -> None:
        """Raise a `UserError` if the processes do not divide the batch of each phase."""
        for stage in self.timeline.stages:
            size = stage.train_batch_size
            larger = -(-size // num_processes) * num_processes
            remedy = f"which {num_processes} processes do not divide: give {larger}, or another number of processes"
            require(size % num_processes == 0, "train_batch_size", size, remedy, self.timeline.owner(stage))


def describe_schedule(arguments: dict[str, Any]) -> str:
    """Describe the schedule of the learning rate, given the arguments of a run by their names."""
    rate, warmup, kind = arguments["learning_rate"], arguments["warmup_steps"], arguments["lr_scheduler_type"]
    rest = "linearly to zero" if kind == "linear" else kind.replace("_with_warmup", "").replace("_", " ")
    given = ", ".join(f"{name} {value}" for name, value in arguments["lr_scheduler_kwargs"].items())
    warmup = f"{100 * warmup:.3g}% of the run as" if 0 < warmup < 1 else f"{warmup:,.0f} updates of"
    by = f", by the share of {arguments['max_train_hours']:g} hours" if arguments["schedule_by"] == "hours" else ""
    return f"{rate:g} after {warmup} warmup, then {rest}" + (f" ({given})" if given else "") + by


def first_position(model_type: str, pad_token_id: int) -> int:
    """Return the position number of a row's first token; RoBERTa counts on from the id of its pad token."""
    return pad_token_id + 1 if model_type.startswith("roberta") else 0
