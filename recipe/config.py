"""Every option of the recipe, and the one place that reads them.

An option is a dataclass field; its docstring is its `--help`. `parse_config` takes the field's default, then the YAML
of `--config`, then the flags, and returns the checked dataclass. Fields made with `identity()` define the experiment:
a checkpoint can only be resumed with the same values; everything else may change between two starts of a run.
"""

import argparse
import difflib
import logging
import math
import os
import re
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, TypeVar

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_parsing_settings

# Whose blocks are of one part: they can be cut short, and do not depend on what comes after the next one.
ONE_PART_PACKINGS = ("full_sentences", "contiguous")
PAIR_PACKINGS = ("segment_pair", "sentence_pair", "sentence_order")
OBJECTIVE_PACKINGS = {"next_sentence": ("segment_pair", "sentence_pair"), "sentence_order": ("sentence_order",)}


class UserError(ValueError):
    """Something that the user can mend; the message names the field or file, the value and the way out."""


@contextmanager
def report_user_errors() -> Iterator[None]:
    """End the script with the message alone, on stderr and with exit status 2, when the input was at fault."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def one_line(error: Exception) -> str:
    """What a library says, as part of a message of ours."""
    if isinstance(error, UnpicklingError):  # whose message recommends to load it all the same
        return "it holds something else than tensors and plain values, or is damaged, and is not loaded"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def reading(file: object, remedy: str) -> Iterator[None]:
    """Turn what the contents of a damaged file make of the code that reads it into an error that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has its own
        raise UserError(f"{file} is damaged or missing ({one_line(error)}); {remedy}") from error


def read_yaml(file: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: no file of names and values.
    """
    with reading(file, "mend it, or take another folder"):
        values = yaml.safe_load(file.read_text())
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise ValueError("not names with values")
    return values


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean `x`?` for the nearest of the known names, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def identity(**kwargs: Any) -> Any:
    """A dataclass field that must not change between a checkpoint and its resume."""
    return field(metadata={"identity": True}, **kwargs)


@dataclass(kw_only=True)
class CorpusArguments:
    name: str
    """What logs, counters and the model card call this corpus."""
    path: str
    """A hub data set id, or local `.jsonl`, `.json` (one object a line) or `.txt`, plain or `.gz`, `.zst`, `.xz`, or
    `.parquet` or `.arrow`: a file, a folder or a glob; or the folder of a token store."""
    config_name: str | None = None
    """Configuration of the hub data set, `20231101.en` say."""
    split: str = "train"
    """Split of the hub data set."""
    revision: str | None = None
    """Revision of the hub data set; `refs/convert/parquet` opens one that is still a script."""
    text_column: str = "text"
    """The column that holds the documents."""
    sample_by: Literal["document", "paragraph"] = "document"
    """What one document of a `.txt` is: the whole file, or what stands between blank lines."""
    weight: float | None = None
    """Relative share of this corpus; without it, its size. Give it to all corpora or to none."""

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(f"`path` of corpus {self.name!r} is empty; name a data set, a file, a folder or a glob")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise UserError(f"`weight` of corpus {self.name!r} is {self.weight}; give a positive number or none")
        check_values(self)


def check_corpora(name: str, corpora: list[CorpusArguments]) -> None:
    names = [corpus.name for corpus in corpora]
    if doubled := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"`{name}` holds two corpora named {doubled[0]!r}; give each a name of its own")
    unweighted = [corpus.name for corpus in corpora if corpus.weight is None]
    if 0 < len(unweighted) < len(corpora):
        raise UserError(
            f"`{name}`: {', '.join(unweighted)} has no `weight` while others have; "
            "a default weight is a size and cannot be mixed with given ones: give all or none"
        )


def require(condition: bool, name: str, value: Any, remedy: str) -> None:
    """Raise a `UserError` about the field `name` unless the condition holds."""
    if not condition:
        raise UserError(f"`{name}` is {value}; {remedy}")


# Fields that name a file or folder, or may.
PATHS = {"output_dir", "path", "tokenizer_name", "model_name_or_path", "token_store_dir", "resume_from_checkpoint"}
PATHS |= {"glue_dir", "decontaminate_against"}
LARGEST = 2**48  # that a number may be, to be reckoned with in no time and without overflow


def check_values(arguments: Any) -> None:
    """
    Raises:
        UserError: a number that is not finite, or larger than anything that is meant; a path that none can be.
    """
    for f in fields(arguments):
        value = getattr(arguments, f.name)
        if isinstance(value, int | float) and f.name != "seed":
            require(abs(value) < LARGEST, f.name, value, "give a number below 2**48")
        if f.name in PATHS:
            for path in value if isinstance(value, list) else [value]:
                require(path is None or is_path(path), f.name, f"{path!r:.100}", "no path can be that; name another")


def is_path(name: str) -> bool:
    """Whether the system takes it."""
    try:
        parts = [os.fsencode(part) for part in name.split("/")]
    except UnicodeEncodeError:
        return False
    return "\0" not in name and max(map(len, parts)) < 256 and len(os.fsencode(name)) < 4096


def divisors(number: int) -> list[int]:
    """Ascending; of 0 none."""
    small = [n for n in range(1, math.isqrt(number) + 1) if not number % n]
    return sorted({*small, *(number // n for n in small)})


def check_repo_id(name: str, repo_id: str) -> None:
    """
    Raises:
        UserError: no name that a repository on the hub can have.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"`{name}` is {repo_id!r}; write user/name or organisation/name. {error}") from None


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in [path, *path.absolute().parents] if folder.exists())


