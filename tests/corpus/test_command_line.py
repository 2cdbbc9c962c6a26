"""The command line of data.py."""

import subprocess
import sys

from conftest import ROOT


def test_no_torch_to_prepare_a_corpus():
    """It takes seconds to import, in each of the processes that tokenize."""
    subprocess.run([sys.executable, "-c", "import data, sys; assert 'torch' not in sys.modules"], cwd=ROOT, check=True)
