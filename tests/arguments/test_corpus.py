"""Which files a path names."""

import os
from pathlib import Path

import pytest

from recipe.arguments import CorpusArguments
from recipe.arguments.corpus import describe_left_out, find_files
from recipe.base.errors import UserError


def find(path: Path | str) -> tuple[list[str], str]:
    files, left_out = find_files(CorpusArguments(name="c", path=str(path)))
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
