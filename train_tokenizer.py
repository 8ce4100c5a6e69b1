"""Train a byte-level BPE vocabulary with RoBERTa's special tokens, or BERT's WordPiece, or ALBERT's Unigram.

python train_tokenizer.py --config recipe/configs/tokenizer/bbpe-50k.yaml
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from recipe.arguments import TokenizerArguments, parse_config
from recipe.base.errors import UserError, report_user_errors
from recipe.base.files import check_output_dir
from recipe.base.progress import progress_bar
from recipe.data.corpora import check_corpus, corpus_bytes, sample_texts
from recipe.data.tokenizer import (
    check_common_words,
    check_saved_tokenizer,
    save_tokenizer,
    train_byte_level_bpe,
    train_unigram,
    train_wordpiece,
)

CONFIGS = {"byte_level_bpe": "roberta-base", "wordpiece": "bert-base", "unigram": "albert-base"}  # what comes next
# Of each corpus, for the checks after training:
COUNTED_BYTES = 1_000_000  # text whose words are counted
COMPARED_TEXTS, COMPARED_CHARACTERS = 50, 2000  # texts encoded with the trained and the saved tokenizer


def main() -> None:
    args = parse_config(TokenizerArguments, __doc__)
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir)
    if (output_dir / "tokenizer.json").exists():
        raise UserError(f"`output_dir` {output_dir} already holds a tokenizer; remove it or choose another folder")

    available = {corpus.name: corpus_bytes(corpus) for corpus in args.corpora if corpus.weight is None}
    for corpus in args.corpora:
        check_corpus(corpus)
        size = f", about {available[corpus.name] / 1e6:,.0f} MB" if corpus.name in available else ""
        print(f"corpus {corpus.name}: {corpus.path}{size}")
    expected_bytes = min(args.max_train_bytes, round(sum(available.values())) or args.max_train_bytes)
    entries = f"{args.vocab_size:,} entries of {args.tokenizer_type}"
    print(f"{entries} from at most {args.max_train_bytes / 1e6:,.0f} MB of text -> {output_dir}")
    if args.dry_run:
        return

    read_bytes: Counter[str] = Counter()
    word_counts: Counter[str] = Counter()
    sample: list[str] = []

    def texts() -> Iterator[list[str]]:
        with progress_bar("reading", expected_bytes, "B") as bar:
            for name, batch, size in sample_texts(args.corpora, args.max_train_bytes):
                if not read_bytes[name]:
                    sample.extend(text[:COMPARED_CHARACTERS] for text in batch[:COMPARED_TEXTS])
                if read_bytes[name] < COUNTED_BYTES:
                    word_counts.update(word for text in batch for word in re.findall(r"(?<= )[^\W\d_]+", text))
                read_bytes[name] += size
                bar.update(size)
                yield batch

    longest = args.max_document_characters
    if args.tokenizer_type == "wordpiece":
        tokenizer = train_wordpiece(texts(), args.vocab_size, args.min_frequency, args.do_lower_case, longest)
    elif args.tokenizer_type == "unigram":
        tokenizer = train_unigram(texts(), args.vocab_size, args.do_lower_case, longest)
    else:
        tokenizer = train_byte_level_bpe(texts(), args.vocab_size, args.min_frequency, args.add_prefix_space, longest)
    # Not under its name before the checks are through; what fails them is kept to look at.
    unchecked = output_dir.resolve().with_name(f".{output_dir.resolve().name}.unchecked")
    save_tokenizer(tokenizer, unchecked, args.add_prefix_space, args.model_max_length, args.do_lower_case)
    check_common_words(tokenizer, word_counts)
    check_saved_tokenizer(tokenizer, unchecked, sample, args.add_prefix_space)
    shutil.copytree(unchecked, output_dir, dirs_exist_ok=True)
    shutil.rmtree(unchecked)

    for name, size in read_bytes.items():
        print(f"read {size / 1e6:,.1f} MB of {name}")
    entries = tokenizer.get_vocab_size()
    if entries < args.vocab_size:
        print(f"warning: the text had pairs for {entries:,} of {args.vocab_size:,} entries only")
    tokens = sum(len(encoding) for encoding in tokenizer.encode_batch(sample, add_special_tokens=False))
    print(f"{output_dir}: {entries:,} entries, {sum(len(t.encode()) for t in sample) / tokens:.2f} bytes a token")
    config = f"recipe/configs/pretrain/{CONFIGS[args.tokenizer_type]}.yaml"
    print(f"next: accelerate launch pretrain.py --config {config} --tokenizer_name {output_dir} --dry_run")


if __name__ == "__main__":
    with report_user_errors():
        main()
