import json
import os
import random
import shutil
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Event

import pytest
import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from recipe.base.errors import UserError
from recipe.base.hashing import file_checksum
from recipe.modeling.objectives import MaskedLMObjective
from recipe.run.checkpoint import (
    FORMAT,
    CheckpointWriter,
    archive_later_checkpoints,
    check_identity,
    describe_changes,
    find_checkpoint,
    find_fault,
    load_training_state,
    open_checkpoint,
    read_state,
    save_checkpoint,
)
from recipe.run.directory import list_checkpoints
from recipe.run.metrics import TrainState
from testing.helpers import SMALL_MODEL, Evil


def make_model(seed: int) -> RobertaForMaskedLM:
    torch.manual_seed(seed)
    return RobertaForMaskedLM(RobertaConfig(**SMALL_MODEL, vocab_size=100))


def save(folder: Path, step: int, limit: int = 5) -> Path:
    model = make_model(step)
    tensors = {"t": torch.arange(step), "beside_model": {}}
    return save_checkpoint(folder, step, model, model.state_dict(), tensors, {"note": step}, limit)


def write_manifest(path: Path) -> None:
    """Have the checksums fit what is there."""
    files = [file for file in path.iterdir() if file.name != "manifest.json"]
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": file_checksum(file)} for file in files}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_checkpoint_comes_back(tmp_path: Path):
    path = save(tmp_path, 7)
    assert path.name == "step-00000007"
    assert read_state(path) == {"note": 7, "format": FORMAT, "step": 7}
    assert torch.equal(torch.load(path / "optimizer.pt", weights_only=True)["t"], torch.arange(7))
    RobertaForMaskedLM.from_pretrained(path)


