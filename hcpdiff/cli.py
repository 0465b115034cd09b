"""What every command line of hcpdiff shares: options, stray arguments, one message per failure, exit codes.

A command line is two functions and one line::

    def parser() -> argparse.ArgumentParser:
        return cli.config_parser("hcpdiff.train_ac_single", "Train on one device.")      # or cli.Parser(...) with options of its own

    def _main(args: argparse.Namespace) -> int | None:                                   # raises HCPError for the user's mistakes
        loaded = load(args.cfg, args.overrides, RunConfig, allow=args.allow_target)
        ...

    if __name__ == "__main__":
        cli.run(_main, parser)

`config_parser` gives `args.cfg` (str), `args.overrides` (list of 'key=value'), `args.allow_target` (list), `args.debug` (bool).
Exit codes: 0 done, 2 the user's mistake, 130 interrupted, 1 a failure of ours (with its traceback); a number that `_main` returns, or that an error has
as `exit_code`, is taken as it is.
Under a launcher every process exits with the code, and only rank 0 prints the user's mistakes, unless the error carries `this_rank_only = True`.
"""

import argparse
import difflib
import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

from .errors import ConfigError, HCPError

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a name or value of a stranger's file could steer the terminal
INTERRUPTED = 130  # 128 + SIGINT, as shells count it
GRACE = 2.0  # seconds

COMMENT_HINT = ("A comment after a '\\' at the end of a line ends the command there (the '\\' must be the line's last character): "
                "take the comment out, or put it on a line of its own before the command.")
QUOTE_HINT = "Single quotes mean nothing to cmd.exe: use double quotes there, key=\"some words\". In other shells one pair of quotes, of either kind, is enough."


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are a ConfigError, so that `run` prints them like every other mistake.

    Options are never abbreviated, and stray arguments are looked for before a missing option is complained about.
    """

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self.takes_overrides = False
        self.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake too")

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError instead of printing a usage block."""
        raise ConfigError(f"{message} (see {self.prog} --help)")


