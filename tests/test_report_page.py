"""The HTML report: one file, whatever the model wrote, and true to what was recorded."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench.decode import Timed
from mtp_graft.bench.recorded import Account, Recording, account, base_pieces, mtp_pieces
from mtp_graft.bench.report import write_report
from mtp_graft.bench.results import RunResults
from mtp_graft.serving.client import Completion
from mtp_graft.serving.metrics import SpecDecodeCounters

from .test_report import nothing_but_the_summary, whole_run

HOSTILE = (
    "</script><script>alert(1)</script>",
    '<img src="http://evil.example/x.png" onerror="alert(2)">',
    "{{ 7 * 7 }}{% raw %}<!--",
    "nul \x00 escape \x1b[31m c1 \x9b lone \ud800 return \r tab \t line \n end",
    "\u2028]]>&lt;&amp;'\"`${1}",
)


def answer(
    texts: Sequence[str],
    sizes: Sequence[int] | None = None,
    counted: tuple[int, int, int] | None = None,
    tokens: Sequence[int] | None = None,
    step_s: float = 0.25,
) -> Timed:
    """Return an answer of chunks that came every `step_s`; `counted`: steps, drafted, accepted."""
    sizes = sizes or [1] * len(texts)
    chunks = tuple((step_s * n, size) for n, size in enumerate(sizes, start=1))
    ids = tuple(tokens if tokens is not None else range(sum(sizes)))
    completion = Completion(ids, "length", 0.0, chunks, tuple(texts))
    return Timed(completion, None if counted is None else SpecDecodeCounters(*counted, (0,)))


BASE = answer(["a", "b", "c", "d", "e", "f"])
MTP = answer(["a", "bc", "d", "ef"], [1, 2, 1, 2], (3, 3, 2), step_s=0.3)


def recorded(base: Timed | None = BASE, mtp: Timed = MTP, name: str = "p-0") -> dict[str, Any]:
    def stream(timed: Timed | None) -> dict[str, Any] | None:
        return timed and {"round": 2, "rounds": 3, "timed": [timed.as_dict()]}

    found = {"prompts": [name], "base": stream(base), "mtp": stream(mtp)}
    as_file: dict[str, Any] = json.loads(json.dumps(found))
    return as_file


def run_of(**given: Any) -> RunResults:
    return replace(nothing_but_the_summary(), recorded=recorded(**given))


class Page(HTMLParser):
    """A page's elements with their attributes, and the text in each kind of element."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.text[tag][-1] += data

    def of(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        found = [attrs for name, attrs in self.elements if name == tag]
        return [attrs for attrs in found if wanted.items() <= attrs.items()]

    @property
    def replay(self) -> Any:
        return json.loads(self.text["script"][0])


def source_of(folder: Path, results: RunResults) -> str:
    write_report(folder, results)
    return (folder / "report.html").read_text(encoding="utf-8")


def page_of(folder: Path, results: RunResults) -> Page:
    return Page(source_of(folder, results))


# What chunks say


@pytest.mark.parametrize(
    ("timed", "expected"),
    [
        (MTP, Account((0, 1, 0, 1), 1)),
        # The token limit cut off the last step's own token: what is there was a draft.
        (answer("abcd", [1, 2, 1, 1], (3, 3, 2)), Account((0, 1, 0, 1), 1)),
        (answer("abc", [1, 3, 2], (2, 6, 4)), Account((0, 2, 2), 3)),
        (answer("a", [1], (0, 0, 0)), Account((0,), 0)),
    ],
)
def test_a_chunk_of_n_tokens_has_n_minus_1_accepted_drafts(timed: Timed, expected: Account) -> None:
    assert account(timed) == expected


@pytest.mark.parametrize(
    "timed",
    [
        answer("abc", [1, 2, 4], (4, 4, 2)),  # two steps came in one chunk
        answer("abc", [1, 2, 2], (2, 2, 1)),  # as many steps, but fewer were accepted
        answer("abc", [1, 3, 2], (2, 2, 3)),  # more than a step can accept
        answer("abc", [1, 2, 2], (2, 3, 2)),  # not the same number of drafts in every step
        answer("ab", [2, 2], (1, 1, 1)),  # prefill and a step in one chunk
        answer("ab", [1, 2]),  # nothing was counted
    ],
)
def test_chunks_are_not_believed_where_counters_say_otherwise(timed: Timed) -> None:
    assert account(timed) is None


def test_running_acceptance_ends_at_the_servers_own_rate() -> None:
    found = account(MTP)
    assert found is not None and MTP.counters is not None
    assert found.running == pytest.approx([1.0, 0.5, 2 / 3])
    assert found.running[-1] == MTP.counters.acceptance


def kinds(chunks: Sequence[Sequence[Any]]) -> list[list[tuple[str, str]]]:
    return [[(piece.text, piece.kind) for piece in parts] for parts in chunks]


def test_a_chunk_is_split_by_what_the_base_said_token_by_token() -> None:
    assert kinds(mtp_pieces(Recording("p", BASE, MTP))) == [
        [("a", "own")],
        [("b", "draft"), ("c", "own")],
        [("d", "own")],
        [("e", "draft"), ("f", "own")],
    ]


def test_a_chunk_that_cannot_be_split_is_marked_as_a_whole() -> None:
    merged = answer(["a", "bc", "d", "e", "f"], [1, 2, 1, 1, 1])
    otherwise = answer(["a", "B", "c", "d", "e", "f"])  # as a character of two tokens may be
    for base in (merged, otherwise, None):
        assert kinds(mtp_pieces(Recording("p", base, MTP)))[1] == [("bc", "mixed")]
    unknown = replace(MTP, counters=SpecDecodeCounters(9, 9, 2, (2,)))
    assert kinds(mtp_pieces(Recording("p", BASE, unknown))) == [
        *([("a", "own")], [("bc", "mixed")], [("d", "own")], [("ef", "mixed")])
    ]


def test_texts_part_at_the_first_character_that_differs() -> None:
    other = answer(["a", "bX", "d", "eY"], [1, 2, 1, 2], (3, 3, 2), tokens=(0, 1, 7, 3, 4, 8))
    pair = Recording("p", BASE, other)
    assert pair.divergence == 2
    ours = [(piece.text, piece.shared) for parts in mtp_pieces(pair) for piece in parts]
    theirs = [(piece.text, piece.shared) for parts in base_pieces(pair) for piece in parts]
    assert ours == [("a", True), ("b", True), ("X", False), ("d", False), ("eY", False)]
    assert [text for text, shared in theirs if shared] == ["a", "b"]
    assert "".join(text for text, _ in theirs) == "abcdef"


# The page


def test_page_replays_what_was_recorded(tmp_path: Path) -> None:
    (pair,) = page_of(tmp_path, run_of()).replay
    assert pair["divergence"] is None
    for name, timed in (("base", BASE), ("mtp", MTP)):
        steps = pair[name]["steps"]
        arrived, sizes = zip(*timed.completion.chunks, strict=True)
        assert [s["at"] for s in steps] == pytest.approx(arrived)
        assert [s["tokens"] for s in steps] == list(sizes)
        assert ["".join(p[0] for p in s["pieces"]) for s in steps] == list(timed.completion.texts)
    assert pair["mtp"]["drafts"] == {"accepted": [0, 1, 0, 1], "each": 1}
    assert pair["base"]["drafts"] is None


def test_page_draws_a_cell_for_every_token_and_the_acceptance_so_far(tmp_path: Path) -> None:
    page = page_of(tmp_path, run_of())
    cells = [attrs["class"] for attrs in page.of("rect", y="68")]
    assert cells == ["own", "draft", "own", "own", "draft", "own"]
    line = next(
        attrs["d"] for attrs in page.of("path", **{"class": "line"}) if attrs["d"] != "M0 .5H1"
    )
    assert line == "M1 0.00H3L3 30.00H4L4 20.00H6"  # all, a half, two thirds of 60 units
    label = page.of("svg", role="img")[0]["aria-label"]
    assert label == "p-0: 6 tokens in 4 chunks; 2 of 3 drafts accepted, 66.7 %"
    assert any(
        "tokens 2 to 3 (1 accepted, 1 of the step's own): “bc”" in t for t in page.text["title"]
    )


def test_page_shows_only_chunks_where_drafts_are_not_known(tmp_path: Path) -> None:
    merged = replace(MTP, counters=SpecDecodeCounters(5, 5, 2, (2,)))
    page = page_of(tmp_path, run_of(mtp=merged))
    cells = [(attrs["class"], attrs["width"]) for attrs in page.of("rect", y="68")]
    assert cells == [("chunk", "0.88"), ("chunk", "1.88"), ("chunk", "0.88"), ("chunk", "1.88")]
    assert page.replay[0]["mtp"]["drafts"] is None
    assert "a whole chunk, where drafts are not known" in page.text["main"][0]
    said = " ".join("".join(page.text["li"]).split())
    assert (
        "6 tokens came in 4 chunks, the first from prefill, but the server counted 5 steps" in said
    )


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (nothing_but_the_summary(), "When each token came was not measured in this run."),
        (
            replace(
                nothing_but_the_summary(),
                recorded={"prompts": ["p"], "base": None, "mtp": None},
            ),
            "When each token came was not measured in this run.",
        ),
        (run_of(base=None), "When each token of the base came was not measured in this run."),
    ],
)
def test_page_of_an_older_run_says_what_was_not_kept(
    results: RunResults, said: str, tmp_path: Path
) -> None:
    page = page_of(tmp_path, results)
    assert any(said in text for text in page.text["p"])
    assert not page.of("script") and not page.of("button")
    assert bool(page.of("figure")) is (results.recorded is not None and "base" in said)


