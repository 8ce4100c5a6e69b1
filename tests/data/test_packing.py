import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from recipe.data.packing import (
    CONTINUES,
    RANDOM,
    SINGLE,
    SWAPPED,
    Block,
    BlockFormat,
    cut_out,
    exchange,
    pack_full_sentences,
)

CLS, SEP = 1_000_000, 2_000_000
documents_of_sentences = st.lists(
    st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=30
)  # documents of sentence lengths


def ends_of(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.cumsum([sum(d) for d in documents]), np.cumsum([s for d in documents for s in d])


def make_format(packing: str, max_seq_length: int) -> BlockFormat:
    return BlockFormat(packing, max_seq_length, CLS, SEP, pair_special_tokens=4, seed=7)


def pack_all(
    packing: str, documents: list[list[int]], max_seq_length: int, key: int = 0
) -> list[tuple[Block, np.ndarray]]:
    """All blocks, and their segments, of documents whose tokens are 0, 1, 2, … through the unit."""
    made = make_format(packing, max_seq_length)
    document_ends, sentence_ends = ends_of(documents)
    packed = made.pack(document_ends, sentence_ends)
    if made.exchanges:
        packed = exchange(packed, document_ends, made.pair_room, key)
    tokens = np.arange(document_ends[-1])
    assert packed.block_ends[-1] == len(packed.segments)
    blocks, first = [], 0
    for end, label in zip(packed.block_ends.tolist(), packed.labels.tolist(), strict=True):
        segments = packed.segments[first:end]
        block = made.assemble(cut_out(tokens, segments), label, int(segments["ends_document"].sum()))
        blocks.append((block, segments))
        first = end
    return blocks


def blocks_of(documents: list[list[int]], max_seq_length: int) -> list[list[int]]:
    return [block.input_ids.tolist() for block, _ in pack_all("full_sentences", documents, max_seq_length)]


ALL = ["full_sentences", "doc_sentences", "contiguous", "segment_pair", "sentence_pair", "sentence_order"]


@pytest.mark.parametrize("packing", ALL)
@given(documents_of_sentences, st.integers(9, 64))
@settings(max_examples=150, deadline=None)
def test_every_token_is_in_one_block_that_fits(packing, documents, max_seq_length):
    document_ends, _ = ends_of(documents)
    seen, ended = [], 0
    for block, segments in pack_all(packing, documents, max_seq_length):
        assert 3 <= len(block.input_ids) <= max_seq_length
        assert block.spans.sum() == len(block.input_ids)
        assert block.input_ids[0] == CLS
        assert block.input_ids[-1] == SEP
        seen += block.input_ids[block.input_ids < CLS].tolist()
        ended += block.documents
        for segment in segments:
            start, end = segment["start"], segment["start"] + segment["length"]
            assert not ((document_ends > start) & (document_ends < end)).any()
    assert sorted(seen) == list(range(document_ends[-1]))
    assert ended == len(documents)


@given(documents_of_sentences, st.integers(8, 64))
@settings(max_examples=150, deadline=None)
def test_contiguous_blocks_are_full_but_for_the_last(documents, max_seq_length):
    blocks = [block.input_ids for block, _ in pack_all("contiguous", documents, max_seq_length)]
    assert {len(block) for block in blocks[:-1]} <= {max_seq_length}
    joined = np.concatenate(blocks)
    assert joined[joined < CLS].tolist() == list(range(sum(map(sum, documents))))


@given(documents_of_sentences, st.integers(8, 64))
@settings(max_examples=150, deadline=None)
def test_doc_sentences_never_mix_documents_in_a_span(documents, max_seq_length):
    document_ends, sentence_ends = ends_of(documents)
    room = max_seq_length - 2
    for block, _ in pack_all("doc_sentences", documents, max_seq_length):
        for span in np.split(block.input_ids, np.cumsum(block.spans)[:-1]):
            assert span[0] == CLS
            assert span[-1] == SEP
            start, end = span[1], span[-2] + 1
            assert span[1:-1].tolist() == list(range(start, end))
            assert np.searchsorted(document_ends, start, side="right") == np.searchsorted(document_ends, end)
            if end not in document_ends:
                # As many whole sentences as fit: the next one (or a block's worth of it) would not.
                following = min(sentence_ends[np.searchsorted(sentence_ends, end, side="right")], end + room)
                assert following - start > room


def test_doc_sentences_share_blocks_well():
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, 60, rng.integers(1, 12)).tolist() for _ in range(3000)]
    blocks = [block for block, _ in pack_all("doc_sentences", documents, 512)]
    assert np.mean([len(block.input_ids) for block in blocks]) > 0.99 * 512


