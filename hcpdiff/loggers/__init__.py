"""Where a run's progress is written. A config names these classes in its `logger` list."""

from .base import Logger, LoggerGroup
from .console import ConsoleLogger
from .file import FileLogger
from .tensorboard import TensorBoardLogger

__all__ = ["Logger", "LoggerGroup", "ConsoleLogger", "FileLogger", "TensorBoardLogger"]
