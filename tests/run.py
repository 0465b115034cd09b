"""Sets up the project's environment and runs the tests: `python3 tests/run.py [pytest options]`."""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from environment import ROOT, ensure

if __name__ == "__main__":
    options = sys.argv[1:] or ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    sys.exit(subprocess.call([str(ensure("test")), "-m", "pytest", *options], cwd=ROOT))
