"""What a finished run has learnt, shown with nothing but transformers and the run's own files.

python -m recipe.demo runs/demo
"""

import argparse
from pathlib import Path

import transformers
from transformers import pipeline

from recipe.base.errors import UserError, run_script
from recipe.run.directory import read_records

SENTENCES = [
    "“What do you<mask>?” said Alice.",
    "It seems<mask> me that you are right.",
    "There<mask> a king who had three daughters.",
]


def main() -> None:
    """Print the held-out loss of a run and how its model fills in masked words."""
    parser = argparse.ArgumentParser(description="Show what a finished run has learnt.")
    parser.add_argument("run_dir", type=Path, help="the `output_dir` of pretrain.py")
    run = parser.parse_args().run_dir
    evaluations = [record for record in read_records(run / "metrics.jsonl") if record.get("eval_loss") is not None]
    if not evaluations or not (run / "model").is_dir():
        raise UserError(f"RUN_DIR {run} holds no finished run with an evaluation; name the `output_dir` of pretrain.py")
    last = evaluations[-1]
    gain = last["unigram_loss"] - last["eval_loss"]
    print(
        f"\nheld-out loss {last['eval_loss']:.3f} nats a token after {last['step']:,} updates; a unigram model has "
        f"{last['unigram_loss']:.3f} on the same tokens, {gain:.3f} more"
    )
    transformers.utils.logging.disable_progress_bar()
    fill_mask = pipeline("fill-mask", model=str(run / "model"), trust_remote_code=False)
    for sentence in SENTENCES:
        answers = [f"{answer['token_str'].strip() or '⏎'} {answer['score']:.0%}" for answer in fill_mask(sentence)]
        print(f"  {sentence}\n    -> {', '.join(answers)}")
    print(f"model:     {run / 'model'}\nloss plot: {run / 'loss.png'}")


if __name__ == "__main__":
    run_script(main)
