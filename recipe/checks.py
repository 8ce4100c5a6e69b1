"""Everything that has to be right before a run can begin, tried in one place.

`check_run` is what a run does first, and what `--dry_run` prints: a run ends at the first problem, a dry run prints a
line for each and goes on. Nothing else refuses a run before its data is opened.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from recipe.arguments import CorpusArguments, PretrainArguments, identity_of
from recipe.arguments.corpus_files import by_kind, describe_left_out, find_files, local_files
from recipe.arguments.languages import describe_rules
from recipe.base.errors import UserError
from recipe.base.files import check_free_space, check_output_dir
from recipe.base.formatting import count_of, format_bytes, format_count
from recipe.base.model_files import count_ids
from recipe.data.cached import check_tokens, count_held_out, find_store, plan_views
from recipe.data.corpora import check_corpus, corpus_bytes
from recipe.data.packed_corpus import PackedCorpus
from recipe.data.preprocessor import Preprocessor
from recipe.data.streamed import StreamedData
from recipe.data.token_store import TokenStore
from recipe.data.token_store import check_space as check_store_space
from recipe.data.tokenizer import load_tokenizer, tokenizer_checksum
from recipe.modeling.model import build_config, build_model, check_host_memory, count_parameters, usable_length
from recipe.modeling.optimizer import preview_rates
from recipe.publish.hub import fetch_checkpoint
from recipe.publish.rights import check_push
from recipe.run.checkpoint import check_space, open_checkpoint
from recipe.run.directory import HUB_SCHEME, RunDirectory
from recipe.run.launch import on_main

BYTES_PER_TOKEN = 4.4  # of English, by RoBERTa's vocabulary; for a plan made before there is one
STORE_OVERHEAD_BYTES = 0.7  # of a token store for each token, beside its id: sentence ends and tables of blocks

Result = TypeVar("Result")


class Preconditions:
    """Tries one thing after the other; a dry run prints a line for each and counts the problems."""

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.problems = 0

    @contextmanager
    def trying(self, what: str) -> Iterator[list[str]]:
        """Try one thing.

        Yields:
            a list for what there is to say if all is well.

        Raises:
            UserError: there is a problem, and this is no dry run.
        """
        remarks: list[str] = []
        try:
            yield remarks
        except UserError as error:
            if not self.dry_run:
                raise
            self.problems += 1
            print(f"problem  {what}: {' '.join(str(error).split())}")
        else:
            if self.dry_run:
                print(f"ok       {what}: {'; '.join(remarks)}")


class CorpusSize(NamedTuple):
    """Tokens and blocks of a corpus, NaN where they are not known, and what its token store takes if there is none."""

    tokens: float = math.nan
    blocks: float = math.nan
    store_bytes: float = 0.0
    text_bytes: float = 0.0  # still to be tokenised
    seconds: float = 0.0  # in which one process tokenises them


@dataclass
class CheckedRun:
    """What the checks found, with which a run goes on. In a dry run that has problems, some of it is missing.

    Attributes:
        args: of the run, `hub_model_id` with the repository's full id.
        model: with the weights that training begins with; in a dry run only one that was loaded.
        fits_world_size: whether the processes divide the batch.
        identity: what a checkpoint must have in common with the run that resumes it, without that of the data.
        checkpoint, saved: to resume from, and its state.
        sizes: in a dry run, those of `corpora` and `eval_corpora`.
    """

    args: PretrainArguments
    tried: Preconditions
    tokenizer: PreTrainedTokenizerFast | None = None
    config: PreTrainedConfig | None = None
    model: PreTrainedModel | None = None
    preprocessor: Preprocessor | None = None
    fits_world_size: bool = False
    identity: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    saved: dict[str, Any] = field(default_factory=dict)
    sizes: list[CorpusSize] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def check_run(args: PretrainArguments, accelerator: Accelerator, run: RunDirectory) -> CheckedRun:
    """Try everything that a run needs. A dry run is the main process's alone.

    Raises:
        UserError: there is a problem, and this is no dry run.
    """
    tried = Preconditions(args.dry_run)
    check = CheckedRun(args, tried)
    world_size = args.num_gpus or accelerator.num_processes

    def main_only(function: Callable[[], Result]) -> Result:
        return function() if args.dry_run else on_main(accelerator, function)

    with tried.trying("output_dir") as remarks:
        if not args.prepare_only:
            if args.dry_run:
                run.lock.check_free()
            run.check(args.resume_from_checkpoint)
        remarks.append(f"{run.path} can be written")
    with tried.trying("tokenizer") as remarks:
        named_by = "tokenizer_name" if args.tokenizer_name else "model_name_or_path"
        check.tokenizer = load_tokenizer(args.tokenizer_name or str(args.model_name_or_path), named_by)
        check.identity = identity_of(args) | {"tokenizer": tokenizer_checksum(check.tokenizer)}
        largest = count_ids(check.tokenizer.get_vocab()) - 1
        gaps = f", ids up to {largest:,}" if largest >= len(check.tokenizer) else ""
        remarks.append(f"{len(check.tokenizer):,} entries{gaps}")
    with tried.trying("model") as remarks:
        remarks.append(check_model(check))
    with tried.trying("batch") as remarks:
        args.check_lanes(world_size)
        args.check_processes(world_size)
        check.fits_world_size = True
        phases = [args.describe_micro_batches(world_size, first, end - 1) for first, end in args.timeline.bounds]
        remarks += dict.fromkeys(phases)
    with tried.trying("schedule") as remarks:
        rates = preview_rates(args.learning_rate, *args.schedule)
        remarks.append(f"{args.lr_scheduler_type}, up to {max(rates):.3g}, at the end {rates[-1]:.3g}")
    # All that is local comes before a checkpoint is downloaded, or a repository made.
    check_corpora(check)
    if check.config and not args.prepare_only:
        with tried.trying("disk") as remarks:
            with torch.device("meta"):
                parameters = count_parameters(build_model(check.config, None, args.predicts_pairs))
            remarks.append(check_space(run.checkpoints, parameters, args.save_total_limit))
    wanted = args.resume_from_checkpoint
    if wanted is not None and check.tokenizer and not args.prepare_only:
        with tried.trying("checkpoint") as remarks:
            path = main_only(lambda: fetch_checkpoint(args))
            opened = open_checkpoint(run.checkpoints, path, check.identity, asdict(args))
            check.checkpoint, check.saved, lines = opened
            check.lines += lines
            is_remote = wanted.startswith(HUB_SCHEME)
            remarks += lines or [f"{wanted} is there" if is_remote else "there is none yet"]
    if args.push_to_hub and not args.prepare_only:
        with tried.trying("hub") as remarks:
            is_fresh = check.checkpoint is None and not (wanted or "").startswith(HUB_SCHEME)
            repo_id, warnings = main_only(lambda: check_push(args, is_fresh))
            check.args = replace(args, hub_model_id=repo_id)
            check.lines += warnings
            remarks += warnings or [f"{repo_id} can be written"]
    return check


def check_model(check: CheckedRun) -> str:
    """Build the architecture and the model, from scratch only where a run is going to train it.

    Returns:
        a remark.

    Raises:
        UserError: they cannot be built, or do not fit the tokenizer.
    """
    args, source = check.args, check.args.model_name_or_path
    check.config = build_config(args.model_config, source, check.tokenizer, args.max_seq_length, args.model_type)
    if source or not args.dry_run:
        with torch.device("meta"):
            contentless = build_model(check.config, None, args.predicts_pairs)
        check_host_memory(contentless, "model_name_or_path" if source else "model_config")
        torch.manual_seed(args.seed)
        check.model = build_model(check.config, source, args.predicts_pairs)
    if check.tokenizer:
        before = check.tokenizer.model_max_length if source else 0
        check.tokenizer.model_max_length = usable_length(check.config, args.max_seq_length, before)
    return "fits the tokenizer" if check.tokenizer else f"{check.config.vocab_size:,} entries, without a tokenizer"


def check_corpora(check: CheckedRun) -> None:
    """Try each corpus, and all together."""
    args, tried = check.args, check.tried
    if check.tokenizer:
        with tried.trying("preprocessing") as remarks:
            check.preprocessor = Preprocessor(args, check.tokenizer)
            remarks.append(f"sentences by {args.sentence_splitter}, blocks of {args.packing}")
            if args.sentence_splitter == "sentencex" and (remark := describe_rules(args.language)):
                remarks.append(remark)
                check.lines.append(f"warning: {remark}")
    stores: list[TokenStore] = []
    corpora = [*args.corpora, *args.eval_corpora]
    check.sizes = [CorpusSize() for _ in corpora]
    num_readable = 0
    for number, corpus in enumerate(corpora):
        with tried.trying(f"corpus {corpus.name}") as remarks:
            files, left_out = find_files(corpus)
            if check.preprocessor and not args.streaming:
                stores.append(find_store(args, check.preprocessor, corpus))
            store = stores[-1] if stores else None
            if check.preprocessor is None:
                check_corpus(corpus, args.max_unreadable_documents)
            elif store is None or not store.is_complete:
                check.preprocessor.check_corpus(corpus)
                unknown = check.preprocessor.describe_head(corpus)
                remarks += unknown
                check.lines += unknown if args.streaming else []  # a store has their exact number
            if args.dry_run:
                check.sizes[number], remark = size_up(args, corpus, check.preprocessor, store)
                kinds = ", ".join(f"{len(same):,} {kind}" for kind, same in by_kind(files or []).items())
                about = f"{count_of(len(files), 'file')} ({kinds}), " if files else ""
                remarks.append(f"{corpus.path}, {about}{remark}")
            if rest := describe_left_out(left_out):
                remarks.append(f"left out: {rest}")
                check.lines.append(f"corpus {corpus.name}: left out of {corpus.path}: {rest}")
            num_readable += 1
    if check.preprocessor and num_readable == len(corpora):
        with tried.trying("data") as remarks:
            if stores:
                check_writable(args, check.preprocessor, stores)
                check_store_space(stores[0].path.parent, stores)
            if args.dry_run and stores:
                remarks.append(check_stores(stores, check.sizes))
                check_blocks(args, check.sizes)
            elif args.dry_run:  # a stream is opened in seconds
                remarks += StreamedData(args, check.preprocessor).describe()[len(args.corpora) :]


def size_up(
    args: PretrainArguments, corpus: CorpusArguments, preprocessor: Preprocessor | None, store: TokenStore | None
) -> tuple[CorpusSize, str]:
    """Count tokens and blocks of a corpus in its token store, or else estimate them from its size and its head.

    Returns:
        these, and a remark.

    Raises:
        UserError: the corpus cannot be read, or what is stored of it is damaged.
    """
    positions = args.max_seq_length - 2
    copies = " with their copies, which `deduplicate` finds once all is read" if args.deduplicate else ""
    if preprocessor and store and store.is_complete:
        tokens = store.counts()["tokens"]
        view = PackedCorpus(store, preprocessor.format)
        is_packed = view.is_complete and not args.deduplicate  # which has another view, that needs all corpora
        if is_packed:
            view.open()
        blocks = float(len(view)) if is_packed else tokens / positions
        return CorpusSize(tokens, blocks), f"{tokens:,} tokens{copies}, in a token store"
    try:
        size = corpus_bytes(corpus)
    except UserError:
        if local_files(corpus) is not None:
            raise
        return CorpusSize(), "which does not publish its size"
    if preprocessor is None:
        found = CorpusSize(size / BYTES_PER_TOKEN, size / BYTES_PER_TOKEN / positions)
    else:
        head = preprocessor.measure_head(corpus)
        times = size / head.bytes
        store_bytes = times * head.tokens * (preprocessor.encoder.dtype.itemsize + STORE_OVERHEAD_BYTES)
        found = CorpusSize(times * head.tokens, times * head.blocks, store_bytes, size, times * head.seconds)
    return found, f"about {format_bytes(size)} of text, {format_count(found.tokens)} tokens{copies}"


def check_writable(args: PretrainArguments, preprocessor: Preprocessor, stores: list[TokenStore]) -> None:
    """Raise a `UserError` if a token store or view that is still to be made cannot be written."""
    views = [view for same in plan_views(args, preprocessor, stores, {}).values() for view in same]
    # Which view a run with `deduplicate` has is known only once all stores are there.
    missing = [v.store.path for v in views if not (v.store.is_complete if args.deduplicate else v.is_complete)]
    for folder in sorted({path if path.exists() else path.parent for path in missing}):
        check_output_dir(folder, "token_store_dir")


def check_stores(stores: list[TokenStore], sizes: list[CorpusSize]) -> str:
    """Describe the token stores that are still to be made.

    Raises:
        UserError: they do not fit on the disk.
    """
    missing = [size for store, size in zip(stores, sizes, strict=True) if not store.is_complete]
    if not missing:
        return "all token stores are there"
    known = [size.store_bytes for size in missing if not math.isnan(size.tokens)]
    text = f"{format_bytes(sum(known))}{'' if len(known) == len(missing) else ' and more'}"
    remedy = "free some, set `token_store_dir` to a folder on another disk, or `streaming: true`"
    contents = f"{len(missing)} token stores of about {text}, to be made first,"
    return check_free_space(stores[0].path.parent, sum(known), contents, remedy)


def check_blocks(args: PretrainArguments, sizes: list[CorpusSize]) -> None:
    """Raise a `UserError` if a corpus is too small for a block, or for the blocks that it holds out."""
    for corpus, size in zip([*args.corpora, *args.eval_corpora], sizes, strict=True):
        check_tokens(corpus, size.tokens, args.max_seq_length)
    blocks = [size.blocks for size in sizes[: len(args.corpora)]]
    if not any(map(math.isnan, blocks)):
        count_held_out(args, blocks)
