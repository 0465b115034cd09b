"""A virtual environment of the project's own, made once and made again when its dependencies change. Standard library only."""

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv"


def python() -> Path:
    """The environment's interpreter."""
    return FOLDER / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def ensure(extras: str = "") -> Path:
    """Makes `.venv` with hcpdiff (editable) and the named extras at the versions of constraints.txt; returns its interpreter."""
    if sys.version_info < (3, 11) or sys.version_info >= (3, 14):
        sys.exit(f"error: Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}: start this script with one of those.")
    wanted = ROOT / "pyproject.toml", ROOT / "constraints.txt"
    mark = hashlib.sha256(b"".join(path.read_bytes() for path in wanted) + sys.version.encode()).hexdigest()
    stamp = FOLDER / f"installed{'-' + extras if extras else ''}.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == mark:
        return python()
    print(f"setting up {FOLDER} (a few minutes; later starts use it as it is)", flush=True)
    if not python().exists():
        venv.create(FOLDER, with_pip=True)
    target = f"{ROOT}[{extras}]" if extras else str(ROOT)
    pip = [str(python()), "-m", "pip", "install", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    code = subprocess.call([*pip, "-e", target])
    if code:
        sys.exit(f"error: pip failed (exit code {code}); its message is above.")
    stamp.write_text(mark, encoding="utf-8")
    return python()
