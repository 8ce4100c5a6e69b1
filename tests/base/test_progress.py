"""What a terminal shows, and a log file does not."""

import os
import pty
import subprocess
import sys
import termios
import threading
from pathlib import Path

from testing.helpers import ROOT, command_line

PHASES = ("tokenising sample", "packing sample", "training", "evaluating")


def run(flags: dict[str, object], stderr: int) -> subprocess.CompletedProcess:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "TQDM_MININTERVAL": "0"}
    command = [sys.executable, "pretrain.py", *command_line(flags)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, check=True
    )


def test_a_terminal_shows_a_bar_for_each_phase(flags, tmp_path: Path):
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
    result = run(flags | {"token_store_dir": tmp_path / "stores"}, writer)
    os.close(writer)
    thread.join()
    screen = "".join(shown)
    for phase in PHASES:
        assert phase in screen, phase
    assert "6/6" in screen
    assert result.stdout.splitlines()[-1].startswith("next: accelerate launch finetune_glue.py --config")
    assert f"model: {tmp_path / 'run' / 'model'}" in result.stdout


def test_a_log_file_has_no_bars(flags, tmp_path: Path):
    result = run(flags | {"token_store_dir": tmp_path / "stores"}, subprocess.PIPE)
    for phase in PHASES:
        assert f"{phase}:" not in result.stderr
    assert "\r" not in result.stderr + result.stdout
    assert "step 6/6" in result.stdout
