"""What a terminal shows, and a log file does not."""

import os
import pty
import termios
import threading
from pathlib import Path

PHASES = ("tokenising sample", "packing sample", "training", "evaluating")


def test_a_terminal_shows_a_bar_for_each_phase(flags, run_pretrain, tmp_path: Path, monkeypatch, capsys):
    shown, reader, writer = [], *pty.openpty()
    termios.tcsetwinsize(writer, (24, 120))

    def read() -> None:
        try:
            while part := os.read(reader, 65536):
                shown.append(part.decode(errors="replace"))
        except OSError:  # of a terminal whose other end is closed
            pass

    thread = threading.Thread(target=read)
    thread.start()
    with os.fdopen(writer, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        run_pretrain(flags | {"token_store_dir": tmp_path / "stores"})
    thread.join()
    screen = "".join(shown)
    for phase in PHASES:
        assert phase in screen, phase
    assert "6/6" in screen
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("next: accelerate launch finetune_glue.py --config")
    assert f"model: {tmp_path / 'run' / 'model'}" in printed


def test_a_log_file_has_no_bars(flags, run_pretrain, tmp_path: Path, capfd):
    run_pretrain(flags | {"token_store_dir": tmp_path / "stores"})
    out, err = capfd.readouterr()
    for phase in PHASES:
        assert f"{phase}:" not in err
    assert "\r" not in err + out
    assert "step 6/6" in out
