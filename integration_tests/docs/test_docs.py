"""The documentation against the code: nothing undocumented, nothing documented that does not exist, examples run."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import subprocess
from pathlib import Path

import pytest
import typer

from integration_tests import child
from integration_tests.docs.snippets import Block, blocks
from sloth_backend import SlothConfig, cli, hookspecs

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
HOOKS = {name: f for name, f in vars(hookspecs).items() if hasattr(f, "sloth_backend_spec")}
PACKAGES = ("sloth_backend", "sloth_plugins", "sloth_kernels")


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def sections(text: str, level: int) -> dict[str, str]:
    """Heading -> what stands below it, for the headings of one level."""
    parts = re.split(rf"^{'#' * level} (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> dict[str, list[str]]:
    """First cell of each row of the tables in ``text`` -> its other cells, the marks of code removed."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {first.replace("`", ""): rest for first, *rest in cells}


def commands() -> dict[str, typer.models.CommandInfo]:
    return {info.name or info.callback.__name__: info for info in cli.app.registered_commands if info.callback}


def options(name: str) -> set[str]:
    """All spellings of a command's options, ``--help`` and arguments left out."""
    group = typer.main.get_command(cli.app)
    command = group.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    spellings = {spelling for p in command.params for spelling in [*p.opts, *p.secondary_opts]}
    return {spelling for spelling in spellings if spelling.startswith("-")} - {"--help"}


def test_every_hook_has_a_section_and_every_section_a_hook() -> None:
    written = {name for name in sections(read("docs/hooks.md"), 2) if name.startswith("sloth_")}
    assert written == set(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_hook_section_names_every_argument_and_has_an_example(name: str) -> None:
    section = sections(read("docs/hooks.md"), 2)[name]
    unnamed = [arg for arg in inspect.signature(HOOKS[name]).parameters if f"`{arg}`" not in section]
    assert not unnamed, f"docs/hooks.md, {name}: not mentioned: {unnamed}"
    assert f"@hookimpl\ndef {name}(" in section


def test_first_result_hooks_say_that_they_stop() -> None:
    text = sections(read("docs/hooks.md"), 2)
    stops = {name for name, f in HOOKS.items() if f.sloth_backend_spec["firstresult"]}
    assert stops == {name for name in HOOKS if "stops at the first result that is not None" in text[name]}


def test_options_table_is_that_of_slothconfig() -> None:
    table = rows(sections(read("docs/options.md"), 2)["SlothConfig"])
    written = {name: cells[0].strip("`") for name, cells in table.items() if name not in ("option", "---")}
    defaults = {f.name: f.default for f in dataclasses.fields(SlothConfig)}
    plain = {name: getattr(default, "default", default) for name, default in defaults.items()}
    assert written == {name: repr(value).replace("'", '"') for name, value in plain.items()}


def test_every_command_has_a_section_and_every_section_a_command() -> None:
    written = sections(sections(read("docs/options.md"), 2)["The sloth command"], 3)
    assert set(written) == {f"sloth {name}" for name in commands()}


@pytest.mark.parametrize("name", commands())
def test_command_section_lists_every_option_and_no_other(name: str) -> None:
    section = sections(read("docs/options.md"), 3)[f"sloth {name}"]
    listed = {o for cell in rows(section) for o in re.findall(r"--[a-z][a-z-]*", cell)}
    assert listed == options(name)
    assert set(re.findall(r"`(--[a-z][a-z-]*)`", section)) <= options(name)


