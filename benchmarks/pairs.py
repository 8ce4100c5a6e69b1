"""What gives the labels of pairs away without reading them, how they change from pass to pass, and what reading costs.

python benchmarks/pairs.py --tokenizers runs/tokenizer runs/wordpiece --corpora corpora/news --output results.json

Sections (`--sections` takes some of them):

cues        of each objective, corpus, tokenizer and length: the AUC of a classifier that sees only the lengths of the
            two parts, and of one that sees only the first and the last token of each (0.5: neither tells anything); the
            share of pairs whose parts are from two documents or swapped; the share of blocks that another pass changes
cost        microseconds to read a block, and to read and mask it, single parts and pairs
buffers     of the first pass's worth of blocks of a stream, the share of distinct ones, by lanes and shuffle buffer
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import scipy.sparse
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.base.errors import run_script
from recipe.data.batches import Rank, Resume, Row
from recipe.data.cached import CachedData
from recipe.data.preprocessor import Preprocessor
from recipe.data.streamed import StreamedData
from recipe.data.tokenizer import load_tokenizer

OBJECTIVES = {"segment_pair": "next_sentence", "sentence_pair": "next_sentence", "sentence_order": "sentence_order"}
MAX_BLOCKS = 20_000  # of a corpus, that are looked at; half of them train the classifier


def settings(tokenizer: str, corpus: str, **changes: Any) -> tuple[PretrainArguments, Preprocessor]:
    given = {"output_dir": "unused", "corpora": [CorpusArguments(name=Path(corpus).name, path=corpus)]}
    given |= {"tokenizer_name": tokenizer, "eval_blocks": 0, "train_batch_size": 256, "dataloader_num_workers": 0}
    args = PretrainArguments(**(given | changes))
    return args, Preprocessor(args, load_tokenizer(tokenizer))


def examples(data: CachedData, visit: int) -> list[dict[str, Any]]:
    blocks = np.random.default_rng(0).permutation(len(data.packed[0]))[:MAX_BLOCKS].tolist()
    return [data.example(Row(0, visit, block, data.args.max_seq_length)) for block in blocks]


def auc(features: Any, labels: np.ndarray, classifier: Any) -> float:
    half = len(labels) // 2
    classifier.fit(features[:half], labels[:half])
    return round(float(roc_auc_score(labels[half:], classifier.predict_proba(features[half:])[:, 1])), 3)


def border_tokens(pairs: list[dict[str, Any]], separators: int, vocab_size: int) -> scipy.sparse.csr_matrix:
    """One-hot first and last tokens of both parts."""
    columns = np.array(
        [
            (ids[1], ids[size - 2], ids[size + separators], ids[-2])
            for ids, size in ((pair["input_ids"].astype(np.int64), int(pair["spans"][0])) for pair in pairs)
        ]
    )
    columns += np.arange(4) * vocab_size
    rows = np.repeat(np.arange(len(pairs)), 4)
    return scipy.sparse.csr_matrix((np.ones(columns.size), (rows, columns.ravel())), (len(pairs), 4 * vocab_size))


def cues(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for packing in args.packings:
        for corpus in args.corpora:
            for tokenizer in args.tokenizers:
                for length in args.lengths:
                    changes = {"packing": packing, "objective": OBJECTIVES[packing], "max_seq_length": length}
                    given, preprocessor = settings(tokenizer, corpus, token_store_dir=args.stores, **changes)
                    data = CachedData(given, preprocessor, process_index=1)
                    first, second = examples(data, 0), examples(data, 1)
                    changed = [
                        a["label"] != b["label"] or a["input_ids"].tolist() != b["input_ids"].tolist()
                        for a, b in zip(first, second, strict=True)
                    ]
                    pairs = [pair for pair in first if pair["label"] != -100]
                    labels = np.array([pair["label"] for pair in pairs])
                    separators = preprocessor.format.pair_special_tokens
                    sizes = np.array([pair["spans"] for pair in pairs]) - [2, separators - 2]
                    lengths = np.column_stack([sizes, sizes[:, 0] - sizes[:, 1], sizes.sum(1)])
                    borders = border_tokens(pairs, separators - 3, len(preprocessor.tokenizer))
                    yield {
                        "packing": packing,
                        "corpus": Path(corpus).name,
                        "tokenizer": Path(tokenizer).name,
                        "length": length,
                        "blocks": len(data.packed[0]),
                        "lengths_auc": auc(lengths, labels, HistGradientBoostingClassifier()),
                        "borders_auc": auc(borders, labels, LogisticRegression(max_iter=300)),
                        "negatives": round(float(labels.mean()), 3),
                        "singles": round(1 - len(pairs) / len(first), 4),
                        "changed_in_another_pass": round(float(np.mean(changed)), 3),
                    }


def cost(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Reading in a random order, as training does; the median of five rounds."""
    for packing in ("full_sentences", *args.packings):
        for length in args.lengths:
            changes = {"packing": packing, "objective": OBJECTIVES.get(packing, "masked_lm"), "max_seq_length": length}
            given, preprocessor = settings(args.tokenizers[0], args.corpora[0], token_store_dir=args.stores, **changes)
            data = CachedData(given, preprocessor, process_index=1)
            where = [row for update in range(8) for row in data.rows(update)][:2000]
            times = []
            for _ in range(5):
                started = time.perf_counter()
                read = [data.example(row) for row in where]
                between = time.perf_counter()
                for at in range(0, len(read), 32):
                    preprocessor.collator(read[at : at + 32])
                times.append([between - started, time.perf_counter() - started])
            reading, masking = np.median(times, axis=0) / len(where) * 1e6
            yield {
                "packing": packing,
                "length": length,
                "microseconds_to_read": round(float(reading), 1),
                "microseconds_to_read_and_mask": round(float(masking), 1),
            }


