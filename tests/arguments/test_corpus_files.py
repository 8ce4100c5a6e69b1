"""Which files a path names."""

import gzip
import os
from pathlib import Path

import pytest

from recipe.arguments import CorpusArguments
from recipe.arguments.corpus_files import describe_left_out, find_files
from recipe.base.errors import UserError


def find(path: Path | str, **fields: str) -> tuple[list[str], str]:
    files, left_out = find_files(CorpusArguments(name="c", path=str(path), **fields))
    return [str(file) for file in files or []], describe_left_out(left_out)


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    """A folder `texts` with two files, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("texts/v1/a.jsonl", "texts/v2/b.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    return tmp_path / "texts"


BOTH = ["texts/v1/a.jsonl", "texts/v2/b.txt"]


@pytest.mark.parametrize(
    ("links", "left_out"),
    [
        ({"latest": "v1"}, "1 under a second name (latest)"),
        ({"0.jsonl": "v1/a.jsonl"}, "1 under a second name (0.jsonl)"),
        ({"v1/me": "."}, "1 under a second name (me)"),
        ({"v1/up": "../.."}, ""),
        ({f"v{n}/{name}": f"../v{3 - n}" for n in (1, 2) for name in "wxyz"}, "8 under a second name (w, x, y, …)"),
    ],
)
def test_each_real_file_is_read_once(here: Path, links: dict[str, str], left_out: str):
    for name, target in links.items():
        (here / name).symlink_to(target)
    assert find("texts") == (BOTH, left_out)
    for pattern in ("texts/**", "texts/**/*.*", "texts/**/**/*.*", "texts/*/*.*"):
        assert find(pattern)[0] == BOTH


def test_file_that_was_compressed_and_kept_is_read_once(here: Path):
    (here / "v1" / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    (here / "v2" / "c.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    assert find("texts") == (
        [BOTH[0], *BOTH[1:], "texts/v2/c.jsonl.gz"],
        "1 beside it without compression (a.jsonl.gz)",
    )


def test_hard_links_are_one_file_and_linked_folders_elsewhere_are_read(here: Path, tmp_path: Path):
    os.link(here / "v1" / "a.jsonl", here / "v2" / "c.jsonl")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.txt").write_text("d")
    (here / "linked").symlink_to("../more")
    assert find("texts") == (["texts/linked/d.txt", *BOTH], "1 under a second name (c.jsonl)")
    assert find("texts/l*/*") == (["texts/linked/d.txt"], "")
    (here / "latest").symlink_to("v1")
    assert find("texts/lat*/*")[0] == ["texts/latest/a.jsonl"], "a link that alone matches is followed"


def test_link_that_leads_nowhere_is_refused(here: Path):
    for name, target in (("gone.jsonl", "nothing"), ("loop", "loop")):
        link = here / name
        link.symlink_to(target)
        for path in ("texts", "texts/**", f"texts/{name}"):
            with pytest.raises(UserError, match=rf"texts/{name} links to {target} and cannot be read .*remove it"):
                find(path)
        link.unlink()


def test_what_is_left_out_is_named(here: Path):
    for name in ("README", "c.jsonl.xz", "d.jsonl.part", "e.bz2", ".hidden.jsonl", "dataset_info.json"):
        (here / name).write_text("x")
    for name in ("f.jsonl.gz", "g.txt"):
        (here / name).touch()
    os.mkfifo(here / "h.txt")
    expected = "4 of unknown kind (README, c.jsonl.xz, d.jsonl.part, …); 2 empty (f.jsonl.gz, g.txt); 1 no regular file"
    assert find("texts") == (BOTH, expected + " (h.txt)")
    with pytest.raises(UserError, match=r"texts/\* holds texts/README, which does not end in one of"):
        find("texts/*")
    with pytest.raises(UserError, match=r"holds no file that ends in .*; left out: 1 empty \(g\.txt\)"):
        find("texts/g.*")
    assert find("texts/.*") == (["texts/.hidden.jsonl"], "")


def test_stores_and_runs_in_a_folder_are_no_text(here: Path):
    for name in ("stores/c-1/store.json", "stores/c-1/shard-00000.arrow", "run/status.json", "run/config.yaml"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("{}")
    (here / "run" / "metrics.jsonl").write_text("{}")
    for path in ("texts", "texts/**", "texts/*/*.*"):
        files, left_out = find(path)
        assert files == BOTH
        assert "1 folder of a run (run)" in left_out
    assert "1 token store (c-1)" in find("texts")[1]
    assert find("texts/stores/c-1") == ([], "")
    with pytest.raises(UserError, match=r"holds no file .*; left out: 1 folder of a run \(run\)"):
        find("texts/run")


def write(folder: Path, *names: str, text: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_what_is_in_other_splits_is_named(here: Path):
    write(here, "train/a.jsonl", "train/b.jsonl", "test/c.jsonl", "dev/test/d.jsonl")
    expected = "1 of test and validation (d.jsonl); 1 of test (c.jsonl); 2 of no split (a.jsonl, b.txt)"
    assert find("texts") == (["texts/train/a.jsonl", "texts/train/b.jsonl"], expected)
    assert find("texts", split="validation")[0] == ["texts/dev/test/d.jsonl"]


def test_file_of_two_splits_is_read_in_each(here: Path):
    write(here, "test/a.jsonl", "train/b.jsonl")
    os.link(here / "test" / "a.jsonl", here / "train" / "c.jsonl")
    assert find("texts")[0] == ["texts/train/b.jsonl", "texts/train/c.jsonl"]


def test_name_that_is_a_split_by_chance_is_no_reason_to_leave_out_most_of_the_text(here: Path):
    write(here, "training.txt")
    with pytest.raises(UserError, match=r"has the splits train by some names, such as training\.txt, and most of its"):
        find("texts")
    write(here, "training.txt", text="x" * 100)
    assert find("texts") == (["texts/training.txt"], "2 of no split (a.jsonl, b.txt)")
    assert len(find("texts/**")[0]) == 3


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"split": "test"}, r"is no folder with splits, and `split` is test"),
        ({"config_name": "en"}, r"is local, and `config_name` en is for the hub; leave it out and"),
        ({"revision": "main"}, r"is local, and `revision` main is for the hub; leave it out and"),
    ],
)
def test_what_a_local_path_does_not_have_is_not_chosen_from(here: Path, fields: dict[str, str], expected: str):
    for path in ("texts", "texts/**", "texts/v2/b.txt"):
        with pytest.raises(UserError, match=expected):
            find(path, **fields)


def test_configurations_of_a_data_set_are_not_mixed(here: Path):
    write(here, "en/train-00000-of-00001.parquet", "de/train-00000-of-00001.parquet")
    configs = [f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("en", "de")]
    for count, is_refused in ((1, False), (2, True)):
        (here / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{''.join(configs[:count])}---\n# Card\n")
        if is_refused:
            with pytest.raises(UserError, match=r"has the configurations en, de; give the folder or the files of one"):
                find("texts")
        else:
            assert len(find("texts")[0]) == 2
    assert find("texts/en")[0] == ["texts/en/train-00000-of-00001.parquet"]


def test_one_snapshot_in_the_cache_of_the_hub_is_read(here: Path):
    cache = here / "datasets--ann--tales"
    write(cache, "refs/main", "blobs/1")
    for commit in ("0a1b", "2c3d"):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "train.jsonl").symlink_to("../../blobs/1")
        if commit == "0a1b":
            assert find(cache) == ([str(cache / "snapshots" / "0a1b" / "train.jsonl")], "")
    for path in (cache, cache / "snapshots"):
        with pytest.raises(UserError, match=r"holds 2 snapshots of one data set: 0a1b, 2c3d; give the path of one"):
            find(path)


def test_saved_data_set_is_the_files_that_it_names(here: Path):
    write(here, "s/data-0.arrow", "s/cache-cc74c73bdf9bcf4a.arrow", "s/cache-cc74c73bdf9bcf4a_00001_of_00002.arrow")
    write(here, "s/tmpx1.arrow", "s/dataset_info.json", "other/cache-of-words.arrow")
    write(here, "s/state.json", text='{"_data_files": [{"filename": "data-0.arrow"}]}')
    expected = "2 cached by datasets (cache-cc74c73bdf9bcf4a.arrow, cache-cc74c73bdf9bcf4a_00001_of_00002.arrow)"
    assert find("texts/s") == (["texts/s/data-0.arrow"], expected + "; 1 not named by state.json (tmpx1.arrow)")
    assert find("texts")[0] == ["texts/other/cache-of-words.arrow", "texts/s/data-0.arrow", *BOTH]
    assert find("texts/s/tmpx1.arrow")[0] == ["texts/s/tmpx1.arrow"], "a file stands for itself"
    (here / "s" / "data-0.arrow").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of its state\.json's files, data-0\.arrow say"):
        find("texts")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"step": 3}', '{"_data_files": 3}', '{"_data_files": []}', "\ud800"])
def test_another_state_json_is_no_saved_data_set(here: Path, text: str):
    (here / "v1" / "state.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert find("texts") == (BOTH, "")
