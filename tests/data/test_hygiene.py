import gzip
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from recipe.base.errors import UserError
from recipe.data.hygiene import Decontaminator, DocumentFilter, find_copies, text_checksum

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
SHORT = "alpha beta gamma delta epsilon zeta eta theta"


@pytest.fixture
def decontaminator(tmp_path: Path) -> Decontaminator:
    (tmp_path / "dev.tsv").write_text(
        f"index\tsentence\tlabel\n0\t{LONG.capitalize()}.\t1\n1\t{SHORT}!\t0\n2\tjust a few\t0\n"
    )
    return Decontaminator([str(tmp_path / "*.tsv")])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"It said: {LONG}, and more.", True),
        (LONG.upper().replace(" ", ",  "), True),
        ("Two, three four five six seven eight nine ten eleven twelve thirteen fourteen?", True),  # 13 of 15
        ("two three four five six seven eight nine ten eleven twelve thirteen", False),  # 12 of 15
        (f"so {SHORT} it went", True),
        (SHORT.rsplit(" ", 1)[0], False),
        ("just a few words that are in the shortest sentence of the test set", False),
        ("one two three", False),
        ("", False),
    ],
)
def test_documents_that_hold_a_test_sentence_are_found(decontaminator, text, expected):
    assert decontaminator.is_contaminated(text) == expected


@pytest.mark.parametrize("before", [0, 999_950, 998_000, 1_996_010, 2_500_000])
def test_sentence_is_found_anywhere_in_a_long_document(decontaminator, before):
    assert decontaminator.is_contaminated("x " * (before // 2) + LONG + " y" * 600_000)
    assert not decontaminator.is_contaminated("x " * 1_500_000)


def test_without_files_nothing_is_contaminated():
    assert not Decontaminator([]).is_contaminated(LONG)


def test_missing_and_wordless_files_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"`decontaminate_against`: .*no\.tsv matches no file"):
        Decontaminator([str(tmp_path / "no.tsv")])
    (tmp_path / "a.tsv").write_text("too short\n")
    with pytest.raises(UserError, match=r"no sentence in .*a\.tsv has 8 words"):
        Decontaminator([str(tmp_path / "a.tsv")])
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(LONG.encode()))
    with pytest.raises(UserError, match=r"b\.tsv\.gz is not plain UTF-8 text"):
        Decontaminator([str(tmp_path / "b.tsv.gz")])


def test_spellings_of_unicode_are_one(tmp_path: Path):
    sentence = "le café était fermé et la journée déjà très avancée"
    (tmp_path / "dev[1].tsv").write_text(unicodedata.normalize("NFD", sentence))
    assert Decontaminator([str(tmp_path / "dev[1].tsv")]).is_contaminated(unicodedata.normalize("NFC", sentence))


@pytest.mark.parametrize(
    ("tokenised", "natural"),
    [
        (
            "they do n't know what it 's about and ca n't say",
            "They don't know what it's about, and can't say",
        ),
        ("we 're sure he would n't and did n't and could n't go", "We’re sure he wouldn’t and didn’t and couldn’t go"),
        ("you can not be gon na say that i 'm wan na go", "You cannot be gonna say that I'm wanna go"),
        ("so -lrb- as he says -rrb- it is n't over at all", "So (as he says) it isnʼt over at all"),
        (
            "'t is what she 'd said before they &apos;ll have been",
            "'Tis what she'd said before they'll have been",
        ),
    ],
)
def test_contractions_of_tokenised_test_sets_are_found_in_natural_text(tmp_path: Path, tokenised, natural):
    (tmp_path / "dev.tsv").write_text(f"{tokenised}\n")
    assert Decontaminator([str(tmp_path / "dev.tsv")]).is_contaminated(f"Before. {natural}! After.")
    (tmp_path / "dev.tsv").write_text(f"{natural}\n")
    assert Decontaminator([str(tmp_path / "dev.tsv")]).is_contaminated(f"Before. {tokenised}! After.")


def test_filter_counts_what_it_leaves_out(decontaminator):
    documents = DocumentFilter("c", 1, decontaminator)
    texts = ["good", "", " \n", LONG, UserError("line 3: bad"), "fine"]
    assert [documents.accepts(text) for text in texts] == [True, False, False, False, False, True]
    assert documents.counts == {"documents": 2, "empty": 2, "contaminated": 1, "unreadable": 1}
    with pytest.raises(
        UserError, match=r"'c' has 2 unreadable documents.*`max_unreadable_documents` \(1\).*line 9: bad"
    ):
        documents.accepts(UserError("line 9: bad"))


def test_copies_are_all_but_the_first():
    checksums = np.array([text_checksum(text) for text in "abacabd"], np.uint64)
    assert find_copies(checksums).tolist() == [False, False, True, False, True, True, False]
    assert find_copies(np.array([], np.uint64)).tolist() == []


def test_a_malformed_document_is_said_once_and_by_one_process(capsys, monkeypatch):
    for rank, expected in (("1", 0), ("0", 1)):
        monkeypatch.setattr("recipe.data.hygiene.PRINTED", set())
        for _ in range(3):  # as when a corpus is checked, held out of, and read
            documents = DocumentFilter("c", 10, Decontaminator([]), is_quiet=rank != "0")
            assert not documents.accepts(UserError("a.jsonl, line 2 is not a JSON object"))
            assert documents.counts["unreadable"] == 1
        assert capsys.readouterr().out.count("passed over a malformed document: a.jsonl, line 2") == expected
