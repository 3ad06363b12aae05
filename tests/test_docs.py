"""The pages of docs/ are what the simulator says, their links lead somewhere, their code runs."""

import re
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from adaptis.cli import app
from adaptis.program import OPS
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape
from adaptis.timeline import CAUSES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import build  # noqa: E402 - of docs/

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def built():
    return build.pages()


def test_the_pages_and_pictures_are_what_is_built_now(built):
    stale = [path.name for path, text in built.items() if path.read_text("utf-8") != text]
    assert not stale, "run `make docs`"


def test_every_schedule_has_its_picture_and_no_other_is_left(built):
    names = {path.name for path in (DOCS / "schedules").iterdir()}
    assert names == {path.name for path in built if path.parent.name == "schedules"}
    assert names == {f"{name}.svg" for name in SCHEDULES}


def test_a_block_is_made_anew_and_the_text_around_it_stays():
    page = "before\n<!-- build: phases -->\nstale\n<!-- end -->\nafter\n"
    made = build.with_blocks(page)
    assert made.startswith("before\n<!-- build: phases -->\n\n```text\nrank 0 | F0 F1 F2")
    assert made.endswith("```\n\n<!-- end -->\nafter\n")
    assert build.with_blocks(made) == made
    assert "stale" not in made


def test_an_output_is_made_anew_and_a_picture_is_kept():
    code = "from pathlib import Path\nPath('a.svg').write_text('<svg/>')\nprint(1 + 1)\n"
    page = f"```python\n{code}```\n\n```text\n3\n```\n\nafter\n"
    assert build.with_outputs(page) == (page.replace("3\n", "2\n"), {"a.svg": "<svg/>"})


def test_code_without_output_gets_no_block():
    page = "```python\nx = 1\n```\n\ntext\n\n```python\nprint(x)\n```\n"
    assert build.with_outputs(page)[0] == page + "\n```text\n1\n```\n"


def test_write_a_schedule_shows_what_its_code_prints(built):
    page = built[DOCS / "write-a-schedule.md"]
    outputs = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert len(outputs) >= 5
    assert "0 0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3\n" in outputs[0]
    assert (DOCS / "two-by-two.svg") in built


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_its_heading(page):
    for link in LINK.findall(page.read_text("utf-8")):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if heading:
            found = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in found}
            assert heading in slugs, f"{page.name}: {link}"


@pytest.mark.parametrize(
    ("name", "shape", "hop", "makespan", "bubble", "held"),
    [  # as tests/test_schedules_*.py have them, mostly in other units
        ("1f1b", Shape(4, 8), 0.0, 33, 9, 4),
        ("zb-h1", Shape(4, 8), 0.0, 27, 3, 4),
        ("interleaved", Shape(4, 12, 2), 0.0, 40.5, 4.5, 5.5),
        ("chimera", Shape(4, 4, 2), 0.0, 16, 4, 4),
        ("seq1f1b", Shape(4, 12, 1, 4), 0.0, 38.25, 2.25, 1.75),
        ("slimpipe", Shape(4, 4, 2, 8), 0.0, 12.5625, 0.5625, 22 / 16),
        ("1f1b", Shape(4, 16), 0.5, 71, 23, 4),
        ("1f1b-eager", Shape(4, 16), 0.5, 60, 12, 7),
    ],
)
def test_figures_are_those_of_a_ranks_share_of_the_layers(name, shape, hop, makespan, bubble, held):
    one = build.run(name, shape, hop)
    assert one.timeline.makespan == pytest.approx(makespan)
    assert one.bubble == pytest.approx(bubble)
    free = build.run(name, shape)  # transfers have bytes, which count where they arrive
    assert free.held == pytest.approx(held)


def test_schedules_of_two_copies_say_so(built):
    page = built[DOCS / "schedules.md"]
    for name, schedule in SCHEDULES.items():
        section = page.split(f"\n### {name}\n")[1].split("\n### ")[0]
        assert ("**Two copies of the weights**" in section) == (schedule.copies == 2)
        assert schedule.paper in section
        assert schedule.bubble in section
        assert schedule.memory in section
        assert schedule.use in section


def test_advice_names_schedules_that_lead_in_the_numbers(built):
    page = built[DOCS / "how-to-choose.md"]
    advice, numbers = page.split("## The numbers")
    rows = re.findall(r"^\| .+ \| (.+) \| \*(.+)\* \|$", advice, re.MULTILINE)
    assert len(rows) == 9
    for take, situation in rows:
        if situation == "long sequences":
            shown = numbers.split("## Long sequences")[1]
        else:
            (shown,) = re.findall(rf"^\| {re.escape(situation)} \|.*$", numbers, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", take):
            assert name == "adaptis plan" or f"| {name}" in shown, (situation, name)


def test_concepts_explain_every_operation_and_cause():
    page = (DOCS / "concepts.md").read_text("utf-8")
    assert all(re.search(rf"^- \*\*{cause}\*\*:", page, re.MULTILINE) for cause in CAUSES)
    described = "".join(re.findall(r"^\| ([A-Z, ]+) \|", page, re.MULTILINE))
    assert {str(op) for op in OPS} == set(re.findall(r"[A-Z]", described))


def test_the_readme_names_every_verb_and_counts_the_schedules():
    text = (ROOT / "README.md").read_text("utf-8")
    block = text.split("## The command line")[1].split("##")[0]
    named = set(re.findall(r"^    adaptis ([\w-]+) ", block, re.MULTILINE))
    assert named | {"demo"} == set(get_command(app).commands)
    assert f"{len(SCHEDULES)} named schedules" in text
