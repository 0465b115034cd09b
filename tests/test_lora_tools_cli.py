"""What the LoRA tools have in common: a quick answer without torch, and a guide that names their options."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hcpdiff import cli
from hcpdiff.tools import cache, lora_convert, lora_extract, lora_info, lora_merge, lora_resize

ROOT = Path(__file__).parents[1]
TOOLS = (lora_extract, lora_info, lora_merge, lora_resize)


def test_help_and_mistakes_need_no_torch(tmp_path):
    code = ("import sys\nfrom hcpdiff import cli\nfrom hcpdiff.errors import HCPError\nfrom hcpdiff.tools import lora_extract, lora_info, lora_merge, lora_resize\n"
            "for tool in (lora_extract, lora_info, lora_merge, lora_resize):\n"
            "    assert tool.parser().format_help()\n"
            "    for args in ([], ['--dump_path', 'x', '--rank', '3'] if tool is not lora_info else [], ['--lora_path', 'nowhere'] if tool is not lora_extract else []):\n"
            "        try:\n            tool.main(cli.parse(tool.parser(), args))\n        except HCPError as error:\n            assert error.faults\n"
            "        else:\n            raise SystemExit(f'{tool} {args} found nothing wrong')\n"
            "print([name for name in ('torch', 'numpy', 'diffusers') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("parser", [*(tool.parser for tool in (*TOOLS, lora_convert)), cache._parser], ids=lambda parser: parser.__module__)
def test_every_path_may_begin_with_the_home_folder(parser, tmp_path, monkeypatch):
    """No shell expands the ~ of --option=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("USERPROFILE", str(tmp_path))
    paths = [action for action in parser()._actions if action.metavar in ("PATH", "FILE", "MODEL") or action.dest == "folder"]
    words = [f"{action.option_strings[0]}=~/x" for action in paths if action.option_strings]
    args = cli.parse(parser(), words or ["info", "~/x"])
    assert paths and all(getattr(args, action.dest) in (str(tmp_path / "x"), [str(tmp_path / "x")]) for action in paths)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_guide_names_every_option_and_no_other(language):
    text = (ROOT / f"docs/{language}/user_guides/lora_tools.md").read_text(encoding="utf-8")
    options = {flag for tool in TOOLS for action in tool.parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert set(re.findall(r"--[a-zA-Z_]+", text)) == options - {"--help", "--debug"}
