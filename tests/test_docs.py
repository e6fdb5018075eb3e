"""The documentation: its links resolve, its Python runs, and the README is short."""

import ast
import re
import subprocess
import unicodedata
from pathlib import Path

import pytest
import torch

import fastgrpo
import fastgrpo.trainer
from fastgrpo import grpo_loss, linear_grpo_loss
from fastgrpo.objective.presets import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
RUN = [page for page in PAGES if page.name == "README.md" or page.parent.name == "docs"]
FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+)\)")


def ids(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


def prose(text: str) -> str:
    """A page without its code, in which brackets are no links."""
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", FENCE.sub("", text))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", FENCE.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        kept = (c for c in text if c in "-_ " or unicodedata.category(c)[0] in "LNM")
        anchor = "".join(kept).replace(" ", "-")
        count = found[anchor] = found.get(anchor, -1) + 1
        found[f"{anchor}-{count}" if count else anchor] = 0
    return set(found)


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(prose(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


def python_blocks(page: Path) -> list[tuple[int, bool, str]]:
    """(line, whether it is a fragment, code) of a page's Python blocks."""
    text, found = page.read_text(), []
    for match in FENCE.finditer(text):
        language, *words = match["info"].split() or [""]
        if language == "python":
            assert words in ([], ["fragment"]), f"{page}: unknown mark of a Python block: {match['info']}"
            found.append((text.count("\n", 0, match.start()) + 2, bool(words), match["text"]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_relative_links_resolve(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text(
        "# A heading: `code`, and 1.10\n\n```\n# no heading\n```\n\n## Twice\n\n## Twice\n"
    )
    good = ["other.md", "other.md#a-heading-code-and-110", "other.md#twice-1", "#here", "https://example.org/x#y"]
    bad = ["nowhere.md", "other.md#no-heading", "#there", "other.md#twice-2"]
    lines = [f"a [`link`]({target}), and [another [one]]({target})" for target in good + bad]
    page.write_text("# Here\n\n" + "\n".join(lines) + "\n`[no](link.md)`\n\n```\n[no](link.md)\n```\n")
    assert broken_links(page) == [target for target in bad for _ in range(2)]


@pytest.mark.parametrize("page", RUN, ids=ids(RUN))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """All of a page in one namespace, from top to bottom; a `python fragment` is compiled only."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    for line, is_fragment, code in python_blocks(page):
        compiled = compile("\n" * (line - 1) + code, str(page), "exec")  # so that a traceback names the page's line
        if not is_fragment:
            exec(compiled, names)


def test_presets_are_those_of_their_table():
    """Every option of a preset stands in its row, with its value."""
    text = (ROOT / "docs" / "objectives.md").read_text()
    section = text[text.index("## Presets") : text.index("## Which options")]
    rows, before = {}, ""
    for line in section.splitlines():
        first, *rest = line.strip("|").split("|")
        row = " ".join(rest)
        row = row.replace("as gspo", rows.get("gspo", "")).replace("the same", before)
        if names := re.findall(r'`"([\w-]+)"`', first):
            rows |= dict.fromkeys(names, row)
            before = row
    assert set(rows) == set(PRESETS)
    named = {
        "importance_sampling_level": 'level "{}"', "average": '(average "{0}"|average="{0}")',
        "kl_estimator": '(KL|`beta=1e-3`,|`beta=0.01`,) "?{}"?', "kl_average": 'kl_average="{}"',
    }  # fmt: skip
    for name, options in PRESETS.items():
        for option, value in options.items():
            if option == "use_bias_correction_kl" and name != "grpo-paper":
                continue  # said once for all frameworks
            if option == "loss_type" and value in (name.replace("-", "_"), "dapo"):
                continue  # "the loss type alone", and the default
            given = [(found, ast.literal_eval(x)) for found, x in re.findall(r"`(\w+)=([^`]+)`", rows[name])]
            words = named.get(option, "nothing").format(value)
            clamps = option in ("kl_log_ratio_clamp", "kl_clamp") and f"{value:g}" in rows[name].partition("clamps")[2]
            last = dict(given).get(option)  # a row may change what it takes from another
            assert last == value or re.search(words, rows[name]) or clamps, f"{name}: {option}={value!r}"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 1700


def test_the_readme_has_the_commands():
    text = (ROOT / "README.md").read_text()
    assert 'pip install -c constraints.txt ".[train]" && fastgrpo train\n' in text
    assert 'pip install -c constraints.txt ".[test]" && pytest\n' in text


def test_no_figure_is_of_uncommitted_files():
    assert not [page for page in RUN if re.search(r"\b[0-9a-f]{12}\+changes", page.read_text())]


@pytest.mark.parametrize("module", [fastgrpo, fastgrpo.trainer], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_api_page(module):
    text = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in module.__all__ if not re.search(rf"\b{name}\b", text)] == []


def diffs(page: Path) -> list[tuple[str, str]]:
    """(the code before, the code after) of a page's diffs."""
    found = []
    for match in FENCE.finditer(page.read_text()):
        if match["info"].strip() == "diff":
            lines = match["text"].splitlines()
            found.append(tuple("\n".join(line[1:] for line in lines if line[0] != sign) for sign in "+-"))
    return found


def test_the_diffs_of_the_readme_change_no_number():
    """The steps before and after: the same loss, and the same gradients."""
    torch.manual_seed(0)
    B, T, V, H = 4, 6, 30, 8
    lm_head = torch.nn.Linear(H, V, bias=False)
    ids, advantages = torch.randint(V, (B, T)), torch.randn(B)
    mask = torch.arange(T) < torch.tensor([[6], [3], [5], [1]])
    hidden, old = torch.randn(B, T, H), -3 - torch.rand(B, T)

    def run(code, logits_are_given):
        lm_head.zero_grad()
        h = hidden.clone().requires_grad_()
        names = dict(
            torch=torch, model=torch.nn.ModuleDict({"lm_head": lm_head}), hidden=h, completion_ids=ids,
            advantages=advantages, completion_mask=mask, old_per_token_logps=old, grpo_loss=grpo_loss,
            linear_grpo_loss=linear_grpo_loss,
        )  # fmt: skip
        if logits_are_given:
            names["logits"] = lm_head(h)
        exec(code, names)
        return names["loss"].detach(), h.grad, lm_head.weight.grad.clone()

    steps = [pair for pair in diffs(ROOT / "README.md") if "backward" in pair[0]]
    assert len(steps) == 2
    for before, after in steps:
        given = "lm_head" not in before
        for got, want in zip(run(after, given), run(before, given), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_every_tracked_page_is_looked_at():
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "*.md"]
        tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a checkout")
    assert {ROOT / name for name in tracked} <= set(PAGES)
