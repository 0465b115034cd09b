"""The command line: what each kind of ending prints and returns."""

import os
import subprocess
import sys

import pytest
from config_help import CHECKOUT, SMALL, command, write

from hcpdiff import cli
from hcpdiff.errors import ConfigError, DataError

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "hydra", "numpy", "PIL", "rich")


def ending(main, *argv, parser=None):
    with pytest.raises(SystemExit) as left:
        cli.run(main, parser or (lambda: cli.config_parser("hcpdiff.x", "d")), list(argv))
    return left.value.code


def fails(error):
    def main(args):
        raise error
    return main


def test_options_and_overrides_may_be_mixed():
    seen = []
    assert ending(seen.append, "--cfg", "f", "a=1", "--debug", "b= x", "--allow-target", "mine", "c=", "--allow-target", "yours", "d=-1") == 0
    args = seen[0]
    assert (args.cfg, args.overrides, args.debug, args.allow_target) == ("f", ["a=1", "b= x", "c=", "d=-1"], True, ["mine", "yours"])


@pytest.mark.parametrize("error, code, says", [
    (ConfigError("one"), 2, "error: one\n"), (DataError(["one", "two\nmore"]), 2, "error: 2 faults\n  - one\n  - two\n    more\n"), (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_failures_have_a_code_and_one_message(capsys, error, code, says):
    assert ending(fails(error), "--cfg", "f") == code
    assert capsys.readouterr().err == says


def test_debug_shows_the_traceback(capsys):
    assert ending(fails(ConfigError("one")), "--cfg", "f", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_failure_of_ours_is_not_dressed_up():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda args: 1 / 0, lambda: cli.config_parser("x", "d"), ["--cfg", "f"])


def test_main_may_choose_its_code():
    assert ending(lambda args: 3, "--cfg", "f") == 3


def test_only_rank_0_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "GRACE", 0.1)
    assert ending(fails(ConfigError("one")), "--cfg", "f") == 2
    assert capsys.readouterr().err == ""
    alone = DataError("one")
    alone.this_rank_only = True
    assert ending(fails(alone), "--cfg", "f") == 2
    assert capsys.readouterr().err == "error: one\n"


@pytest.mark.parametrize("argv, says", [
    (["--cfg", "f", "a=1", " "], "stray argument ' ' after 'a=1'. A comment after a '\\'"), (["--cfg", "f", "\\"], "A comment after"), (["--cfg", "f", "#", "text"], "A comment after"),
    (["--cfg", "f", "# 修改学习率"], "A comment after"), (["--cfg", "f", "x"], "neither an option nor key=value"), (["--cfg", "f", "prompt='best", "quality'"], "cmd.exe"),
    (["--cfg", "f", "'a=1'"], "cmd.exe"), (["--cfg", "f", "-5"], "stray argument '-5'"), (["--cfg", "f", "--seed=5"], "without dashes: seed=5"), (["--cgf", "f"], "Did you mean --cfg?"),
    ([], "--cfg FILE is missing"), (["a=1"], "--cfg FILE is missing"), (["--cfg"], "expected one argument"), (["--cfg", "f", "=1"], "stray argument '=1'"),
])
def test_arguments_that_are_nothing_are_named(capsys, argv, says):
    assert ending(lambda args: 0, *argv) == 2
    message = capsys.readouterr().err
    assert says in message and "usage:" not in message


def test_converters_look_for_comments_before_missing_options(capsys):
    def parser():
        made = cli.Parser(prog="x")
        made.add_argument("--lora_path", required=True)
        made.add_argument("--dump_path", required=True)
        made.add_argument("--auto", action="store_true")
        return made

    assert ending(lambda args: 0, "--lora_path", "a.safetensors", " ", parser=parser) == 2
    assert "A comment after" in capsys.readouterr().err
    assert ending(lambda args: 0, "--lora_path", "#1.safetensors", parser=parser) == 2
    assert "--dump_path" in capsys.readouterr().err
    assert ending(lambda args: 0, "--lora_path", "#1", "--dump_path", "b", "--auto", "more", parser=parser) == 2
    assert "neither an option nor the value of one" in capsys.readouterr().err


def test_a_console_without_chinese_is_no_failure(tmp_path):
    write(tmp_path)
    done = command("--cfg", "run.yaml", "提示=1", cwd=tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 2 and "??" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["hcpdiff.train_ac_single", "hcpdiff.train_ac"])
def test_help_and_config_errors_answer_within_a_second_without_heavy_imports(tmp_path, module):
    write(tmp_path)
    command("--help", module=module)  # byte code is written once
    for arguments, code in ((["--help"], 0), (["--cfg", "run.yaml", "train.train_epoch=1", "sed=2"], 2)):
        before = sum(os.times()[2:4])  # of the processor, by children: other programs do not count
        done = command(*arguments, cwd=tmp_path, module=module, HF_HUB_OFFLINE="1")
        assert done.returncode == code and sum(os.times()[2:4]) - before < 1, done.stderr
    assert "3 faults" in done.stderr and "HF_HUB_OFFLINE" in done.stderr and "Nearest: train_epochs" in done.stderr and "Nearest: seed" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("module, arguments", [
    ("hcpdiff.train_ac_single", []), ("hcpdiff.train_ac", []), ("hcpdiff.visualizer", ["pretrained_model=some/model"]),
])
def test_what_the_first_seconds_go_into_is_said_before_torch_is_read_and_not_where_a_fault_ends_it(tmp_path, module, arguments):
    (tmp_path / "torch.py").write_text("import os; print('torch is read', flush=True); os._exit(7)", encoding="utf-8")
    write(tmp_path)
    file = CHECKOUT / "cfgs/infer/text2img.yaml" if arguments else "run.yaml"
    for more, code, said in ((arguments, 7, "reading torch and diffusers …\ntorch is read\n"), ([*arguments, "sed=2"], 2, "")):
        done = command("--cfg", str(file), *more, cwd=tmp_path, module=module, HF_HUB_OFFLINE="0", PYTHONPATH=os.pathsep.join([str(tmp_path), str(CHECKOUT)]))
        assert (done.returncode, done.stdout) == (code, said), done.stderr
    other = command("--cfg", str(file), *arguments, cwd=tmp_path, module=module, PYTHONPATH=os.pathsep.join([str(tmp_path), str(CHECKOUT)]), RANK="1")
    assert "reading" not in other.stdout  # one process of several speaks


def test_stage_a_imports_nothing_heavy(tmp_path):
    write(tmp_path)
    code = f"import sys; from hcpdiff import cli; from hcpdiff.config.load import load; load('run.yaml'); print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_guides_commented_command_is_explained(tmp_path):
    write(tmp_path, SMALL, "cfgs/train/lora1.yaml")
    script = f"{sys.executable} -m hcpdiff.train_ac_single \\\n    --cfg cfgs/train/lora1.yaml \\\n    unet_lr=0.0002 \\ # 修改学习率\n"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and "A comment after a '\\'" in done.stderr


@pytest.mark.parametrize("fails", [False, True])
def test_collector_rests_while_a_command_imports(fails):
    """In a process of its own: what is imported is frozen, and the collector works again, also after an import that failed; there nothing is frozen."""
    code = f"""
import gc
from hcpdiff.importing import importing
try:
    with importing():
        assert not gc.isenabled()
        import torch
        if {fails}:
            import nothing_of_this_name
except ImportError:
    pass
assert gc.isenabled()
assert (gc.get_freeze_count() > 50_000) != {fails}, gc.get_freeze_count()
kept = gc.get_freeze_count()
with importing():  # a second time there is nothing to import
    assert gc.isenabled()
assert gc.get_freeze_count() == kept
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
