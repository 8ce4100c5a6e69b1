"""Train a byte-level BPE vocabulary with RoBERTa's special tokens, or BERT's WordPiece, or ALBERT's Unigram.

python train_tokenizer.py --config recipe/configs/tokenizer/bbpe-50k.yaml
"""

from pathlib import Path

from recipe.arguments import TokenizerArguments, parse_config
from recipe.arguments.corpus import local_files
from recipe.base.errors import UserError, run_script
from recipe.base.files import check_output_dir

# The pretraining config that takes each kind of tokenizer.
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
    from recipe.data.vocabulary import VocabularyText, save_checked, train_vocabulary

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
    num_entries = tokenizer.get_vocab_size()
    if num_entries < args.vocab_size:
        print(f"warning: the text had pairs for only {num_entries:,} of {args.vocab_size:,} entries")
    print(f"{output_dir}: {num_entries:,} entries, {text.bytes_per_token(tokenizer):.2f} bytes a token")
    config = f"recipe/configs/pretrain/{PRETRAINING_CONFIGS[args.tokenizer_type]}.yaml"
    print(f"next: accelerate launch pretrain.py --config {config} --tokenizer_name {output_dir} --dry_run")


if __name__ == "__main__":
    run_script(main)
