import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from recipe.run.watchdog import Report, stragglers
from testing.helpers import PATIENCE_SECONDS, PYTHONPATH, ROOT, command_line, wait_for, wait_for_training

# A watchdog that warns after two seconds.
IMPATIENT = """
import recipe.run.watchdog
import pretrain
from recipe.base.errors import run_script

recipe.run.watchdog.STALL_SECONDS, recipe.run.watchdog.POLL_SECONDS = 2, 0.2
run_script(pretrain.main)
"""


def test_straggler_is_the_least_advanced_one_or_one_that_is_silent():
    found = [Report(9, 12, "rank 0 at update 5"), Report(9, 11, "rank 1 at reading its data")]
    assert stragglers(found, []) == "the others wait for rank 1 at reading its data"
    assert stragglers(found, found[:1]) == "no answer from rank 0 at update 5"
    assert stragglers(found[:1], []) == "rank 0 at update 5"
    assert "all ranks are at the same place" in stragglers(found[:1] * 2, [])


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_stands_still_is_named_and_the_run_goes_on_with_it(flags, tmp_path: Path, rank: int):
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT)
    flags |= {"max_steps": 400, "save_steps": 1000, "logging_steps": 1}
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        launcher = subprocess.Popen([*command, *command_line(flags)], cwd=ROOT, env=environment, stderr=out)
    try:
        wait_for_training(tmp_path / "run")
        ranks = [
            child
            for child in psutil.Process(launcher.pid).children(recursive=True)
            if str(script) in child.cmdline() and child.environ().get("RANK") == str(rank)
        ]
        ranks[0].send_signal(signal.SIGSTOP)
        expected = "rank 0 does not answer" if rank == 0 else r"no answer from rank 1 \(process \d+ on .+\) at"
        expected = r"warning: training has not moved for \d+ seconds: " + expected
        wait_for(lambda: re.search(expected, log.read_text()))
        ranks[0].send_signal(signal.SIGCONT)
        assert launcher.wait(timeout=PATIENCE_SECONDS) == 0
    finally:
        launcher.kill()  # and its ranks end
