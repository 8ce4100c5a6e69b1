"""How much padding is left once it is taken out of micro-batches, and how many sizes of them are compiled.

python benchmarks/unpadding.py --tokenizer runs/demo-tokenizer --corpora sample_data/novels.jsonl.gz

Nothing is trained: rows are packed, masked and arranged as `pretrain.py` does for a GPU.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import harness

from recipe.arguments import CorpusArguments, PretrainArguments
from recipe.base.errors import run_script
from recipe.data.batches import Rank, Resume
from recipe.data.cached import CachedData
from recipe.data.preprocessor import Preprocessor
from recipe.data.tokenizer import load_tokenizer
from recipe.modeling.unpadding import Unpadding

PACKINGS = {"full_sentences": "masked_lm", "doc_sentences": "masked_lm", "segment_pair": "next_sentence"}


def measure(args: PretrainArguments, micro_batches: int) -> dict[str, Any]:
    """Arrange micro-batches of a run, and count what is padding before and after, and the sizes that they have."""
    data = CachedData(args, Preprocessor(args, load_tokenizer(args.tokenizer_name)), process_index=0, verifies=False)
    unpadding = Unpadding("flash", args.max_seq_length, args.masked_share, args.objective != "masked_lm")
    real = computed = 0
    sizes = set()
    updates = data.train_updates(Rank(), Resume(), micro_batches, lambda: False)
    for update in itertools.islice(updates, micro_batches):
        [batch] = update.micro_batches
        arranged = unpadding(batch)
        sizes.add(tuple(len(arranged[name]) for name in ("input_ids", "slots", "key_bounds")))
        real += update.counts.tokens
        computed += len(arranged["input_ids"])
    updates.close()
    positions = micro_batches * args.train_batch_size * args.max_seq_length
    return {
        "padding of rows": round(1 - real / positions, 4),
        "padding still computed": round(1 - real / computed, 4),
        "sizes": len(sizes),
        "sizes of tokens": len({size[0] for size in sizes}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--corpora", nargs="+", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 128])
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 32], help="of a micro-batch")
    parser.add_argument("--micro_batches", type=int, default=200)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    tokenizer, *paths = harness.resolve([args.tokenizer, *args.corpora])
    report = harness.header(paths) | {"micro-batches": args.micro_batches, "measured": {}}
    with tempfile.TemporaryDirectory() as folder:
        for (packing, objective), length, rows in itertools.product(PACKINGS.items(), args.lengths, args.rows):
            arguments = PretrainArguments(
                output_dir="unused",
                corpora=[CorpusArguments(name=Path(path).name, path=path) for path in paths],
                tokenizer_name=tokenizer,
                max_seq_length=length,
                packing=packing,
                objective=objective,
                eval_blocks=0,
                train_batch_size=rows,
                per_device_train_batch_size=rows,
                dataloader_num_workers=0,
                token_store_dir=folder,
            )
            found = measure(arguments, args.micro_batches)
            report["measured"][f"{packing}, {length}, {rows} rows"] = found
            print(f"{packing:16}{length:5}{rows:5} rows:", "; ".join(f"{name} {n}" for name, n in found.items()))
            if args.output:
                args.output.write_text(harness.to_json(report) + "\n", "utf-8")


if __name__ == "__main__":
    run_script(main)