@pytest.mark.parametrize(
    "results", [nothing_but_the_summary(), replace(whole_run(), recorded=recorded())]
)
def test_page_needs_no_other_file_and_no_network(results: RunResults, tmp_path: Path) -> None:
    source = source_of(tmp_path, results)
    page = Page(source)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.elements:
        for name, value in attrs.items():
            assert not name.startswith("on"), f"{tag} has code of its own"
            if name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
                assert value is not None
                inside = value.startswith("#") and value[1:] in ids
                assert inside or value.startswith("data:image/png;base64,"), f"{tag} {name}"
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    assert not re.search(r"@import|url\(|https?://", source)
    policy = page.of("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy is not None and policy.startswith("default-src 'none';")
    if scripts := page.text.get("script"):
        digest = base64.b64encode(hashlib.sha256(scripts[-1].encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy, "its own script would not run"


def test_page_has_every_word_and_number_of_the_markdown_report(tmp_path: Path) -> None:
    results = replace(whole_run(), recorded=recorded())
    page = page_of(tmp_path, results)
    shown = " ".join("".join(page.text["body"]).split())
    alts = [attrs["alt"] for attrs in page.of("img")]
    for line in (tmp_path / "report.md").read_text().splitlines():
        if picture := re.fullmatch(r"!\[(.*)\]\((.*)\)", line):
            assert picture[1] in alts
            continue
        for cell in line.strip("|#-* ").split(" | "):
            assert " ".join(re.sub(r"[`*\\]", "", cell).strip("-: |").split()) in shown
    assert len(alts) == 5


def test_page_is_safe_from_what_models_and_recipes_write(tmp_path: Path) -> None:
    texts = [*HOSTILE, "![x](http://evil.example/y.png) [z](http://evil.example)"]
    name = "![x](http://evil.example/p.png) <b onclick=alert(3)>|`\x00\ud800"
    timed = answer(texts, counted=(len(texts) - 1, len(texts) - 1, 0))
    results = replace(run_of(base=timed, mtp=timed, name=name), model="<script>alert(4)</script>")
    page = page_of(tmp_path, results)
    assert (
        len(page.of("script")) == 2
        and not page.of("img")
        and not page.of("a", href="http://evil.example")
    )
    assert not any(attr.startswith("on") for _, attrs in page.elements for attr in attrs)
    assert page.text["h1"] == ["MTP head for <script>alert(4)</script>"]
    (pair,) = page.replay
    shown = ["".join(piece[0] for piece in step["pieces"]) for step in pair["mtp"]["steps"]]
    assert shown[3] == "nul ␀ escape ␛[31m c1 � lone � return ␍ tab \t line \n end"
    assert [shown[n] for n in (0, 1, 2, 4, 5)] == [texts[n] for n in (0, 1, 2, 4, 5)]
    assert pair["id"] == "![x](http://evil.example/p.png) <b onclick=alert(3)>|`␀�"


def test_same_results_give_the_same_page(tmp_path: Path) -> None:
    results = replace(whole_run(), recorded=recorded())
    assert source_of(tmp_path / "a", results) == source_of(tmp_path / "b", results)


# The script

SCRIPT = Path(__file__).parents[1] / "src" / "mtp_graft" / "bench" / "templates" / "report.js"

#: Enough of a document for the script; prints what is shown at the times asked for.
STAND_IN = """
const fs = require("fs");
class Element {
  constructor() {
    this.classes = new Set(); this.children = []; this.listeners = {}; this.attributes = {};
    this.value = ""; this.textContent = "";
    this.classList = {
      toggle: (name, on) => on ? this.classes.add(name) : this.classes.delete(name),
    };
  }
  set className(names) { this.classes = new Set(names.split(" ")); }
  get className() { return [...this.classes].join(" "); }
  replaceChildren(...children) { this.children = children; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  setAttribute(name, value) { this.attributes[name] = value; }
}
const [script, data] = process.argv.slice(2).map((path) => fs.readFileSync(path, "utf8"));
const elements = {};
const byId = (id) => (elements[id] ??= new Element());
byId("recorded").textContent = data;
byId("replay-prompt").value = "0"; byId("replay-speed").value = "2";
const frames = [];
globalThis.document = { getElementById: byId, createElement: () => new Element() };
globalThis.requestAnimationFrame = (draw) => frames.push(draw);
globalThis.cancelAnimationFrame = () => { frames.length = 0; };
new Function(script)();
const textOf = (id) => byId(id).children
  .filter((span) => !span.classes.has("later")).map((span) => span.textContent).join("");
const shown = () => ({
  base: textOf("replay-base-text"), mtp: textOf("replay-mtp-text"),
  counters: [byId("replay-base-counters").textContent, byId("replay-mtp-counters").textContent],
  clock: byId("replay-clock").textContent, button: byId("replay-play").textContent,
});
const seen = [shown()];
byId("replay-play").listeners.click();
for (const at of [1000, 1200, 1500, 9000]) { frames.shift()(at); seen.push(shown()); }
byId("replay-time").value = "500"; byId("replay-time").listeners.input(); seen.push(shown());
const verdict = byId("replay-verdict").textContent;
console.log(JSON.stringify({ seen, frames: frames.length, verdict }));
"""


@pytest.fixture
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("no node to run the report's script with")
    return found


def test_script_shows_what_had_arrived_and_counts_it(node: str, tmp_path: Path) -> None:
    page = page_of(tmp_path, run_of())
    for name, content in (("stand_in.js", STAND_IN), ("data.json", page.text["script"][0])):
        (tmp_path / name).write_text(content)
    command = [node, str(tmp_path / "stand_in.js"), str(SCRIPT), str(tmp_path / "data.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    whole, *played, scrubbed = found["seen"]
    assert (whole["base"], whole["mtp"], whole["clock"]) == ("abcdef", "abcdef", "1.50 of 1.50 s")
    # Five tokens after the first, in 1.25 s and in 0.9 s.
    assert whole["counters"] == [
        "6 tokens · 4.0 tok/s",
        "6 tokens · 5.6 tok/s · 2 of 3 drafts accepted",
    ]
    # At twice the speed: frames at 0, 0.4, 1.0 s, and long after the end.
    assert [(s["base"], s["mtp"]) for s in played] == [
        *(("", ""), ("a", "a"), ("abcd", "abcd"), ("abcdef", "abcdef"))
    ]
    assert [s["button"] for s in played] == ["Pause", "Pause", "Pause", "Play"]
    assert scrubbed["clock"] == "0.75 of 1.50 s"
    assert (scrubbed["base"], scrubbed["mtp"]) == ("abc", "abc")
    assert scrubbed["counters"][1] == "3 tokens · 4.4 tok/s · 1 of 1 drafts accepted"
    assert found["frames"] == 0, "it stands still"
    assert found["verdict"] == "Both answers are the same, token by token."


def test_script_is_small_and_cannot_end_its_element() -> None:
    script = SCRIPT.read_text()
    assert script.count("\n") < 200
    assert "</script" not in script.lower() and "innerHTML" not in script
