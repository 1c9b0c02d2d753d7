"""The int8 graph, made in a process of its own."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiny

from tuneserve.settings import PROJECT
from tuneserve.training import openvino_graph


def test_quantizing_reports_to_nobody_prints_nothing_and_changes_no_logger(
    python: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    """In a process without pytest, for NNCF leaves its telemetry out where it sees that."""
    split = tiny.make_split([3, 9, 17, 30, 5, 5, 12, 28, 4, 21] * 4)
    assert openvino_graph.export(tiny.make_classifier().eval(), tmp_path, split, threads=1) is not None
    np.savez(tmp_path / "split.npz", ids=split.ids, starts=split.starts, labels=split.label_ids, cut=split.truncated)
    code = (
        "import logging, sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from tuneserve.training.int8_graph import quantize\n"
        "from tuneserve.training.tokens import TokenizedSplit\n"
        "split = TokenizedSplit(*np.load('split.npz').values())\n"
        "found = quantize(Path('.'), split, split, threads=1, seed=0, most_accuracy_lost=1)\n"
        "assert found['int8']['accepted'], found\n"
        "assert 'nncf' in sys.modules\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
        "assert logging.getLoggerClass() is logging.Logger\n"
    )
    done = python("-c", code, PYTHONPATH=str(PROJECT / "production" / "docker-res"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "intel").exists()