def check_output_dir(path: Path) -> None:
    """
    Raises:
        UserError: there is a file of that name, or no right to write.
    """
    there = existing(path)
    if not there.is_dir():
        raise UserError(f"`output_dir` {path}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise UserError(f"`output_dir` {path}: {there} cannot be written")


@dataclass(kw_only=True)
class TokenizerArguments:
    output_dir: str
    """Folder for `tokenizer.json`, `tokenizer_config.json` and the vocabulary."""
    corpora: list[CorpusArguments]
    """The text to learn the vocabulary from; the same list as in the pretraining config."""
    tokenizer_type: Literal["byte_level_bpe", "wordpiece", "unigram"] = "byte_level_bpe"
    """RoBERTa's, BERT's or ALBERT's kind of vocabulary."""
    do_lower_case: bool = False
    """Uncased and without accents; of `wordpiece` and `unigram`."""
    vocab_size: int = 50265
    """Entries in all; of byte-level BPE 5 special tokens, 256 bytes, the rest merges (the released RoBERTa has 50265,
    BERT 30522 uncased and 28996 cased, ALBERT 30000)."""
    min_frequency: int = 2
    """Occurrences that a pair needs before it is merged; `unigram` has no use for it."""
    max_train_bytes: int = 10_000_000_000
    """UTF-8 bytes read in all, shared among the corpora by weight and among a corpus's files evenly. The trainer
    counts words, so its memory grows with the distinct words in this budget, not with the corpora."""
    max_document_characters: int = 1_000_000
    """Longer documents are cut at a space between two letters, which changes no token."""
    add_prefix_space: bool = False
    """Treat the first word of a text as if a space stood before it (RoBERTa: false); of `byte_level_bpe`."""
    model_max_length: int = 512
    """Length, in tokens, that the saved tokenizer truncates to when it is asked to."""
    dry_run: bool = False
    """Check everything, print the plan and stop."""

    def __post_init__(self) -> None:
        check_values(self)
        require(bool(self.output_dir), "output_dir", "empty", "name a folder")
        require(bool(self.corpora), "corpora", "empty", "name at least one corpus")
        check_corpora("corpora", self.corpora)
        if self.tokenizer_type == "byte_level_bpe":
            require(self.vocab_size >= 261, "vocab_size", self.vocab_size, "5 special tokens and 256 bytes need 261")
            require(not self.do_lower_case, "do_lower_case", True, "byte_level_bpe keeps every byte; leave it false")
        else:
            require(self.vocab_size >= 100, "vocab_size", self.vocab_size, "give 100 or more")
            require(not self.add_prefix_space, "add_prefix_space", True, "it is an option of byte_level_bpe only")
        require(self.min_frequency >= 1, "min_frequency", self.min_frequency, "give 1 or more")
        require(self.max_train_bytes >= 1, "max_train_bytes", self.max_train_bytes, "give a positive number of bytes")
        require(
            self.max_document_characters >= 1000,
            "max_document_characters",
            self.max_document_characters,
            "give 1000 or more",
        )
        require(self.model_max_length >= 4, "model_max_length", self.model_max_length, "give 4 or more")


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
            raise UserError("`tokenizer_name` is missing; name a folder or hub id, or give `model_name_or_path`")
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


Arguments = TypeVar("Arguments", TokenizerArguments, PretrainArguments, GlueArguments)


def identity_of(arguments: PretrainArguments | GlueArguments) -> dict[str, Any]:
    """The values of the fields that define the experiment."""
    values = asdict(arguments)
    return {f.name: values[f.name] for f in fields(arguments) if f.metadata.get("identity")}


def to_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def known_names(cls: type) -> list[str]:
    """Field names of a dataclass, and of the dataclasses in its lists."""
    inner = [t for f in fields(cls) for t in typing.get_args(f.type) if is_dataclass(t)]
    return [f.name for f in fields(cls)] + [name for t in inner for name in known_names(t)]


def read_configs(cls: type, files: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge YAML files: a later one wins, field by field, and in `model_config` key by key.

    Args:
        cls: the dataclass whose fields they give.
        files: in their order on the command line.

    Returns:
        values: of the fields that are given.
        sources: the file that each field's value is from.

    Raises:
        UserError: a file cannot be read, has an unknown field, or gives nothing that the files after it do not replace.
    """
    known = [f.name for f in fields(cls)]
    values: dict[str, Any] = {}
    owners: dict[str, int] = {}  # by field or `model_config.key` the number of the file: a file may be given twice
    for number, file in enumerate(files):
        if not Path(file).is_file():
            raise UserError(f"--config {file}: there is no such file")
        try:
            given = get_loader("yaml")(Path(file).read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"--config {file}: not valid UTF-8 at byte {error.start}") from None
        except Exception as error:  # of the parser, and of Python for numbers and nesting beyond its limits
            raise UserError(f"--config {file}: not valid YAML ({one_line(error)})") from None
        if not given or not isinstance(given, dict):
            content = "nothing" if not given else "a list" if isinstance(given, list) else "a single value"
            raise UserError(f"--config {file} holds {content}; write fields with their values, as in `seed: 42`")
        # A run's config.yaml can be given to --config again; what it ran on is no option.
        given.pop("environment", None)
        for name, value in given.items():
            if name not in known:
                raise UserError(f"there is no field `{name}` (in {file}){did_you_mean(str(name), known)}")
            owners[name] = number
            if isinstance(value, dict):
                owners |= {f"{name}.{key}": number for key in value}
                if isinstance(values.get(name), dict):
                    value = values[name] | value
            values[name] = value
    for number, file in enumerate(files):
        if number not in owners.values():
            raise UserError(
                f"--config {file} has no effect, because the files after it give all of its fields again; give the "
                "complete file first and its overlays after it, each once"
            )
    return values, {name: files[number] for name, number in owners.items()}


def explain(error: Exception, cls: type, flags: list[str], sources: dict[str, str]) -> str:
    """The parser's message as ours: the field, where it was given, the value, the nearest right name."""
    text = str(error)
    files = " and ".join(dict.fromkeys(sources.values()))

    def source(name: str) -> str:
        on_line = name not in sources or any(flag.startswith(f"--{name}") for flag in flags)
        return "on the command line" if on_line else f"in {sources[name]}"

    if unknown := re.search(r"Option '([^']+)' is not accepted|[Uu]nrecognized arguments: --([^\s=]+)", text):
        name = unknown[1] or unknown[2]
        parent = re.search(r'Parser key "([^"]+)"', text)
        place = f" in `{parent[1]}`" if parent else ""
        hint = did_you_mean(name, known_names(cls))
        return f"there is no field `{name}`{place} ({source(parent[1] if parent else name)}){hint}"
    if wrong := re.search(r"given class_path '([^']+)'", text):
        return f"`corpora` ({source('corpora')}): {wrong[1]!r} is no corpus; write {{name: ..., path: {wrong[1]}}}"
    if missing := re.search(r"arguments are required: (.+)", text):
        read = f" (read: {files}; an overlay comes after the file it changes)" if files else ""
        return f"{missing[1]} must be given, as a flag or in the YAML of --config{read}"
    if wrong := re.search(r'Parser key "([^"]+)":\s*(.*)', text, re.DOTALL):
        name, detail = wrong[1], re.sub(r"typing\.|<class '(\w+)'>", r"\1", " ".join(wrong[2].split()))
        return f"`{name}` ({source(name.split('.')[0])}): {detail}"
    return f"{files or 'the command line'}: {text}"


def parse_config(cls: type[Arguments], description: str, arguments: list[str] | None = None) -> Arguments:
    """Read `cls` from the command line and the YAMLs of `--config`.

    Flags win over the YAMLs, a later YAML over an earlier one, all of them over defaults.

    Args:
        cls: the dataclass to fill.
        description: shown by `--help`.
        arguments: the command line without the program's name; `sys.argv[1:]` if None.

    Raises:
        UserError: unknown or misspelt field, wrong type, bad choice, missing file, or values that contradict.
    """
    logging.getLogger("jsonargparse").setLevel(logging.ERROR)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with any of the fields below. Give it again for an overlay, a file with what it changes: a "
        "later file replaces single fields of those before it, and in `model_config` single keys; a list such as "
        "`corpora` is replaced as a whole. A flag wins over every file.",
    )
    parser.add_class_arguments(cls, as_group=False)
    configs = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    configs.add_argument("--config", action="append", default=[])
    sources: dict[str, str] = {}
    flags: list[str] = []
    try:
        found, flags = configs.parse_known_args(arguments)
        # A flag that is true or false may stand alone, as in `--dry_run`.
        switches = {f"--{f.name}" for f in fields(cls) if f.type is bool}
        for i, flag in enumerate(flags):
            if flag in switches and (flags[i + 1 : i + 2] or ["--"])[0].startswith("--"):
                flags[i] = f"{flag}=true"
        values, sources = read_configs(cls, found.config)
        # The parser would replace a `model_config` as a whole. With quotes and types, what is read stays what it is.
        merged = [f"--config={yaml.safe_dump(values, default_style=chr(34), sort_keys=False)}"] if values else []
        namespace = parser.parse_args(merged + flags)
    except (ArgumentError, TypeError, RecursionError) as error:
        raise UserError(explain(error, cls, flags, sources)) from None
    values = dict(vars(parser.instantiate(namespace)))
    del values["config"]
    for f in fields(cls):
        # The parser lets a null of the YAML through for every type.
        if values[f.name] is None and type(None) not in typing.get_args(f.type):
            place = f" (in {sources[f.name]})" if f.name in sources else ""
            raise UserError(f"`{f.name}`{place} is null; give a value, or leave it out for the default")
    return cls(**values)