@pytest.mark.parametrize("packing", ["segment_pair", "sentence_pair"])
def test_half_of_the_pairs_come_from_two_documents(packing):
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, 60, rng.integers(1, 40)).tolist() for _ in range(500)]
    document_ends, sentence_ends = ends_of(documents)
    labels = []
    for block, segments in pack_all(packing, documents, 128):
        labels.append(block.label)
        documents_of_parts = np.searchsorted(document_ends, segments["start"], side="right")
        if block.label == SINGLE:
            assert len(segments) == 1
            continue
        one, two = segments
        assert len(block.spans) == 2
        parts = np.split(block.input_ids, block.spans[:1])
        assert parts[0][0] == CLS
        assert parts[0][-1] == parts[1][0] == parts[1][-1] == SEP  # <s> A </s></s> B </s>
        if block.label == CONTINUES:
            assert two["start"] == one["start"] + one["length"]
            assert documents_of_parts[0] == documents_of_parts[1]
        else:
            assert documents_of_parts[0] != documents_of_parts[1]
        if packing == "sentence_pair":
            for part in segments:
                assert ((sentence_ends > part["start"]) & (sentence_ends < part["start"] + part["length"])).sum() == 0
    labels = np.array(labels)
    assert 0.45 < (labels == RANDOM).mean() < 0.55
    assert (labels == SINGLE).sum() <= 2


