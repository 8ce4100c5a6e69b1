from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_is_one_that_accelerate_reads(path: Path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.num_processes == {"multi_gpu.yaml": 8}.get(path.name, 1)
    assert path.read_text().startswith("# When: ")