def buffers(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Distinct blocks among as many as a pass has; 0.632 is drawing with replacement."""
    for corpus in args.corpora:
        for lanes in args.lanes:
            for size in args.buffers:
                changes = {"streaming": True, "num_lanes": lanes, "shuffle_buffer_size": size, "max_seq_length": 128}
                data = StreamedData(*settings(args.tokenizers[0], corpus, **changes))
                seen: list[bytes] = []
                for share in data.train_updates(Rank(), Resume(), 10**9, lambda: False):
                    for batch in share.micro_batches:
                        labels, ids = batch["labels"].numpy(), batch["input_ids"].numpy()
                        seen += [row.tobytes() for row in np.where(labels == -100, ids, labels)]
                    read = sum(buffer.state.made for buffer in share.lanes.values())
                    passes = np.mean([buffer.state.passes for buffer in share.lanes.values()])
                    if len(seen) >= read / passes:
                        break
                yield {
                    "corpus": Path(corpus).name,
                    "lanes": lanes,
                    "shuffle_buffer_size": size,
                    "buffer_used": sum(data.schedule.buffer_sizes) * lanes,
                    "blocks_of_a_pass": len(seen),
                    "distinct": round(len(set(seen)) / len(seen), 3),
                }


SECTIONS = {function.__name__: function for function in (cues, cost, buffers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", required=True, help="the first one for `cost` and `buffers`")
    parser.add_argument("--corpora", nargs="+", required=True)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--packings", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 512])
    parser.add_argument("--lanes", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--buffers", nargs="+", type=int, default=[65_536])
    parser.add_argument("--stores", help="a folder to keep the token stores in")
    parser.add_argument("--name", default="report", help="what the report is called in the file")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.tokenizers, args.corpora = harness.resolve(args.tokenizers), harness.resolve(args.corpora)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    report: dict[str, Any] = harness.header(args.corpora)
    with tempfile.TemporaryDirectory() as folder:
        args.stores = args.stores or folder
        for name in args.sections:
            report[name] = []
            for line in SECTIONS[name](args):
                print(line, flush=True)
                report[name].append(line)
                if args.output:
                    harness.keep(args.output, args.name, report)


if __name__ == "__main__":
    run_script(main)