@pytest.mark.parametrize("packing", ["segment_pair", "sentence_pair"])
def test_few_long_documents_make_pairs_of_both_kinds(packing):
    """Sentences of one length stand side by side in their own documents: exchanged must be those of others."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, 40, 4000).tolist() for _ in range(8)]
    labels = np.array([block.label for block, _ in pack_all(packing, documents, 64)])
    assert 0.4 < (labels == RANDOM).mean() < 0.5  # a half, less the eighth that falls to the same document


def test_ordered_pairs_are_two_consecutive_segments():
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, 60, rng.integers(1, 40)).tolist() for _ in range(500)]
    document_ends, sentence_ends = ends_of(documents)
    for block, segments in pack_all("sentence_order", documents, 128):
        if block.label == SINGLE:
            assert len(segments) == 1
            continue
        one, two = segments
        assert two["start"] == one["start"] + one["length"]
        assert min(one["length"], two["length"]) > 0
        found = np.searchsorted(document_ends, [one["start"], two["start"]], side="right")
        assert found[0] == found[1]
        assert two["start"] in sentence_ends


@pytest.mark.parametrize("packing", ["segment_pair", "sentence_pair"])
def test_other_passes_have_other_pairs_of_the_same_parts(packing):
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, 60, rng.integers(1, 40)).tolist() for _ in range(500)]
    one, two = (pack_all(packing, documents, 128, key) for key in (0, 1))
    assert len(one) == len(two)
    assert [segments[0] for _, segments in one] == [segments[0] for _, segments in two]
    changed = np.mean([a[0].input_ids.tolist() != b[0].input_ids.tolist() for a, b in zip(one, two, strict=True)])
    assert 0.6 < changed < 0.8  # all but the pairs that follow each other in both


def lone_and_grouped(rng: np.random.Generator) -> list[list[int]]:
    """Documents of short sentences and of long ones, of which one alone fills a block of 64."""
    return [rng.integers(*rng.choice([(3, 15), (35, 60)]), rng.integers(1, 20)).tolist() for _ in range(6000)]


@pytest.mark.parametrize("packing", ["segment_pair", "sentence_order"])
def test_lengths_do_not_tell_the_label(packing):
    sizes, labels = [], []
    for number, (block, _) in enumerate(pack_all(packing, lone_and_grouped(np.random.default_rng(0)), 64)):
        if block.label != SINGLE:
            # A pair whose order is to be told is swapped by a hash; here, every other one.
            is_swapped = packing == "sentence_order" and number % 2
            sizes.append(block.spans[::-1] if is_swapped else block.spans)
            labels.append(SWAPPED if is_swapped else block.label)
    sizes, labels = np.array(sizes), np.array(labels)
    features = np.column_stack([sizes, sizes[:, 0] - sizes[:, 1], sizes.sum(1)])
    half = len(labels) // 2
    shuffled = np.random.default_rng(1).permutation(len(labels))
    features, labels = features[shuffled], labels[shuffled]
    classifier = HistGradientBoostingClassifier(random_state=0).fit(features[:half], labels[:half])
    assert roc_auc_score(labels[half:], classifier.predict_proba(features[half:])[:, 1]) < 0.55


@pytest.mark.parametrize(("special", "lead"), [(3, []), (4, [SEP])])
def test_special_tokens_of_pairs_and_of_swapped_ones(special, lead):
    made = BlockFormat("segment_pair", 16, CLS, SEP, pair_special_tokens=special, seed=0)
    block = made.assemble([np.array([5, 6]), np.array([7])], CONTINUES, 1)
    assert block.input_ids.tolist() == [CLS, 5, 6, SEP, *lead, 7, SEP]
    assert block.spans.tolist() == [4, 2 + len(lead)]
    swapped = made.swap(block)
    assert swapped.input_ids.tolist() == [CLS, 7, SEP, *lead, 5, 6, SEP]
    assert swapped.spans.tolist() == [3, 3 + len(lead)]
    assert (swapped.label, swapped.documents) == (SWAPPED, 1)


def full_sentence_ends(documents: list[list[int]], max_seq_length: int) -> list[int]:
    return pack_full_sentences(*ends_of(documents), max_seq_length - 2).tolist()


@given(documents_of_sentences, st.integers(8, 64))
@settings(max_examples=300, deadline=None)
def test_nothing_is_lost_doubled_or_moved(documents, max_seq_length):
    tokens = [token for block in blocks_of(documents, max_seq_length) for token in block if token < CLS]
    assert tokens == list(range(sum(map(sum, documents))))


@given(documents_of_sentences, st.integers(8, 64))
@settings(max_examples=300, deadline=None)
def test_blocks_fit_and_carry_their_special_tokens(documents, max_seq_length):
    document_ends = set(ends_of(documents)[0].tolist())
    for block in blocks_of(documents, max_seq_length):
        assert 3 <= len(block) <= max_seq_length
        assert block[0] == CLS
        assert block[-1] == SEP
        for before, token, after in zip(block, block[1:], block[2:], strict=False):
            assert token != CLS
            if token == SEP:
                assert before + 1 == after
                assert after in document_ends
            elif after != SEP:
                assert after not in document_ends


@given(documents_of_sentences, st.integers(8, 64))
@settings(max_examples=300, deadline=None)
def test_sentences_are_whole_unless_one_alone_is_too_long(documents, max_seq_length):
    room = max_seq_length - 2
    _, sentence_ends = ends_of(documents)
    starts = [0, *sentence_ends[:-1].tolist()]
    for end in full_sentence_ends(documents, max_seq_length):
        if end not in sentence_ends:
            number = int(np.searchsorted(sentence_ends, end))
            assert sentence_ends[number] - starts[number] > room
            assert (end - starts[number]) % room == 0


@given(documents_of_sentences, st.integers(8, 64))
@settings(max_examples=300, deadline=None)
def test_blocks_are_as_full_as_whole_sentences_allow(documents, max_seq_length):
    document_ends, sentence_ends = ends_of(documents)
    room = max_seq_length - 2
    start = 0
    blocks = full_sentence_ends(documents, max_seq_length)
    for end in blocks[:-1]:
        # The next piece: the next sentence, or as much of a long one as a block takes.
        sentence = int(np.searchsorted(sentence_ends, end, side="right"))
        piece_end = min(int(sentence_ends[sentence]), end + room)
        separators = int(((document_ends > start) & (document_ends < piece_end)).sum())
        assert piece_end - start + separators > room
        start = end


def test_known_example():
    # Room for 8: 4 and 3 fit (7); with the next document's 2 and its separator it would be 10.
    assert blocks_of([[4, 3], [2, 3]], 10) == [
        [CLS, 0, 1, 2, 3, 4, 5, 6, SEP],
        [CLS, 7, 8, 9, 10, 11, SEP],
    ]
    assert blocks_of([[3], [4]], 10) == [[CLS, 0, 1, 2, SEP, 3, 4, 5, 6, SEP]]
    assert blocks_of([[20]], 10) == [[CLS, *range(8), SEP], [CLS, *range(8, 16), SEP], [CLS, *range(16, 20), SEP]]
