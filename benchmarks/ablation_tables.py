"""The paper's comparisons: which overlays are the rows of a table, what they differ in, what the paper found.

The figures are those of the paper (arXiv 1907.11692, Tables 1 to 4), on SQuAD and RACE too, which are not run here.
"""

from dataclasses import dataclass, field

SQUAD_1, SQUAD_2, MNLI, SST, RACE, PERPLEXITY = "SQuAD 1.1", "SQuAD 2.0", "MNLI", "SST-2", "RACE", "perplexity"


@dataclass(frozen=True)
class Finding:
    """The row `better` is above the row `worse` on the whole, as `statement` has it."""

    better: str
    worse: str
    statement: str


@dataclass(frozen=True)
class Table:
    """One comparison.

    Attributes:
        title: where it stands.
        rows: stem of each row's overlay in `recipe/configs/pretrain/ablations`, and what a table calls it here.
        varies: the options in which the rows differ, dotted for those of the model. No scale may set them.
        findings: what the paper says of pairs of rows.
        published: of each measure the paper's figures by row.
    """

    title: str
    rows: dict[str, str]
    varies: frozenset[str]
    findings: list[Finding]
    published: dict[str, dict[str, float]] = field(default_factory=dict)


def columns(rows: dict[str, str], **figures: list[float]) -> dict[str, dict[str, float]]:
    return {name: dict(zip(rows, values, strict=True)) for name, values in figures.items()}


MASKING = {"static-masking": "static", "segment-pair-nsp": "dynamic"}
FORMAT = {
    "segment-pair-nsp": "SEGMENT-PAIR, NSP",
    "sentence-pair-nsp": "SENTENCE-PAIR, NSP",
    "full-sentences": "FULL-SENTENCES",
    "doc-sentences": "DOC-SENTENCES",
}
BATCH = {"full-sentences": "batch 256", "batch-2k": "batch 2K", "batch-8k": "batch 8K"}
DATA = {
    "data-16gb-100k": "16 GB, 100K",
    "data-160gb-100k": "160 GB, 100K",
    "data-160gb-300k": "160 GB, 300K",
    "data-160gb-500k": "160 GB, 500K",
}
VOCABULARY = {"character-vocabulary": "character-level", "full-sentences": "byte-level"}
SYSTEMS = {"bert": "BERT", "full-sentences": "RoBERTa", "albert": "ALBERT"}
# The config in `recipe/configs/pretrain` that each row is an overlay on.
BASES = dict.fromkeys(MASKING | FORMAT | BATCH | VOCABULARY, "roberta-base") | dict.fromkeys(DATA, "roberta-large")
BASES |= {"bert": "bert-base", "albert": "albert-base"}

MODEL_FIELDS = (
    "embedding_size",
    "num_hidden_groups",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout_prob",
)

TABLES = {
    "masking": Table(
        "Static and dynamic masking (Table 1)",
        MASKING,
        frozenset({"masking"}),
        [
            Finding(
                "segment-pair-nsp",
                "static-masking",
                "The paper: dynamic masks are as good as static ones or slightly better",
            )
        ],
        columns(MASKING, **{SQUAD_2: [78.3, 78.7], MNLI: [84.3, 84.0], SST: [92.5, 92.9]}),
    ),
    "format": Table(
        "Input formats and next-sentence prediction (Table 2)",
        FORMAT,
        frozenset({"packing", "objective", "train_batch_size"}),
        [
            Finding("segment-pair-nsp", "sentence-pair-nsp", "The paper: single sentences hurt"),
            Finding(
                "full-sentences", "segment-pair-nsp", "The paper: nothing is lost without next-sentence prediction"
            ),
            Finding(
                "doc-sentences", "full-sentences", "The paper: text of one document is slightly better than of several"
            ),
        ],
        columns(
            FORMAT,
            **{
                SQUAD_1: [90.4, 88.7, 90.4, 90.6],
                SQUAD_2: [78.7, 76.2, 79.1, 79.7],
                MNLI: [84.0, 82.9, 84.7, 84.7],
                SST: [92.9, 92.1, 92.5, 92.7],
                RACE: [64.2, 63.0, 64.8, 65.6],
            },
        ),
    ),
    "batch": Table(
        "Batch size at equal tokens (Table 3)",
        BATCH,
        frozenset({"train_batch_size", "max_steps", "learning_rate", "warmup_steps"}),
        [
            Finding("batch-2k", "full-sentences", "The paper: a batch of 2K is better than one of 256"),
            Finding("batch-8k", "full-sentences", "The paper: one of 8K is better, too"),
        ],
        columns(BATCH, **{PERPLEXITY: [3.99, 3.68, 3.77], MNLI: [84.7, 85.2, 84.6], SST: [92.7, 92.9, 92.8]}),
    ),
    "data": Table(
        "More text, more updates (Table 4)",
        DATA,
        frozenset({"corpora", "max_steps"}),
        [
            Finding("data-160gb-100k", "data-16gb-100k", "The paper: ten times the text is better"),
            Finding("data-160gb-300k", "data-160gb-100k", "The paper: three times the updates are better"),
            Finding("data-160gb-500k", "data-160gb-300k", "The paper: five times are better still"),
        ],
        columns(
            DATA,
            **{
                SQUAD_1: [93.6, 94.0, 94.4, 94.6],
                SQUAD_2: [87.3, 87.7, 88.7, 89.4],
                MNLI: [89.0, 89.3, 90.0, 90.2],
                SST: [95.3, 95.6, 96.1, 96.4],
            },
        ),
    ),
    "vocabulary": Table(
        "Character-level and byte-level vocabulary (section 4.4, which has no figures)",
        VOCABULARY,
        frozenset({"tokenizer_name"}),
        [
            Finding(
                "character-vocabulary",
                "full-sentences",
                "The paper: the byte-level one is slightly worse on some tasks",
            )
        ],
    ),
    "systems": Table(
        "BERT, RoBERTa and ALBERT at one budget (which no table of the paper has)",
        SYSTEMS,
        frozenset({"model_type", "tokenizer_name", "packing", "objective", "masking"})
        | {f"model_config.{name}" for name in MODEL_FIELDS},
        [
            Finding("full-sentences", "bert", "The paper, with other budgets: RoBERTa is better"),
            Finding("bert", "albert", "ALBERT's paper: with a ninth of the parameters, ALBERT-base is below"),
        ],
    ),
}
