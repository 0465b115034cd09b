"""The pages say what is true: links lead somewhere, files, modules and keys exist, blocks load, and both languages show the same commands."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from hcpdiff.config.infer_schema import InferConfig
from hcpdiff.config.load import load
from hcpdiff.config.schema import RunConfig
from hcpdiff.config.shape import fields, shape_of

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "scripts").glob("*.md")])
PAIRS = [*((ROOT / f"{page}.md", ROOT / f"{page}_cn.md") for page in ("README", "docs/reliability", "docs/security")), *((page, ROOT / "docs" / "zh" / page.relative_to(ROOT / "docs" / "en")) for page in (ROOT / "docs" / "en").rglob("*.md"))]
READERS_OWN = {"cfgs/train/lora1.yaml", "cfgs/prompt_templates/x.txt"}  # what a reader writes, and a name that stands for any
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
BASES = {
    RunConfig: "_base_: [cfgs/train/examples/lora_conventional.yaml]\n",
    InferConfig: "_base_: [cfgs/infer/t2i_lora.yaml]\n",
}
DATA = "data: {dataset1: {source: {data_source1: {img_root: train_data}}}}\n"


def name(path) -> str:
    return path.relative_to(ROOT).as_posix() if isinstance(path, Path) else str(path)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", read(page))


def blocks(page: Path, *kinds: str) -> list[str]:
    return [text for kind, text in FENCE.findall(read(page)) if kind in kinds]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def bare(block: str) -> list[str]:
    """Lines of a block without comments and blank lines."""
    lines = [re.sub(r"(^|\s+)#.*$", "", line).rstrip() for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or anchor and file.suffix == ".md" and anchor not in anchors(file):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page):
    wanted = set(re.findall(r"(?<![\w/.-])(?:cfgs|demo|tests|scripts|benchmarks|hcpdiff|docs)/[\w./-]+\.(?:ya?ml|py|txt|md|sh)(?!\w)", read(page))) - READERS_OWN
    assert not [path for path in sorted(wanted) if not (ROOT / path).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_modules_that_are_started_exist(page):
    for module in re.findall(r"-m (hcpdiff[\w.]*)", read(page)):
        file = ROOT / (module.rstrip(".").replace(".", "/") + ".py")
        assert file.is_file() and "__main__" in read(file), module


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_that_are_named_exist(page):
    """Options in commands of hcpdiff are options that its command lines define."""
    known = set(re.findall(r'\badd(?:_argument)?\("(--[\w-]+)"', "".join(map(read, (ROOT / "hcpdiff").rglob("*.py"))))) | {"--help"}
    ours = [command for block in blocks(page, "shell", "bash") for command in re.sub(r"\\\n", " ", block).splitlines() if "-m hcpdiff" in command]
    used = {option for command in ours for option in re.findall(r"(?<!\S)--[a-z][\w-]*", command.split("-m hcpdiff", 1)[1])}
    assert used <= known, used - known


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_keys_that_are_named_exist(page):
    unknown = []
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page)):
        words = re.match(r"([a-z_]+(?:\.(?:\w+|<[^>]+>))+)(?=$|[=: ])", code)
        parts = words[1].split(".") if words else []
        if not parts or parts[0] not in fields(RunConfig) or parts[-1] in ("py", "yaml", "log"):
            continue
        if (ROOT / "hcpdiff" / parts[0]).is_dir() and (ROOT / "hcpdiff" / parts[0] / f"{parts[1]}.py").exists():
            continue  # a module: data.plan
        shape = shape_of(RunConfig)
        for part in parts:
            if shape.record is not None and not shape.knows(part):
                unknown.append(code)
                break
            shape = shape.child("0" if shape.list_item is not None and not part.isdecimal() else part)
    assert not unknown


def whole(block: str) -> tuple[str, type]:
    """A block of a config, completed to one that loads, and its schema."""
    names = set(yaml.safe_load(block)) - {"_base_"}
    schema = InferConfig if names <= set(fields(InferConfig)) else RunConfig
    head = "" if "_base_" in yaml.safe_load(block) else BASES[schema]
    return head + (DATA if schema is RunConfig and "data" not in names else "") + block, schema


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=name)
def test_yaml_blocks_load(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_data").mkdir()
    for block in blocks(page, "yaml"):
        text, schema = whole(block)
        for path in re.findall(r"(?:img_root|caption_file|att_mask): '([^']+)'|: '([^']+\.safetensors)'", text):
            path = "".join(path)
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch() if Path(path).suffix else (tmp_path / path).mkdir(exist_ok=True)
        (tmp_path / "block.yaml").write_text(text, encoding="utf-8")
        given = ["lora_path=null"] if schema is InferConfig and "lora_path:" not in block else []  # the template wants one
        assert load("block.yaml", given, schema).config


def test_the_readmes_first_two_blocks_run_demo_and_tests():
    for page in PAIRS[0]:
        assert blocks(page, "shell", "bash", "sh")[:2] == ["python3 demo/run.py\n", "python3 tests/run.py\n"]


@pytest.mark.parametrize("english,chinese", PAIRS, ids=name)
def test_both_languages_show_the_same_blocks(english, chinese):
    assert chinese.is_file()
    for kind in ("shell", "bash", "yaml", "python"):
        left, right = ([bare(block) for block in blocks(page, kind)] for page in (english, chinese))
        assert left == right, kind


def test_both_languages_have_the_same_pages():
    english, chinese = ({page.relative_to(ROOT / "docs" / tongue) for page in (ROOT / "docs" / tongue).rglob("*.md")} for tongue in ("en", "zh"))
    assert english == chinese


@pytest.mark.parametrize("english,chinese", PAIRS, ids=name)
def test_both_languages_have_the_same_sections(english, chinese):
    depths = [[len(mark) for mark in re.findall(r"^(#+) ", prose(page), re.M)] for page in (english, chinese)]
    assert depths[0] == depths[1]


def test_the_index_names_every_page():
    index = read(ROOT / "docs" / "README.md")
    missing = [page for tongue in ("en", "zh") for page in (ROOT / "docs" / tongue).rglob("*.md") if page.relative_to(ROOT / "docs").as_posix() not in index]
    assert not missing


def test_the_floors_of_the_architecture_page_are_those_of_the_test():
    """Every package and file of hcpdiff stands in the page, in the order of the floors that the import test holds."""
    page = read(ROOT / "docs" / "architecture.md")
    tree = ast.parse(read(ROOT / "tests" / "test_architecture.py"))
    floors = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "FLOORS")
    drawing = blocks(ROOT / "docs" / "architecture.md", "text")[0]
    rows = {unit: next((i for i, line in enumerate(drawing.splitlines()) if re.search(rf"\b{re.escape(unit)}\b", line)), None)
            for floor in floors for unit in floor if "." not in unit}
    assert None not in rows.values(), [unit for unit, row in rows.items() if row is None]
    for lower, higher in pairwise(floors):
        assert max(rows[unit] for unit in higher if unit in rows) < min(rows[unit] for unit in lower if unit in rows)
    for package in (path.parent.name for path in (ROOT / "hcpdiff").glob("*/__init__.py")):
        assert f"`{package}`" in page or f"{package}/" in page, package


def test_no_page_tells_to_install_the_name_of_the_index():
    for page in PAGES:
        for block in blocks(page, "shell", "bash", "sh"):
            assert "pip install hcpdiff" not in block, page
