"""Everything that has to be right before a run can begin, tried in one place.

`check_run` is what a run does first, and what `--dry_run` prints: a run ends at the first problem, a dry run prints a
line for each and goes on. Nothing else refuses a run before its data is opened.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from recipe.arguments import CorpusArguments, PretrainArguments, identity_of
from recipe.arguments.corpus import describe_left_out, find_files
from recipe.base.errors import UserError
from recipe.base.files import check_free_space
from recipe.base.formatting import format_bytes, format_count
from recipe.data.cached import find_store
from recipe.data.corpora import check_corpus, corpus_bytes, open_source
from recipe.data.preprocessor import Preprocessor
from recipe.data.streamed import StreamedData
from recipe.data.token_store import TokenStore
from recipe.data.token_store import check_space as check_store_space
from recipe.data.tokenizer import load_tokenizer, tokenizer_checksum
from recipe.modeling.model import build_config, build_model, check_host_memory, count_parameters
from recipe.publish.hub import check_push, fetch_checkpoint
from recipe.run.checkpoint import check_space, open_checkpoint
from recipe.run.directory import HUB_SCHEME, RunDirectory
from recipe.run.launch import on_main

HEAD_BYTES = 300_000  # of a corpus's text, that its tokens are estimated from
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


@dataclass
class CheckedRun:
    """What the checks found, with which a run goes on. In a dry run that has problems, some of it is missing.

    Attributes:
        args: of the run, `hub_model_id` with the repository's full id.
        model: with the weights that training begins with; in a dry run only one that was loaded.
        fits_world_size: whether the processes divide the batch.
        identity: what a checkpoint must have in common with the run that resumes it, without that of the data.
        checkpoint, saved: to resume from, and its state.
        tokens: in a dry run, about how many tokens each corpus has; NaN where that is not known.
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
    tokens: dict[str, float] = field(default_factory=dict)
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
        remarks.append(f"{len(check.tokenizer):,} entries")
    with tried.trying("model") as remarks:
        remarks.append(check_model(check))
    with tried.trying("batch") as remarks:
        args.check_lanes(world_size)
        accumulation = args.gradient_accumulation_steps(world_size)
        check.fits_world_size = True
        times = "once" if accumulation == 1 else f"{accumulation} times"
        remarks.append(f"{world_size} x {args.per_device_train_batch_size} blocks, {times} an update")
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
    return "fits the tokenizer" if check.tokenizer else f"{check.config.vocab_size:,} entries, without a tokenizer"


def check_corpora(check: CheckedRun) -> None:
    """Try each corpus, and all together."""
    args, tried = check.args, check.tried
    if check.tokenizer:
        with tried.trying("preprocessing") as remarks:
            check.preprocessor = Preprocessor(args, check.tokenizer)
            remarks.append(f"sentences by {args.sentence_splitter}, blocks of {args.packing}")
    stores: list[TokenStore] = []
    corpora = [*args.corpora, *args.eval_corpora]
    num_readable = 0
    for corpus in corpora:
        with tried.trying(f"corpus {corpus.name}") as remarks:
            if check.preprocessor and not args.streaming:
                stores.append(find_store(args, check.preprocessor, corpus))
            store = stores[-1] if stores else None
            if check.preprocessor is None:
                check_corpus(corpus, args.max_unreadable_documents)
            elif store is None or not store.is_complete:
                check.preprocessor.check_corpus(corpus)
            if args.dry_run:
                check.tokens[corpus.name], remark = count_tokens(corpus, check.preprocessor, store)
                remarks.append(f"{corpus.path}, {remark}")
            if left_out := describe_left_out(find_files(corpus)[1]):
                remarks.append(f"left out: {left_out}")
                check.lines.append(f"corpus {corpus.name}: left out of {corpus.path}: {left_out}")
            num_readable += 1
    if check.preprocessor and num_readable == len(corpora):
        with tried.trying("data") as remarks:
            if stores:
                check_store_space(stores[0].path.parent, stores)
            if args.dry_run and stores:
                remarks.append(check_stores(stores, check.preprocessor, check.tokens))
            elif args.dry_run:  # a stream is opened in seconds
                remarks += StreamedData(args, check.preprocessor).describe()[len(args.corpora) :]


def count_tokens(
    corpus: CorpusArguments, preprocessor: Preprocessor | None, store: TokenStore | None
) -> tuple[float, str]:
    """Count the tokens of a corpus where it has a token store, and else estimate them from its size and its head.

    Returns:
        the tokens, NaN if the corpus's size is not known; and a remark.

    Raises:
        UserError: the corpus cannot be read.
    """
    if store and store.is_complete:
        tokens = store.counts()["tokens"]
        return tokens, f"{tokens:,} tokens, in a token store"
    try:
        size = corpus_bytes(corpus)
    except UserError:
        return math.nan, "which does not publish its size"
    tokens_estimated = size / (bytes_per_token(corpus, preprocessor) if preprocessor else BYTES_PER_TOKEN)
    return tokens_estimated, f"about {format_bytes(size)} of text, {format_count(tokens_estimated)} tokens"


def bytes_per_token(corpus: CorpusArguments, preprocessor: Preprocessor) -> float:
    """Measure how many bytes of text a token has, at the head of a corpus."""
    texts: list[str] = []
    size = 0
    for _, text in open_source(corpus).read(0):
        if isinstance(text, str):
            texts.append(text[:HEAD_BYTES])
            size += len(texts[-1].encode())
        if size >= HEAD_BYTES:
            break
    return size / max(1, sum(len(ids) for ids, _ in preprocessor.encoder(texts)))


def check_stores(stores: list[TokenStore], preprocessor: Preprocessor, tokens: dict[str, float]) -> str:
    """Estimate the token stores that are still to be made, by the tokens of each corpus.

    Raises:
        UserError: they do not fit on the disk.
    """
    missing = [store for store in stores if not store.is_complete]
    if not missing:
        return "all token stores are there"
    token_bytes = preprocessor.encoder.dtype.itemsize + STORE_OVERHEAD_BYTES
    known = [tokens[store.corpus.name] for store in missing if not math.isnan(tokens[store.corpus.name])]
    needed = sum(known) * token_bytes
    sizes = f"{format_bytes(needed)}{'' if len(known) == len(missing) else ' and more'}"
    remedy = "free some, set `token_store_dir` to a folder on another disk, or `streaming: true`"
    contents = f"{len(missing)} token stores of about {sizes}, to be made first,"
    return check_free_space(missing[0].path.parent, needed, contents, remedy)