def config_parser(prog: str, description: str, epilog: str | None = None) -> Parser:
    """Parser of a command that runs one config file: --cfg, free key=value arguments, --allow-target, --debug."""
    parser = Parser(prog=f"python -m {prog}", description=description, epilog=epilog, usage="%(prog)s --cfg FILE [key=value ...] [options]")
    parser.takes_overrides = True
    parser.add_argument("--cfg", metavar="FILE", help="the config file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="replaces a value of the file, by its dotted name (a list's elements by number); '---' deletes a key")
    parser.add_argument("--allow-target", action="append", default=[], metavar="PREFIX",
                        help="also accept _target_ classes from this Python package (it runs its code); may be repeated")
    return parser


def place(value: str) -> str:
    """`type` of every argument that is a path, or may be one: no shell expands the ~ of --option=~/x, and some expand none."""
    return os.path.expanduser(value)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments; ConfigError for anything that is neither an option nor (where the parser takes them) key=value."""
    check_stray(argv, parser)
    args, unknown = parser.parse_known_intermixed_args(list(argv))
    overrides = getattr(args, "overrides", [])
    options = [arg for arg in unknown if arg.startswith("-") and not arg.lstrip("-").isdigit()]
    faults = [_unknown_option(arg, parser) for arg in options]
    stray = [arg for arg in [*unknown, *overrides] if arg not in options and not _is_override(arg, parser)]
    if stray:
        faults.append(_stray_fault(stray, list(argv), parser))
    if getattr(parser, "takes_overrides", False) and not args.cfg and not faults:
        faults.append(f"--cfg FILE is missing: which config file? (see {parser.prog} --help)")
    if faults:
        raise ConfigError(faults)
    return args


def check_stray(args: Sequence[str], parser: argparse.ArgumentParser | None = None) -> None:
    """ConfigError when an argument is blank, a backslash alone, or starts with '#': what a comment after '\\' leaves behind.

    Values that follow an option of `parser` are passed over.
    """
    takes_value = {flag for action in (parser._actions if parser else []) if action.nargs is None or action.nargs not in (0, "?")
                   for flag in action.option_strings if not isinstance(action, (argparse._StoreTrueAction, argparse._HelpAction))}
    previous = ""
    for arg in args:
        left = arg.strip()  # a shell makes ' #' of '\ # comment'
        if previous not in takes_value and (left in ("", "\\") or left.startswith("#")):
            after = f" after {previous!r}" if previous else ""
            raise ConfigError(f"stray argument {arg!r}{after}. {COMMENT_HINT}")
        previous = arg


def _is_override(arg: str, parser) -> bool:
    return getattr(parser, "takes_overrides", False) and "=" in arg and not arg.startswith(("=", "'", '"', "-"))


def _stray_fault(stray: list[str], argv: list[str], parser) -> str:
    wanted = "an option nor key=value" if getattr(parser, "takes_overrides", False) else "an option nor the value of one"
    fault = f"stray argument{'s' if len(stray) > 1 else ''} {', '.join(map(repr, stray[:5]))}{' …' if len(stray) > 5 else ''}: neither {wanted}."
    if any(arg.startswith("'") or "='" in arg for arg in argv):
        return f"{fault} {QUOTE_HINT}"
    if getattr(parser, "takes_overrides", False):
        fault += " A value with spaces needs quotes around it: key=\"some words\"."
    return fault


def _unknown_option(arg: str, parser) -> str:
    name = arg.split("=")[0]
    options = [flag for action in parser._actions for flag in action.option_strings]
    near = difflib.get_close_matches(name, options, n=1)
    if near:
        return f"unknown option {arg!r}. Did you mean {near[0]}?"
    if getattr(parser, "takes_overrides", False) and "=" in arg:
        return f"unknown option {arg!r}. Config keys are written without dashes: {arg.lstrip('-')}"
    return f"unknown option {arg!r}. Options: {', '.join(sorted(options))}"


def run(main: Callable[[argparse.Namespace], int | None], parser: Callable[[], argparse.ArgumentParser] | argparse.ArgumentParser,
        argv: Sequence[str] | None = None) -> NoReturn:
    """Parses `argv` (default: the process's), calls `main`, and leaves by SystemExit with the exit code of the table above."""
    argv = list(sys.argv[1:] if argv is None else argv)
    safe_console()
    try:
        args = parse(parser if isinstance(parser, argparse.ArgumentParser) else parser(), argv)
        code = main(args) or 0
    except HCPError as error:
        report(error, debug="--debug" in argv)
        code = error.exit_code
    except KeyboardInterrupt as error:
        speak(str(error) or "interrupted", error)
        code = getattr(error, "exit_code", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone (`… | head`): nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def report(error: HCPError, debug: bool = False) -> None:
    """Prints the error's faults as one message on stderr (rank 0 only, see the module's docstring)."""
    if debug:
        traceback.print_exception(error)
    if not speak(message(error), error):  # a launcher ends all processes when the first one leaves: rank 0 gets time to say the same
        time.sleep(GRACE)


def speak(text: str, error: BaseException) -> bool:
    """Prints an error's text on stderr, on rank 0 or where the error is this rank's to tell; whether it did."""
    mine = rank() == 0 or getattr(error, "this_rank_only", False)
    if mine:
        print(text, file=sys.stderr, flush=True)
    return mine


def message(error: HCPError) -> str:
    """The text shown for an error: one fault on one line, several as a list."""
    faults = [CONTROL.sub(lambda found: repr(found[0])[1:-1], fault).replace("\n", "\n    ") for fault in error.faults]
    if len(faults) == 1:
        return f"error: {faults[0]}"
    return "\n".join([f"error: {len(faults)} faults", *(f"  - {fault}" for fault in faults)])


def say(line: str) -> None:
    """One line on stderr, from rank 0 only."""
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def reading() -> None:
    """Says on stdout, where a run's other lines go, what takes the next seconds: before torch is imported and after all that is checked without it; from rank 0 only."""
    if rank() == 0:
        print("reading torch and diffusers …", flush=True)


def rank() -> int:
    """This process's number under a launcher; 0 without one."""
    value = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    return int(value) if value.isdigit() else 0


class Steady:
    """A stream whose reader may leave: a closed terminal, or a `head` that has enough. What is written from then on is lost, and is no fault."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of the stream."""
        return self._try(self._stream.write, text) or len(text)

    def flush(self) -> None:
        """As of the stream."""
        self._try(self._stream.flush)

    def _try(self, act: Callable, *args):
        try:
            return act(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO, errno.EINVAL):  # the last one is Windows' broken pipe
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # what it still holds back goes there too
            return None


def safe_console() -> None:
    """Lets stdout and stderr replace what their encoding cannot show, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