def test_default_steps_are_those_of_the_recipes() -> None:
    from sloth_backend.demo.train import FULL, LORA, SCRATCH

    table = rows(sections(read("docs/options.md"), 3)["sloth demo"])
    assert LORA.steps == FULL.steps
    assert table["--steps"][0] == f"{SCRATCH.steps}; {LORA.steps} with `--model`"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_names_in_the_text_exist(path: Path) -> None:
    """Dotted names of our packages, hooks, files and options that the text mentions."""
    text = prose(path)
    dotted = re.findall(rf"`((?:{'|'.join(PACKAGES)})(?:\.\w+)+)[`(]", text)
    files = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|toml|txt))`", text)
    missing = [name for name in dotted if not exists(name)]
    missing += [name for name in files if not (ROOT / name).exists() and not (path.parent / name).exists()]
    hooks = set(re.findall(r"\bsloth_[a-z_]+\b", text)) - set(PACKAGES)
    assert not missing
    assert hooks <= set(HOOKS)


def exists(dotted: str) -> bool:
    """Whether ``a.b.c`` can be imported, as a module or as an attribute of one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{page_id(path)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page_id(path)} links to {target}"


def anchors(path: Path) -> set[str]:
    """The headings of a page as GitHub spells their anchors."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_tree_shows_the_repository() -> None:
    """The tree's paths exist, each with a comment, and everything at the top of the repository is in it."""
    blocks = re.findall(r"^```.*?\n(.*?)^```$", read("README.md"), re.MULTILINE | re.DOTALL)
    tree = next(block for block in blocks if "├──" in block)
    stack: list[str] = []
    paths = set()
    for line in tree.splitlines():
        match = re.match(r"((?:[│ ]   )*)[├└]── (\S+)", line)
        if match:
            depth = len(match[1]) // 4
            stack[depth:] = [match[2].rstrip("/")]
            paths.add("/".join(stack))
            assert (ROOT / "/".join(stack)).exists(), f"README's tree shows {'/'.join(stack)}"
            assert "  " in line.strip(), f"README's tree says nothing about {'/'.join(stack)}"
    top = {name for name in tracked_top_level() if not name.startswith(".")}
    assert top <= {path.split("/")[0] for path in paths}


def tracked_top_level() -> set[str]:
    """First parts of the paths that git knows, or of all where there is no repository."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return {line.split("/")[0] for line in done.stdout.splitlines()}


RUN = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"


def runnable(path: Path) -> str:
    """The page's ``python`` blocks at their own line numbers, everything else left blank."""
    code, result = False, []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            code = line.strip() == "```python"
            line = ""
        result.append(line if code else "")
    return "\n".join(result) + "\n"


@pytest.mark.parametrize("path", [p for p in DOCS if runnable(p).strip()], ids=page_id)
def test_python_blocks_run_in_order(path: Path, tmp_path: Path) -> None:
    """Each page is one program; blocks that are not meant to run are fenced as ``py``."""
    script = tmp_path / f"{path.stem.replace('-', '_')}.py"
    script.write_text(runnable(path), encoding="utf-8")
    variables = {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    (done,) = child.fork(child.Start(RUN, (script,), variables, (str(tmp_path),), tmp_path))
    assert done.returncode == 0, done.stderr


def run_by_tests(helper: str, page: str) -> list[str]:
    """How the snippets of a page begin that tests ask ``snippets`` for."""
    call = re.compile(rf"""\b{helper}\(\s*"{re.escape(page)}", (?:"([^"]+)"|'([^']+)')""")
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "integration_tests").rglob("*.py"))
    return [double or single for source in sources for double, single in call.findall(source)]


def needs_a_test(block: Block) -> bool:
    """Commands, configurations, and Python that is not run where it stands; not the output of something."""
    return block.language in ("bash", "yaml", "py")


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("hosts*.md"))], ids=page_id)
def test_every_snippet_of_a_host_is_run_by_a_test(path: Path) -> None:
    page = page_id(path)
    wanted = [block for block in blocks(page) if needs_a_test(block)]
    for block in wanted:
        bash = block.language == "bash"
        begins = tuple(run_by_tests("command" if bash else "snippet", page))
        missing = [text for text in (block.commands if bash else [block.text]) if not text.startswith(begins)]
        assert not missing, f"{page}: no test runs {missing}"


def test_the_first_screen_of_the_readme_shows_the_three_switches() -> None:
    """Within the first 40 lines: what fits a screen."""
    first = "\n".join(read("README.md").splitlines()[:40])
    switches = ("use_unsloth: true", "SLOTH_BACKEND=1 accelerate launch", "trl sft --backend sloth", 'backend="sloth"')
    assert [switch for switch in switches if switch not in first] == []
