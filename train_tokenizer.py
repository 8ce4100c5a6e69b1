"""Train a byte-level BPE vocabulary with RoBERTa's special tokens, or BERT's WordPiece, or ALBERT's Unigram.

python train_tokenizer.py --config recipe/configs/tokenizer/bbpe-50k.yaml
"""

import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path

from recipe.arguments import CorpusArguments, TokenizerArguments, parse_config
from recipe.arguments.corpus_files import local_files
from recipe.base.errors import UserError, run_script
from recipe.base.files import check_output_dir

# The pretraining config that takes each kind of tokenizer, if it has at least so many entries.
SMALL_VOCABULARY = 10_000
PRETRAINING_CONFIGS = {"byte_level_bpe": "roberta-base", "wordpiece": "bert-base", "unigram": "albert-base"}


def main() -> None:
    args = parse_config(TokenizerArguments, __doc__)
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir)
    if (output_dir / "tokenizer.json").exists():
        raise UserError(f"`output_dir` {output_dir} already holds a tokenizer; remove it or choose another folder")

    for corpus in args.corpora:
        local_files(corpus)

    # Imported only here, since it loads torch: options that are wrong are refused without waiting for it.
    from recipe.data.vocabulary import VocabularyText, describe_vocabulary, save_checked, train_vocabulary

    text = VocabularyText(args.corpora, args.max_train_bytes)
    print("\n".join(text.describe()))
    kind, megabytes = f"{args.vocab_size:,} entries of {args.tokenizer_type}", args.max_train_bytes / 1e6
    print(f"{kind} from at most {megabytes:,.0f} MB of text -> {output_dir}")
    if args.dry_run:
        return

    tokenizer = train_vocabulary(args, text.batches())
    save_checked(args, tokenizer, text)

    for name, size in text.read_bytes.items():
        print(f"read {size / 1e6:,.1f} MB of {name}")
    print("\n".join(describe_vocabulary(args, tokenizer, text)))
    print(f"next: {next_command(args, tokenizer.get_vocab_size())}")


def next_command(args: TokenizerArguments, num_entries: int) -> str:
    """Return the command that plans a pretraining with the vocabulary, on the same text."""
    model = PRETRAINING_CONFIGS[args.tokenizer_type]
    size = ["--model_type", model.split("-")[0]] if num_entries < SMALL_VOCABULARY else []
    root = Path(os.path.relpath(Path(__file__).parent))
    config = root / "recipe" / "configs" / "pretrain" / f"{'tiny' if size else model}.yaml"
    defaults = asdict(CorpusArguments(name="", path="_"))
    corpora = [
        {name: value for name, value in asdict(corpus).items() if value != defaults[name]} for corpus in args.corpora
    ]
    options = ["--tokenizer_name", args.output_dir, "--corpora", json.dumps(corpora, ensure_ascii=False), "--dry_run"]
    return shlex.join(["python", str(root / "pretrain.py"), "--config", str(config), *size, *options])


if __name__ == "__main__":
    run_script(main)
