"""The run folder: where it is, and what it refuses."""

from pathlib import Path

from ..errors import ConfigError


def claim(exp_dir: str, automatic: bool) -> Path:
    """Makes the run folder with ckpts/ in it. An automatic name (from the clock) that is taken gets a suffix; a chosen one must be new or empty."""
    folder = Path(exp_dir)
    if automatic:
        folder = next(path for path in _suffixed(folder) if not path.exists())
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"exp_dir = {exp_dir!r} is not empty. Choose another, or go on there with train.resume={exp_dir}.")
    try:
        (folder / "ckpts").mkdir(parents=True, exist_ok=not automatic)
    except OSError as error:
        raise ConfigError(f"exp_dir = {exp_dir!r} cannot be made: {error.strerror}.") from error
    return folder


def _suffixed(folder: Path):
    yield folder
    for number in range(2, 10_000):
        yield folder.with_name(f"{folder.name}-{number}")