def test_old_checkpoints_go_and_the_newest_is_found(tmp_path: Path):
    for step in (5, 10, 20, 100):
        save(tmp_path, step, limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000020", "step-00000100"]
    assert find_checkpoint(tmp_path, "latest") == (tmp_path / "step-00000100", [])


def test_checkpoint_of_another_trainer_and_folder_of_a_run_are_called_what_they_are(tmp_path: Path):
    """A rotated or torn checkpoint of ours, which has some of its files, is damaged instead."""
    foreign = tmp_path / "checkpoint-500"
    make_model(1).save_pretrained(foreign)
    (foreign / "trainer_state.json").write_text("{}")
    torch.save({}, foreign / "scheduler.pt")
    expected = (
        "checkpoint-500 is not a checkpoint of this recipe; to train on from its weights, .* `model_name_or_path`"
    )
    with pytest.raises(UserError, match=expected):
        find_checkpoint(tmp_path, str(foreign))
    (foreign / "status.json").write_text('{"state": "complete"}')
    (foreign / "config.json").unlink()
    expected = (
        "not a checkpoint of this recipe, in the run .*, which is complete and has no checkpoint yet; give `latest`"
    )
    with pytest.raises(UserError, match=expected):
        find_checkpoint(tmp_path, str(foreign))
    ours = save(tmp_path, 7)
    (ours / "manifest.json").unlink()
    with pytest.raises(UserError, match="is damaged"):
        find_checkpoint(tmp_path, str(ours))


def test_what_cannot_be_removed_is_a_warning(tmp_path: Path, capsys):
    save(tmp_path / "elsewhere", 1)
    (tmp_path / "run").mkdir()
    link, leftover = tmp_path / "run" / "step-00000001", tmp_path / "run" / ".step-00000001"
    for path in (link, leftover):
        path.symlink_to(tmp_path / "elsewhere" / "step-00000001")
    assert save(tmp_path / "run", 2, limit=1).is_dir()
    assert find_checkpoint(tmp_path / "run", "latest")[0] == tmp_path / "run" / "step-00000002"
    assert find_checkpoint(tmp_path / "elsewhere", "latest")[0] == tmp_path / "elsewhere" / "step-00000001"
    printed = capsys.readouterr().out
    for path in (link, leftover):
        assert f"warning: {path} cannot be removed (OSError: Cannot call rmtree on a symbolic link)" in printed


def test_going_back_sets_later_checkpoints_aside(tmp_path: Path):
    for step in (20, 30, 40):
        save(tmp_path, step)
    [line] = archive_later_checkpoints(tmp_path, 20)
    assert "step-00000040, step-00000030" in line
    save(tmp_path, 25, limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000020", "step-00000025"]
    assert len(list(tmp_path.glob("abandoned-*"))) == 2
    assert find_checkpoint(tmp_path, "latest")[0] == tmp_path / "step-00000025"


def test_killed_while_setting_aside_leaves_no_gap(tmp_path: Path, monkeypatch):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, limit=4)
    renamed = []

    def rename(path: Path, target: Path) -> None:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(path.name)
        os.rename(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        archive_later_checkpoints(tmp_path, 10)
    assert renamed == ["step-00000040"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000020", "step-00000030"]


def test_copies_beside_checkpoints_are_left_alone(tmp_path: Path):
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000040-best")
    save(tmp_path, 20, limit=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000020", "step-00000040-best"}
    assert find_checkpoint(tmp_path, "latest")[0] == tmp_path / "step-00000020"
    archive_later_checkpoints(tmp_path, 20)
    assert (tmp_path / "step-00000040-best").is_dir()


def copy_of(objective: MaskedLMObjective, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    copied = CheckpointWriter(print, None).copy(objective, optimizer, keep=True)
    return {name.removeprefix("model."): tensor for name, tensor in copied["weights"].items()}, copied["optimizer"]


def test_training_goes_on_with_weights_and_moments_but_new_settings(tmp_path: Path):
    objective = MaskedLMObjective(make_model(1), 0.15)
    first = torch.optim.AdamW(objective.parameters(), lr=1e-3, weight_decay=0.1)
    objective.model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    first.step()
    first.zero_grad()
    weights, moments = copy_of(objective, first)
    tensors = {"optimizer": moments, "beside_model": {}, "lanes": {"0.0": torch.ones(1)}}
    path = save_checkpoint(tmp_path, 1, objective.model, weights, tensors, {}, 1)
    other = MaskedLMObjective(make_model(99), 0.15)
    second = torch.optim.AdamW(other.parameters(), lr=5e-4, weight_decay=0.2)
    assert load_training_state(path, other, second, None) == {"0.0": torch.ones(1)}
    for one, two in zip(objective.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert other.model.lm_head.decoder.weight is other.model.roberta.embeddings.word_embeddings.weight
    assert (second.param_groups[0]["lr"], second.param_groups[0]["weight_decay"]) == (5e-4, 0.2)
    for one, two in zip(first.state.values(), second.state.values(), strict=True):
        assert torch.equal(one["exp_avg_sq"], two["exp_avg_sq"])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "config.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["truncate", "empty", "remove", "flip"])
def test_damage_is_recognised_and_the_one_before_used(tmp_path: Path, name: str, harm: str):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    elif harm == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "truncate" else b"")
    found, warnings = find_checkpoint(tmp_path, "latest")
    assert found == tmp_path / "step-00000001"
    assert "step-00000002 is damaged" in warnings[0]
    with pytest.raises(UserError, match="is damaged"):
        find_checkpoint(tmp_path, str(tmp_path / "step-00000002"))


def test_no_bit_of_a_checkpoint_can_flip_unnoticed(tmp_path: Path):
    path = save(tmp_path, 2)
    rng = random.Random(0)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for _ in range(20 if file.stat().st_size > 10_000 else 200):
            spoilt = bytearray(content)
            spoilt[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(spoilt)
            assert find_fault(path), file.name
        file.write_bytes(content)
    assert find_fault(path) is None


def test_file_that_is_gone_from_the_manifest_too_is_missed(tmp_path: Path):
    path = save(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["optimizer.pt"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "optimizer.pt").unlink()
    assert find_fault(path) == "manifest.json lacks optimizer.pt"


def test_copy_is_out_of_reach_of_training_and_lies_where_the_last_one_lay():
    model = make_model(1)
    optimizer = torch.optim.AdamW(model.parameters())
    writer = CheckpointWriter(print, None)
    places = []
    for _ in range(2):
        model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
        optimizer.step()
        expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        copied = writer.copy(model, optimizer, keep=True)
        optimizer.step()
        assert copied["weights"].keys() == expected.keys()
        assert all(torch.equal(copied["weights"][name], expected[name]) for name in expected)
        places.append([tensor.data_ptr() for tensor in copied["weights"].values()])
    assert places[0] == places[1]
    assert set(places[0]).isdisjoint(parameter.data_ptr() for parameter in model.parameters())
    assert CheckpointWriter(print, None).copy(model, optimizer, keep=False) is None


def test_writer_writes_one_at_a_time_and_waits(tmp_path: Path):
    order = []

    def slowly(step: int) -> Path:
        order.append(f"begin {step}")
        time.sleep(0.05)
        order.append(f"end {step}")
        return tmp_path / str(step)

    with CheckpointWriter(order.append, None) as writer:
        for step in (1, 2):
            writer.start(step, partial(slowly, step), lambda path: order.append(f"then {path.name}"))
            order.append(f"went on from {step}")
    assert writer.last == tmp_path / "2"
    assert sorted(order[:2]) == ["begin 1", "went on from 1"]
    assert order[2:4] == ["end 1", "then 1"]
    assert order[-2:] == ["end 2", "then 2"]


def test_writer_reports_what_failed_and_goes_on(tmp_path: Path):
    lines = []

    def fail() -> Path:
        raise OSError("No space left on device")

    with CheckpointWriter(lines.append, tmp_path / "1") as writer:
        writer.start(2, fail, lambda path: lines.append("complete"))
        writer.wait()
        assert writer.failure == "OSError: No space left on device"
        writer.start(3, lambda: tmp_path / "3", lambda path: lines.append("complete"))
    assert lines == [
        f"warning: no checkpoint of update 2: OSError: No space left on device; the last one is {tmp_path / '1'}",
        "complete",
    ]
    assert (writer.last, writer.failure) == (tmp_path / "3", None)


def test_second_interrupt_does_not_wait_for_the_writer():
    held, writer = Event(), CheckpointWriter(print, None)
    writer.start(1, held.wait, print)
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert writer.thread.is_alive()
    held.set()


def test_half_written_checkpoint_is_absent(tmp_path: Path):
    save(tmp_path, 1)
    (tmp_path / ".step-00000002").mkdir()
    assert find_checkpoint(tmp_path, "latest")[0] == tmp_path / "step-00000001"
    save(tmp_path, 3)
    assert not (tmp_path / ".step-00000002").exists()


def test_only_damaged_ones_and_missing_ones_are_errors(tmp_path: Path):
    assert find_checkpoint(tmp_path, "latest") == (None, [])
    with pytest.raises(UserError, match="there is no such checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "step-00000009"))
    (save(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(UserError, match="every checkpoint"):
        find_checkpoint(tmp_path, "latest")


def test_other_format_is_refused(tmp_path: Path):
    path = save(tmp_path, 1)
    (path / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read_state(path)


def test_pickle_does_not_run(tmp_path: Path):
    path = save(tmp_path, 1)
    files = list(path.glob("*.pt"))
    assert files
    objective = MaskedLMObjective(make_model(1), 0.15)
    for file in files:
        torch.save({"optimizer": Evil(tmp_path / "ran"), "beside_model": {}}, file)
    write_manifest(path)
    assert find_fault(path) is None
    with pytest.raises(UserError, match=r"optimizer\.pt .*something else than tensors"):
        load_training_state(path, objective, torch.optim.AdamW(objective.parameters()), None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["/dev/zero", "../state.json", "", "a\0b", "x" * 5000])
def test_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {name: {"bytes": 0, "sha256": ""}}))
    assert find_fault(path)


ARGUMENTS = {"max_steps": 9, "schedule_by": "steps", "phases": [], "corpora": []}
ARGUMENTS |= {"max_seq_length": 32, "train_batch_size": 8, "mlm_probability": 0.15}


def state_of(step: int = 2, **changes: object) -> dict[str, object]:
    train_state = asdict(TrainState(step=step, corpora=[[1, 2, 3]], window={"loss": [1.0, 1]}))
    return {
        "train_state": train_state | changes,
        "identity": {},
        "arguments": ARGUMENTS,
        "step": step,
        "format": FORMAT,
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff", "can't decode"),
        (b"[" * 20_000, "RecursionError"),
        (b"{}", "format"),
        (json.dumps(state_of() | {"step": 3}), "`step` is 3 and that of `train_state` 2"),
        (json.dumps(state_of() | {"step": "../../x"}), "`step` is '../../x'"),
        (json.dumps(state_of() | {"identity": None}), "identity without names"),
        (json.dumps(state_of() | {"arguments": {}}), "'phases'"),
        (json.dumps(state_of() | {"arguments": ARGUMENTS | {"phases": [{"steps": "9"}]}}), "TypeError"),
        (json.dumps(state_of(overflows="1")), "no whole number: overflows"),
        (json.dumps(state_of(data_digest=2**64)), "no whole number: data_digest"),
        (json.dumps(state_of(train_milliseconds="1")), "TypeError|train_milliseconds"),
        (json.dumps(state_of(plateau_said=1)), "`plateau_said` of `train_state` is neither true nor false"),
        (json.dumps(state_of(odd=1)), "lacks or has odd"),
        (json.dumps(state_of(corpora=[[1, 2]])), "not 1 with three counts each"),
        (json.dumps(state_of(corpora=[])), "not 1 with three counts each"),
        (json.dumps(state_of(window={"loss": []})), "not enough values"),
    ],
)
def test_state_whose_checksum_fits_is_checked_too(tmp_path: Path, content: str | bytes, expected: str):
    path = save(tmp_path, 2)
    (path / "state.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    write_manifest(path)

    def restore() -> None:
        _, state, _ = open_checkpoint(tmp_path, "latest", {}, ARGUMENTS)
        TrainState.restore(state["train_state"], 1, path)

    with pytest.raises(UserError, match=rf"state\.json is damaged .*{expected}.*; remove .*step-00000002"):
        restore()


def test_tensors_whose_checksum_fits_are_checked_too(tmp_path: Path):
    objective = MaskedLMObjective(make_model(1), 0.15)
    optimizer = torch.optim.AdamW(objective.parameters())
    weights, moments = copy_of(objective, optimizer)
    name, short = "lm_head.bias", torch.zeros(3)

    def load(weights: dict, moments: dict) -> None:
        tensors = {"optimizer": moments, "beside_model": {}}
        path = save_checkpoint(tmp_path, 1, objective.model, dict(weights), tensors, {}, 1)  # which empties it
        load_training_state(path, objective, optimizer, None)

    load(weights, moments)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged .*shape of model\.lm_head\.bias is \[3\], not"):
        load(weights | {name: short}, moments)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged .*shape of model\.lm_head\.bias is none"):
        load({key: tensor for key, tensor in weights.items() if key != name}, moments)
    name = f"model.{name}"
    with pytest.raises(UserError, match=r"optimizer\.pt is damaged .*shape of exp_avg of model\.lm_head\.bias is"):
        load(weights, moments | {name: moments[name] | {"exp_avg": short}})
    with pytest.raises(UserError, match=r"optimizer\.pt is damaged .*of model\.lm_head\.bias is none"):
        load(weights, {key: value for key, value in moments.items() if key != name})


def test_identity_error_lists_every_difference(tmp_path: Path):
    check_identity({"seed": 1, "language": "en"}, {"seed": 1, "language": "en"}, tmp_path)
    with pytest.raises(UserError) as caught:
        check_identity({"seed": 1, "language": "en", "x": 0}, {"seed": 2, "language": "de", "x": 0}, tmp_path)
    message = str(caught.value)
    assert "`seed`: 1 before, 2 now" in message
    assert "`language`: en before, de now" in message
    assert "`x`" not in message
    data = {"books": [1, 2], "news": [3]}
    with pytest.raises(UserError, match=r"experiment:\n  `news` of `data`: \[3\] before, \[4\] now\ngive these"):
        check_identity({"data": data}, {"data": data | {"news": [4]}}, tmp_path)
    with pytest.raises(UserError, match="`news` of `data`: \\[3\\] before, None now"):
        check_identity({"data": data}, {"data": {"books": [1, 2]}}, tmp_path)


def test_changes_that_may_be_are_described():
    lines = describe_changes({"max_steps": 5, "seed": 1}, {"max_steps": 9, "seed": 1})
    assert lines == ["changed since the checkpoint: `max_steps` 5 -> 9"]


def test_nothing_is_found_wrong_with_a_good_one(tmp_path: Path):
    assert find_fault(save(tmp_path, 1)) is None
