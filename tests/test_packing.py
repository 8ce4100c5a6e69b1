import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe import packing
from recipe.packing import assemble_block, pack_full_sentences

CLS, SEP = 1_000_000, 2_000_000
documents_of_sentences = st.lists(
    st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=30
)  # documents of sentence lengths


def ends_of(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.cumsum([sum(d) for d in documents]), np.cumsum([s for d in documents for s in d])


def blocks_of(documents: list[list[int]], max_seq_length: int) -> list[list[int]]:
    """All blocks of the documents whose tokens are 0, 1, 2, … through the corpus."""
    document_ends, sentence_ends = ends_of(documents)
    block_ends = pack_full_sentences(document_ends, sentence_ends, max_seq_length)
    blocks, start = [], 0
    for end in block_ends:
        inside = document_ends[(document_ends > start) & (document_ends < end)]
        blocks.append(assemble_block(np.arange(start, end), start, inside, CLS, SEP).tolist())
        start = end
    return blocks


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
    document_ends, sentence_ends = ends_of(documents)
    starts = [0, *sentence_ends[:-1].tolist()]
    for end in pack_full_sentences(document_ends, sentence_ends, max_seq_length).tolist():
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
    blocks = pack_full_sentences(document_ends, sentence_ends, max_seq_length).tolist()
    for end in blocks[:-1]:
        # The next piece: the next sentence, or as much of a long one as a block takes.
        sentence = int(np.searchsorted(sentence_ends, end, side="right"))
        piece_end = min(int(sentence_ends[sentence]), end + room)
        separators = int(((document_ends > start) & (document_ends < piece_end)).sum())
        assert piece_end - start + separators > room
        start = end


def test_units_end_in_a_short_block(monkeypatch):
    monkeypatch.setattr(packing, "DOCUMENTS_IN_UNIT", 2)
    document_ends, sentence_ends = ends_of([[5], [5], [5], [5], [5]])
    assert pack_full_sentences(document_ends, sentence_ends, 64).tolist() == [10, 20, 25]


def test_known_example():
    # Room for 8: 4 and 3 fit (7); with the next document's 2 and its separator it would be 10.
    assert blocks_of([[4, 3], [2, 3]], 10) == [
        [CLS, 0, 1, 2, 3, 4, 5, 6, SEP],
        [CLS, 7, 8, 9, 10, 11, SEP],
    ]
    assert blocks_of([[3], [4]], 10) == [[CLS, 0, 1, 2, SEP, 3, 4, 5, 6, SEP]]
    assert blocks_of([[20]], 10) == [[CLS, *range(8), SEP], [CLS, *range(8, 16), SEP], [CLS, *range(16, 20), SEP]]
