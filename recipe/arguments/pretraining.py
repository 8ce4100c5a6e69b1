"""Options of `pretrain.py`."""

from dataclasses import dataclass
from typing import Any, Literal

from recipe.arguments.checks import check_repo_id, check_values, divisors, identity
from recipe.arguments.corpus import CorpusArguments, check_corpora
from recipe.base.errors import UserError, require

# Whose blocks are of one part: they can be cut short, and do not depend on what comes after the next one.
ONE_PART_PACKINGS = ("full_sentences", "contiguous")
PAIR_PACKINGS = ("segment_pair", "sentence_pair", "sentence_order")
OBJECTIVE_PACKINGS = {"next_sentence": ("segment_pair", "sentence_pair"), "sentence_order": ("sentence_order",)}


@dataclass(kw_only=True)
class PretrainArguments:
    output_dir: str
    """Folder of the run: config.yaml, status.json, metrics.jsonl, checkpoints/, model/, loss.png."""

    # Data
    corpora: list[CorpusArguments] = identity()
    """The text to train on."""
    tokenizer_name: str | None = identity(default=None)
    """Folder or hub id of the tokenizer; without it, the one of `model_name_or_path`."""
    language: str = identity(default="en")
    """ISO 639-1 code for the sentence splitter."""
    sentence_splitter: Literal["sentencex", "newline"] = identity(default="sentencex")
    """`newline` if the text already has one sentence a line."""
    deduplicate: bool = identity(default=False)
    """Drop documents that are an exact copy of an earlier one in `corpora`. Needs `streaming` off, and in each process
    32 bytes of memory a document for a while at each start."""
    decontaminate_against: list[str] = identity(default_factory=list)
    """Files or globs (GLUE's `.tsv`, or any text, a sentence a line or field) whose sentences must not be trained on:
    a document that shares 13 words in a row with one is dropped, or all words of one that has 8 to 12."""
    max_unreadable_documents: int = 0
    """Documents of a corpus (streaming: of a lane's part of it in a pass) that may be passed over, counted and logged,
    because they are malformed; one more is an error. Empty ones are always passed over and counted."""
    packing: Literal[
        "full_sentences", "doc_sentences", "contiguous", "segment_pair", "sentence_pair", "sentence_order"
    ] = identity(default="full_sentences")
    """What makes a block (paper, section 4.2). `full_sentences`: whole sentences, on into the next document.
    `doc_sentences`: never across the end of a document. `contiguous`: cut anywhere, no padding. `segment_pair`,
    `sentence_pair`: two parts, half of them from different documents. `sentence_order`: two consecutive segments, half
    of them swapped."""
    objective: Literal["masked_lm", "next_sentence", "sentence_order"] = identity(default="masked_lm")
    """What is learnt: masked tokens alone, in blocks of any packing, or whether the second part of a block follows the
    first (`segment_pair` and `sentence_pair`), or which part comes first (`sentence_order`), too."""
    masking: Literal["dynamic", "static"] = identity(default="dynamic")
    """`dynamic`: new masks on every visit of a block (paper, section 4.1). `static`: ten masks for each block, the same
    again on every tenth visit, as BERT's copies of the data had them."""
    eval_corpora: list[CorpusArguments] = identity(default_factory=list)
    """Text to evaluate on, same form as `corpora`; empty: blocks of `corpora` are held out."""
    eval_blocks: int = identity(default=512)
    """Blocks evaluated each time, shared by weight, never trained on. 0: no evaluation. Held-out blocks of `corpora`
    have neighbours from the same documents in training; `eval_corpora` do not."""
    max_seq_length: int = identity(default=512)
    """Tokens in a block, `<s>` and `</s>` included."""
    seq_length_warmup_steps: int = identity(default=0)
    """Updates at the start in which only the first quarter of each block is read, as many blocks an update as ever:
    faster and, at its end, behind by the tokens that were not read. Of `full_sentences` and `contiguous`."""
    mlm_probability: float = identity(default=0.15)
    """Share of the tokens to predict; 80 % become `<mask>`, 10 % a random token, 10 % stay (paper, section 2.3)."""
    eval_mlm_probability: float = identity(default=0.15)
    """The same in evaluation, so that losses can be compared whatever the training masks."""
    streaming: bool = identity(default=False)
    """Tokenise and pack while training, with nothing on disk, in place of a token store that is made first."""
    num_lanes: int = identity(default=64)
    """Streaming: parts that the corpora are dealt to and read in side by side. Divides `train_batch_size`; training
    processes times `dataloader_num_workers` divide it."""
    shuffle_buffer_size: int = identity(default=65_536)
    """Streaming: blocks held back for shuffling, over all lanes and corpora; in memory and in each checkpoint, with 2
    bytes a token."""
    token_store_dir: str | None = None
    """Folder of the token stores; None: `token_stores` in the cache of `datasets` (HF_DATASETS_CACHE)."""
    preprocessing_num_workers: int | None = None
    """Processes that tokenise for each training process; the result does not depend on it. None: the training process
    itself, on all threads."""
    dataloader_num_workers: int = 2
    """Processes that read ahead of each training process: they mask and collate or, streaming, tokenise and pack."""

    # Model
    model_type: Literal["roberta", "bert", "albert"] = identity(default="roberta")
    """The architecture."""
    model_config: dict[str, Any] = identity(default_factory=dict)
    """Fields of `RobertaConfig`, `BertConfig` or `AlbertConfig`, over the defaults of the released base model."""
    model_name_or_path: str | None = identity(default=None)
    """Folder or hub id of a model of this type to go on from, with its own tokenizer and a fresh schedule. None: from
    scratch."""

    # Update
    train_batch_size: int = identity(default=8192)
    """Blocks in an update, over all processes and micro-batches (paper: 8192)."""
    per_device_train_batch_size: int = 32
    """Blocks in a micro-batch: what one device holds at once. The accumulation is derived from it."""
    per_device_eval_batch_size: int = 32
    """Blocks in an evaluation micro-batch."""
    torch_compile: bool = False
    """Compile the objective, for a minute or two at the start; where that cannot be done, training goes on without."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, a third more time."""
    ddp_comm_hook: Literal["bf16"] | None = None
    """`bf16`: gradients travel rounded, half the bytes, for slow networks under DDP. None: float32."""
    max_steps: int = 500_000
    """Updates in all (paper: 500K)."""
    max_train_hours: float | None = None
    """Hours after its start by which a process has saved and stopped, to be resumed: the time limit of a queue. None:
    no limit."""
    learning_rate: float = 6e-4
    """Peak learning rate (paper: 6e-4 base, 4e-4 large)."""
    warmup_steps: int = 24_000
    """Updates of linear warmup; then linear decay to zero at `max_steps` (paper: 24K base, 30K large)."""
    adam_beta1: float = 0.9
    """Adam's first decay rate."""
    adam_beta2: float = 0.98
    """Adam's second decay rate (paper: 0.98)."""
    adam_epsilon: float = 1e-6
    """Adam's epsilon (paper: 1e-6)."""
    weight_decay: float = 0.01
    """Decoupled weight decay; none on biases and layer norms (fairseq decays those too)."""
    max_grad_norm: float = 0.0
    """Gradient norm to clip to; 0: no clipping (the paper's choice)."""
    max_nonfinite_updates: int = 20
    """Updates with a non-finite loss or gradient that may be skipped in a row before the run stops."""
    loss_spike_ratio: float = 1.5
    """A training loss of more than so many times the median of the 100 before it is a spike: logged and counted."""
    roll_back_loss_spikes: bool = False
    """After a spike, go back to the newest checkpoint, if there is one, and leave out the data up to the spike."""
    seed: int = identity(default=42)
    """Seed of the weights, the order, the masks and dropout."""

    # Run
    logging_steps: int = 50
    """Updates between two lines of the log."""
    eval_steps: int = 5_000
    """Updates between two evaluations; there is always one after the last update."""
    save_steps: int = 5_000
    """Updates between two checkpoints; there is always one after the last update."""
    save_total_limit: int = 3
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    resume_from_checkpoint: str | None = None
    """`latest` (starts fresh where there is none, so one command line serves start and restart), the path of a
    checkpoint or, in a folder that holds no run yet, one on the hub: `hub://user/name@step-00010000`."""
    expected_loss: float | None = None
    """Held-out loss that this config has reached; a line in loss.png. None: not run yet."""
    report_to: str | list[str] = "none"
    """Trackers that get metrics.jsonl's figures too: one or a list of those that accelerate knows (`trackio`,
    `tensorboard`, `wandb` and others), or `none`."""
    push_to_hub: bool = False
    """Push checkpoints to the model hub, in the background, as the user of `hf auth login` or HF_TOKEN."""
    hub_model_id: str | None = None
    """Repository on the hub, `user/name` or `organisation/name`; None: the name of `output_dir`, the user's own."""
    hub_strategy: Literal["end", "every_save", "checkpoint"] = "every_save"
    """What is pushed: `end`: the last model; `every_save`: the model of every checkpoint; `checkpoint`: those with all
    that training needs to go on from there (`--resume_from_checkpoint hub://user/name@step-00010000`)."""
    license: str = "apache-2.0"
    """Licence of the weights, by its name on the hub: for the model card."""
    hub_private_repo: bool | None = None
    """Whether a repository that is created is private; None: as the user or organisation has chosen on the hub."""
    prepare_only: bool = False
    """Tokenise and pack, shared among all processes of all nodes, and stop."""
    dry_run: bool = False
    """Check everything, print the plan and stop; with an error if something has to be mended first."""
    num_gpus: int | None = None
    """With `dry_run`: GPUs to plan for. None: the processes of this launch."""
    gpu: str | None = None
    """With `dry_run`: kind of GPU to plan for, `h200` say. None: what this machine has."""
    price_per_gpu_hour: float | None = None
    """With `dry_run`: price of an hour of one GPU, in any currency."""

    def __post_init__(self) -> None:
        check_values(self)
        require(bool(self.output_dir), "output_dir", "empty", "name a folder")
        require(bool(self.corpora), "corpora", "empty", "name at least one corpus")
        check_corpora("corpora", self.corpora)
        check_corpora("eval_corpora", self.eval_corpora)
        for name in ("num_gpus", "gpu", "price_per_gpu_hour"):
            value = getattr(self, name)
            require(value is None or self.dry_run, name, value, "it is for a plan only: add --dry_run")
            require(value is None or name == "gpu" or value > 0, name, value, "give a positive number")
        if self.tokenizer_name is None and self.model_name_or_path is None:
            raise UserError(
                "`tokenizer_name` is missing; name a folder or hub id, or give `model_name_or_path` (an overlay comes "
                "after the file it changes)"
            )
        if self.tokenizer_name is not None and self.model_name_or_path is not None:
            raise UserError(
                f"`tokenizer_name` ({self.tokenizer_name}) and `model_name_or_path` ({self.model_name_or_path}) are "
                "both given; a pretrained model goes on with its own tokenizer: leave `tokenizer_name` out"
            )
        counts = ("train_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size", "max_steps")
        intervals = ("logging_steps", "eval_steps", "save_steps", "save_total_limit", "max_nonfinite_updates")
        counts += ("num_lanes", "shuffle_buffer_size")
        for name in counts + intervals:
            require(getattr(self, name) >= 1, name, getattr(self, name), "give 1 or more")
        for name in (
            "warmup_steps",
            "seq_length_warmup_steps",
            "eval_blocks",
            "max_unreadable_documents",
            "dataloader_num_workers",
            "weight_decay",
            "max_grad_norm",
            "seed",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        require(self.seed < 2**63, "seed", self.seed, "give less than 2**63")
        for name in ("learning_rate", "adam_epsilon"):
            require(getattr(self, name) > 0, name, getattr(self, name), "give a positive number")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "give a number from 0 up to 1")
        hours, ratio = self.max_train_hours, self.loss_spike_ratio
        require(hours is None or hours > 0, "max_train_hours", hours, "give a positive number, or null")
        require(ratio > 1, "loss_spike_ratio", ratio, "give more than 1")
        require(self.max_seq_length >= 8, "max_seq_length", self.max_seq_length, "give 8 or more")
        for name in ("mlm_probability", "eval_mlm_probability"):
            share = getattr(self, name)
            require(0 < share < 1, name, share, "give a number between 0 and 1")
            if share * (self.max_seq_length - 2) < 1:
                raise UserError(
                    f"`{name}` ({share}) of `max_seq_length` ({self.max_seq_length}) is less than one masked token in "
                    "a block; raise either"
                )
        workers = self.preprocessing_num_workers
        require(workers is None or workers >= 1, "preprocessing_num_workers", workers, "give 1 or more, or null")
        if self.predicts_pairs and self.packing not in OBJECTIVE_PACKINGS[self.objective]:
            raise UserError(
                f"`objective` is {self.objective}, which cannot use blocks of `packing` {self.packing}; give it "
                f"{' or '.join(OBJECTIVE_PACKINGS[self.objective])}"
            )
        if self.hub_model_id is not None:
            check_repo_id("hub_model_id", self.hub_model_id)
        if self.seq_length_warmup_steps and self.packing not in ONE_PART_PACKINGS:
            raise UserError(
                f"`seq_length_warmup_steps` cuts blocks, and those of `packing` {self.packing} have parts that belong "
                f"together; give it {' or '.join(ONE_PART_PACKINGS)}, or 0 updates"
            )
        if self.seq_length_warmup_steps and self.roll_back_loss_spikes:
            raise UserError(
                "`seq_length_warmup_steps` goes by the number of the update's data, of which `roll_back_loss_spikes` "
                "leaves some out; do without one of them"
            )
        if self.streaming:
            self.check_streaming()
        if self.warmup_steps > self.max_steps:
            raise UserError(
                f"`warmup_steps` ({self.warmup_steps}) is more than `max_steps` ({self.max_steps}): "
                "the learning rate would never reach its peak"
            )

    @property
    def predicts_pairs(self) -> bool:
        return self.objective in OBJECTIVE_PACKINGS

    @property
    def adam_betas(self) -> tuple[float, float]:
        return self.adam_beta1, self.adam_beta2

    @property
    def masked_share(self) -> float:
        """The most of a row that is masked, in training or evaluation."""
        return max(self.mlm_probability, self.eval_mlm_probability)

    def seq_length(self, update: int) -> int:
        """Positions of a block in an update, counted from 0."""
        return self.max_seq_length // 4 if update < self.seq_length_warmup_steps else self.max_seq_length

    def positions(self, updates: int) -> int:
        """Positions in the first so many updates."""
        short = min(updates, self.seq_length_warmup_steps)
        lengths = short * self.seq_length(0) + (updates - short) * self.max_seq_length
        return self.train_batch_size * lengths

    def check_streaming(self) -> None:
        if self.masking == "static":
            raise UserError(
                "`masking` is static, which knows a block by its number, and a stream has new blocks in every pass; "
                "switch `streaming` off, or mask dynamically"
            )
        if self.objective == "next_sentence":
            raise UserError(
                "`objective` next_sentence exchanges parts among millions of tokens, and a stream packs few documents "
                "at a time, or one; switch `streaming` off"
            )
        if self.deduplicate:
            raise UserError(
                "`deduplicate` needs every document's checksum before the first block is packed, which a stream does "
                "not have; switch `streaming` or `deduplicate` off"
            )
        if self.prepare_only:
            raise UserError("`prepare_only` makes token stores, and `streaming` does without; switch either off")
        if self.train_batch_size % self.num_lanes:
            nearest = min(divisors(self.train_batch_size), key=lambda n: abs(n - self.num_lanes))
            raise UserError(
                f"`num_lanes` ({self.num_lanes}) does not divide `train_batch_size` ({self.train_batch_size}); the "
                f"nearest number that does is {nearest}"
            )

    def check_lanes(self, num_processes: int) -> None:
        """
        Raises:
            UserError: if processes and workers do not divide `num_lanes`.
        """
        readers = num_processes * max(1, self.dataloader_num_workers)
        if self.streaming and self.num_lanes % readers:
            raise UserError(
                f"`num_lanes` ({self.num_lanes}) is not a multiple of {num_processes} processes x "
                f"{max(1, self.dataloader_num_workers)} `dataloader_num_workers` = {readers}; choose other workers or, "
                "with more processes than lanes, `streaming: false`"
            )

    def gradient_accumulation_steps(self, num_processes: int) -> int:
        """Micro-batches of one process in an update.

        Raises:
            UserError: if processes and micro-batch do not divide `train_batch_size`.
        """
        rows = self.per_device_train_batch_size * num_processes
        if self.train_batch_size % rows:
            share, rest = divmod(self.train_batch_size, num_processes)
            fitting = [n for n in divisors(share) if n < self.per_device_train_batch_size]
            remedy = (
                f"choose a `train_batch_size` that {num_processes} processes divide"
                if rest or not fitting
                else f"the nearest smaller `per_device_train_batch_size` is {fitting[-1]}"
            )
            raise UserError(
                f"`train_batch_size` ({self.train_batch_size}) is not a multiple of `per_device_train_batch_size` "
                f"({self.per_device_train_batch_size}) x {num_processes} processes = {rows}; {remedy}"
            )
        return self.train_batch_size // rows


def first_position(model_type: str, pad_token_id: int) -> int:
    """Number of a row's first position: RoBERTa's stand behind the pad token's."""
    return pad_token_id + 1 if model_type == "roberta" else 0
