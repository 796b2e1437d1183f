"""qwen3cp compare, on runs that lm-eval's own evaluator and tracker wrote."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import evaluator, simple_evaluate
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from scipy.stats import binomtest
from transformers import AutoTokenizer

from qwen3cp import cli
from qwen3cp.errors import InputError
from qwen3cp.eval import compare_page
from qwen3cp.eval.compare import ALL, Comparison, Row, compare_runs
from qwen3cp.eval.runs import Run, Sample, read_run
from qwen3cp.eval.tasks import new_task_manager

CHECKPOINT = "tests/assets/tiny-qwen3-moe"
ROOT = Path(__file__).parents[2]
LIMIT = 12

CHOICE = """
task: own_choice
custom_dataset: !function qwen3cp.eval.tasks.readers.word_problems
dataset_kwargs: {kind: short}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: ["one", "seventeen", "<b>2 & 3</b>"]
doc_to_target: 1
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: own_rolling
custom_dataset: !function qwen3cp.eval.tasks.readers.word_problems
dataset_kwargs: {kind: short}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""

Answer = Callable[[int, str], Any]
"""(number of the request, its prompt or continuation) -> what the model says"""


class Told(LM):
    """Says what it was told."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def generate_until(self, requests, disable_tqdm=False):
        return [self.answer(i, r.args[0]) for i, r in enumerate(requests)]

    def loglikelihood(self, requests, disable_tqdm=False):
        return [self.answer(i, r.args[1]) for i, r in enumerate(requests)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [self.answer(i, r.args[0]) for i, r in enumerate(requests)]


@pytest.fixture(autouse=True, scope="module")
def in_the_root():
    """And without lm-eval's look at the machine, which takes seconds for each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(evaluator, "add_env_info", lambda storage: None)
        yield


@pytest.fixture(scope="module")
def truth() -> list[str]:
    lines = (ROOT / "eval/tasks/word_problems/problems.jsonl").read_text().splitlines()
    return [json.loads(line)["answer"] for line in lines]


def write_run(
    folder: Path, answer: Answer, task: str = "word_problems", **options: Any
) -> dict[str, Any]:
    """As lm_eval does it at the end of a run."""
    more = folder.parent / "more"
    more.mkdir(exist_ok=True)
    (more / "choice.yaml").write_text(CHOICE)
    (more / "rolling.yaml").write_text(ROLLING)
    tracker = EvaluationTracker(output_path=str(folder))
    results = cast(Any, simple_evaluate)(
        model=Told(answer),
        model_args=f"pretrained={CHECKPOINT}",
        tasks=[task],
        task_manager=new_task_manager(task, include_path=more),
        evaluation_tracker=tracker,
        bootstrap_iters=0,
        **{"limit": LIMIT, **options},
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    return results


def compared(a: Path, b: Path, **options: Any) -> Comparison:
    return compare_runs(read_run(a), read_run(b), **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory, truth) -> Path:
    """B loses documents 0 and 1, gains 2; 3 is wrong otherwise; 4 is right in other words."""
    folder = tmp_path_factory.mktemp("runs")

    def first(i: int, prompt: str) -> str:
        return " #### 0.5" if i in (2, 3) else f" {truth[i]}"

    def second(i: int, prompt: str) -> str:
        changed = {0: " #### -1", 1: " I <script>alert(1)</script> give up", 3: " #### 0.25"}
        changed[4] = f"  well,\n{truth[4]}"
        return changed.get(i, f" {truth[i]}")

    write_run(folder / "a", first)
    write_run(folder / "b", second)
    return folder


@pytest.fixture
def runs(tmp_path, written) -> tuple[Path, Path]:
    """The two, to be damaged."""
    for name in ("a", "b"):
        shutil.copytree(written / name, tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def test_counts_and_accuracies(runs):
    """Against what was told, the harness's own results and scipy."""
    found = compared(*runs)
    assert [(row.filter, row.metric) for row in found.rows] == [
        ("strict-match", "exact_match"),
        ("flexible-extract", "exact_match"),
    ]
    for run, right in ((runs[0], "right_a"), (runs[1], "right_b")):
        scores = read_run(run).results["results"]["word_problems"]
        for row in found.rows:
            share = getattr(row, right) / row.documents
            assert share == pytest.approx(scores[f"exact_match,{row.filter}"])
    row = found.rows[0]
    assert (row.lost, row.gained, row.other, row.documents) == (2, 1, 1, LIMIT)
    assert row.difference == pytest.approx(-1 / LIMIT)
    assert row.p_value == pytest.approx(binomtest(1, 3, 0.5).pvalue)
    assert found.texts_differ == {"word_problems": 5}
    kinds = {change.doc_id: change.kind for change in found.changes}
    assert kinds == {0: "lost", 1: "lost", 2: "gained", 3: "other"}
    lost = next(c for c in found.changes if c.doc_id == 1)
    strict = next(o for o in lost.outcomes if o.filter == "strict-match")
    assert (strict.answer_b, strict.right_a, strict.right_b) == ("[invalid]", True, False)
    assert not found.only_in_a and not found.only_in_b and not found.notes


def test_the_other_way_round(runs):
    there, back = compared(*runs), compared(*runs[::-1])
    for x, y in zip(there.rows, back.rows, strict=True):
        assert (x.lost, x.gained, x.other) == (y.gained, y.lost, y.other)
        assert x.p_value == y.p_value and x.difference == -y.difference
        assert x.difference_interval == pytest.approx(
            (-y.difference_interval[1], -y.difference_interval[0])
        )
        assert (x.right_a, x.interval_a) == (y.right_b, y.interval_b)
    assert there.texts_differ == back.texts_differ


def test_a_run_and_itself(runs):
    found = compared(runs[0], runs[0])
    assert not found.changes and found.texts_differ == {"word_problems": 0}
    assert not found.settings
    for row in found.rows:
        assert (row.lost, row.gained, row.other, row.p_value) == (0, 0, 0, 1)
        assert row.verdict.startswith("no answer turned right or wrong; 95 %: ")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300))
def test_rows(pairs):
    row = Row.of("t", "f", "m", pairs, 0)
    n = len(pairs)
    assert row.right_a == sum(a for a, _ in pairs) and row.right_b == sum(b for _, b in pairs)
    assert row.right_a - row.lost + row.gained == row.right_b
    assert row.difference == pytest.approx((row.right_b - row.right_a) / n)
    changed = row.lost + row.gained
    expected = binomtest(row.lost, changed, 0.5).pvalue if changed else 1
    assert row.p_value == pytest.approx(expected)
    low, high = row.difference_interval
    assert low <= row.difference <= high
    claims = "fewer" in row.verdict or "more" in row.verdict
    assert claims == (row.p_value <= 0.05)
    if claims:
        assert ("fewer" in row.verdict) == (row.right_b < row.right_a)


# ---------------------------------------------------------------------- documents and prompts


def test_documents_of_one_run_only(tmp_path, truth):
    write_run(tmp_path / "a", lambda i, _: truth[i])
    write_run(
        tmp_path / "b",
        lambda i, _: truth[i + 3],
        limit=None,
        samples={"word_problems": [*range(3, 20)]},
    )
    found = compared(tmp_path / "a", tmp_path / "b")
    assert found.only_in_a == {"word_problems": [0, 1, 2]}
    assert found.only_in_b == {"word_problems": [*range(12, 20)]}
    assert {row.documents for row in found.rows} == {9}
    assert not found.changes


def test_no_document_in_common(tmp_path, truth):
    write_run(tmp_path / "a", lambda i, _: truth[i])
    write_run(tmp_path / "b", lambda i, _: "", limit=None, samples={"word_problems": [30, 31]})
    with pytest.raises(InputError, match="no document in common in word_problems"):
        compared(tmp_path / "a", tmp_path / "b")


def test_no_task_in_common(runs, tmp_path):
    write_run(tmp_path / "c", lambda i, _: "", task="word_problems_short")
    with pytest.raises(InputError, match="A has word_problems; B has word_problems_short"):
        compared(runs[0], tmp_path / "c")


def test_other_prompts_are_refused(tmp_path, truth):
    write_run(tmp_path / "a", lambda i, _: truth[i])
    write_run(tmp_path / "b", lambda i, _: truth[i], num_fewshot=2)
    with pytest.raises(InputError, match="12 of 12 documents have different prompts") as caught:
        compared(tmp_path / "a", tmp_path / "b")
    assert "0 and 2 few-shot examples" in str(caught.value)
    assert "--num_fewshot" in str(caught.value) and "\n" not in str(caught.value)
    found = compared(tmp_path / "a", tmp_path / "b", allow_different_prompts=True)
    assert found.rows[0].documents == 12 and "different prompts" in found.notes[0]
    other: dict[str, Any] = {"fewshot_random_seed": 1, "system_instruction": "Be brief."}
    write_run(tmp_path / "c", lambda i, _: truth[i], num_fewshot=2, **other)
    with pytest.raises(InputError, match="another system instruction, another seed"):
        compared(tmp_path / "b", tmp_path / "c")


def test_runs_without_scores(tmp_path, truth):
    """Of --predict_only: texts alone are compared."""
    write_run(tmp_path / "a", lambda i, _: truth[i], predict_only=True)
    write_run(tmp_path / "b", lambda i, _: truth[i] + "." * (i > 9), predict_only=True)
    found = compared(tmp_path / "a", tmp_path / "b")
    assert not found.rows and found.texts_differ == {"word_problems": 2}
    assert "<svg" not in compare_page.page(found)


def test_lower_may_be_better(runs):
    """A metric that counts mistakes."""
    results = next(runs[0].rglob("results_*"))
    document = json.loads(results.read_text())
    document["higher_is_better"]["word_problems"]["exact_match"] = False
    results.write_text(json.dumps(document))
    row = compared(*runs).rows[0]
    assert (row.right_a, row.lost, row.gained) == (2, 1, 2)


def test_other_generation_settings_are_noted(tmp_path, truth):
    write_run(tmp_path / "a", lambda i, _: truth[i])
    write_run(tmp_path / "b", lambda i, _: truth[i], gen_kwargs="max_gen_toks=32")
    found = compared(tmp_path / "a", tmp_path / "b")
    assert found.notes == [
        "word_problems: the prompts are the same, the generation settings are not"
    ]
    assert "config.gen_kwargs.max_gen_toks" in found.settings


@given(st.sets(st.integers(0, 20)), st.sets(st.integers(0, 20)), st.randoms())
def test_pairing_of_any_documents(mine, theirs, random):
    """Whatever the order: what both have is compared, the rest is listed."""

    def run(documents: set[int], right: Callable[[int], bool]) -> Run:
        samples = [
            Sample(
                doc_id=i,
                doc_hash=f"document {i}",
                prompt_hash=f"prompt {i}",
                filter="none",
                target="yes",
                arguments=[["prompt", {}]],
                responses=[["yes" if right(i) else "no"]],
                filtered=["yes" if right(i) else "no"],
                metrics={"exact_match": float(right(i))},
            )
            for i in documents
        ]
        random.shuffle(samples)
        results = {"configs": {"t": {"output_type": "generate_until"}}}
        return Run(path=Path("results.json"), results=results, samples={"t": samples})

    a, b = run(mine, lambda i: i % 2 == 0), run(theirs, lambda i: i % 3 == 0)
    both = mine & theirs
    if not both:
        with pytest.raises(InputError, match="in common"):
            compare_runs(a, b)
        return
    found = compare_runs(a, b)
    (row,) = found.rows
    assert row.documents == len(both)
    assert row.lost == sum(i % 2 == 0 and i % 3 != 0 for i in both)
    assert row.gained == sum(i % 2 != 0 and i % 3 == 0 for i in both)
    assert row.other == 0 and len(found.changes) == row.lost + row.gained
    assert found.only_in_a.get("t", []) == sorted(mine - theirs)
    assert found.only_in_b.get("t", []) == sorted(theirs - mine)


def test_equal_documents_are_paired_in_order(runs):
    """Two documents with the same text are told apart by where they stand."""
    a, b = read_run(runs[0]), read_run(runs[1])

    def doubled(run):
        samples = run.samples["word_problems"]
        again = [replace(s, doc_id=s.doc_id + 100) for s in samples]
        return replace(run, samples={"word_problems": [*samples, *again]})

    found = compare_runs(doubled(a), doubled(b))
    assert found.rows[0].documents == 2 * LIMIT and found.rows[0].lost == 4
    assert {c.doc_id for c in found.changes} == {0, 1, 2, 3, 100, 101, 102, 103}


def test_several_tasks_are_summed(tmp_path, truth):
    kinds = [json.loads(x) for x in (ROOT / "eval/tasks/word_problems/problems.jsonl").open()]
    by_prompt = {f"Question: {k['question']}\nAnswer:": k["answer"] for k in kinds}
    for name, told in (("a", lambda i, _: "#### 1.5"), ("b", lambda i, p: by_prompt[p])):
        folder = tmp_path / name
        write_run(folder, told, task="word_problems_short")
        (model,) = folder.iterdir()
        (results,) = model.glob("results_*")
        date = results.stem.removeprefix("results_")
        write_run(folder, told, task="word_problems_facts")
        for file in model.iterdir():  # the two as if they were one run's
            if date not in file.name and file.name.startswith("samples"):
                file.rename(model / f"samples_word_problems_facts_{date}.jsonl")
            elif date not in file.name:
                file.unlink()
    found = compared(tmp_path / "a", tmp_path / "b")
    pooled = [row for row in found.rows if row.task == ALL]
    assert [(row.filter, row.documents, row.gained) for row in pooled] == [
        ("strict-match", 2 * LIMIT, 2 * LIMIT),
        ("flexible-extract", 2 * LIMIT, 2 * LIMIT),
    ]
    assert pooled[0].verdict.startswith("B has more right answers than A (p = 1.2e-07)")


# ------------------------------------------------------------------------------- reading of runs


def test_the_newest_run_is_read(runs, tmp_path, truth):
    old = read_run(runs[0])
    write_run(runs[0], lambda i, _: "nothing")
    found = compared(runs[0], runs[1])
    assert found.rows[0].right_a == 0
    assert "1 older runs in the folder are left out" in found.notes[0]
    assert str(old.path) in found.notes[0]
    chosen = compared(old.path, runs[1])  # by its results file
    assert chosen.rows[0].lost == 2 and not chosen.notes


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: [p.unlink() for p in f.rglob("samples*")], "--log_samples --output_path"),
        (lambda f: [p.unlink() for p in f.rglob("results*")], "no results_"),
        (lambda f: [p.write_text("{") for p in f.rglob("results*")], "cannot be read"),
        (lambda f: [p.write_text("{}") for p in f.rglob("results*")], "not a results file"),
        (lambda f: [p.write_text('{"doc_id": 1}') for p in f.rglob("samples*")], "line 1 is not a"),
        (lambda f: [p.write_text("[1") for p in f.rglob("samples*")], "cannot be read"),
    ],
)
def test_damaged_runs(runs, damage, said):
    damage(runs[1])
    with pytest.raises(InputError, match=said):
        compared(*runs)


def test_a_folder_that_is_not_there(runs):
    with pytest.raises(InputError, match="there is no folder or results file"):
        compared(runs[0], runs[0] / "nowhere")


# ---------------------------------------------------------------------------- log-probabilities


def test_multiple_choice(tmp_path):
    """The choice by likelihood, for acc_norm by likelihood per character; drift per token."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    lengths = {c: len(tokenizer(c)["input_ids"]) for c in (" one", " seventeen", " <b>2 & 3</b>")}

    def told(per_token: float) -> Answer:
        return lambda i, text: (per_token * lengths[text] - (i == 4) * 30, False)

    write_run(tmp_path / "a", told(-0.5), task="own_choice")
    write_run(tmp_path / "b", told(-0.75), task="own_choice")
    found = compared(tmp_path / "a", tmp_path / "b")
    (drift,) = found.drifts
    assert drift.tokens == LIMIT * sum(lengths.values()) and not drift.by_token
    assert drift.mean == pytest.approx(-0.25) and drift.mean_absolute == pytest.approx(0.25)
    assert drift.root_mean_square == pytest.approx(0.25) == drift.largest
    assert sum(drift.histogram[1]) == drift.tokens and drift.histogram[1][8] == drift.tokens
    assert [(row.metric, row.lost, row.gained) for row in found.rows] == [
        ("acc", 0, 0),
        ("acc_norm", 0, 0),
    ]

    def other(i: int, text: str) -> tuple[float, bool]:  # document 2 takes its right answer
        value, greedy = told(-0.5)(i, text)
        return (0.0, greedy) if i == 7 else (value, greedy)

    write_run(tmp_path / "c", other, task="own_choice")
    found = compared(tmp_path / "a", tmp_path / "c")
    assert {row.gained for row in found.rows} == {1}
    (change,) = found.changes
    assert (change.doc_id, change.kind, change.target) == (2, "gained", "seventeen")
    for outcome in change.outcomes:
        assert outcome.answer_b == "seventeen" and not outcome.right_a and outcome.right_b


def test_answers_agree_with_the_harness(tmp_path):
    """Right or wrong, as lm-eval scored it, is whether our answer is the target."""
    values = {" one": -2.0, " seventeen": -4.0, " <b>2 & 3</b>": -3.0}
    for name in ("a", "b"):
        write_run(
            tmp_path / name,
            lambda i, text, n=name: (values[text] - (i * i + 3 * ord(n)) % 7, False),
            task="own_choice",
        )
    found = compared(tmp_path / "a", tmp_path / "b")
    assert len(found.changes) > 3
    for change in found.changes:
        for outcome in change.outcomes:
            assert outcome.right_a == (outcome.answer_a == change.target)
            assert outcome.right_b == (outcome.answer_b == change.target)


def test_rolling(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    for name, each in (("a", -1.0), ("b", -1.5)):
        write_run(
            tmp_path / name,
            lambda i, text, each=each: each * len(tokenizer(text)["input_ids"]),
            task="own_rolling",
        )
    found = compared(tmp_path / "a", tmp_path / "b")
    (drift,) = found.drifts
    assert drift.mean == pytest.approx(-0.5) and drift.requests == LIMIT
    (value,) = found.values
    scores = [read_run(tmp_path / n).results["results"]["own_rolling"] for n in ("a", "b")]
    assert [value.a, value.b] == [s["word_perplexity,none"] for s in scores]
    assert not found.rows and not found.changes
    assert compare_page.page(found).count("<svg") == 1


def test_without_a_tokenizer(tmp_path):
    for name, each in (("a", -1.0), ("b", -1.5)):
        write_run(tmp_path / name, lambda i, t, each=each: each, task="own_rolling")
        (results,) = (tmp_path / name).rglob("results_*")
        document = json.loads(results.read_text())
        results.write_text(json.dumps({**document, "model_name": "not-there"}))
    (drift,) = compared(tmp_path / "a", tmp_path / "b").drifts
    assert drift.tokens is None and drift.mean == pytest.approx(-0.5)


def sidecar(run: Path, requests: Callable[[int], list[dict[str, Any]]]) -> None:
    (samples,) = run.rglob("samples_*.jsonl")
    lines = ({"doc_id": i, "requests": requests(i)} for i in range(LIMIT))
    path = samples.with_name(samples.name.replace("samples_", "logprobs_"))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_each_tokens_log_probability(runs):
    """Up to where the texts part, with how near the parting was to a tie."""
    sidecar(runs[0], lambda i: [{"tokens": [1, 2, 3], "logprobs": [-1.0, -2.0, -3.0]}])

    def second(i: int) -> list[dict[str, Any]]:
        token = 9 if i in (0, 3) else 2
        margins = [5.0, 1e-5 if i == 0 else 0.25, 4.0]
        return [{"tokens": [1, token, 3], "logprobs": [-1.5, -2.0, -2.0], "margins": margins}]

    sidecar(runs[1], second)
    found = compared(*runs)
    (drift,) = found.drifts
    assert drift.by_token and drift.tokens == 3 * (LIMIT - 2) + 2
    assert (drift.diverged, drift.ties) == (2, 1)
    assert drift.mean == pytest.approx((-0.5 * LIMIT + 1.0 * (LIMIT - 2)) / drift.tokens)
    assert drift.mean_absolute == pytest.approx((0.5 * LIMIT + LIMIT - 2) / drift.tokens)
    assert drift.largest == 1
    said = {change.doc_id: change.first_difference for change in found.changes}
    assert said[0] == (
        "the texts part at token 2, which has probability 0.1353 in A and 0.1353 in B; "
        "the two likeliest were 1.0e-05 apart"
    )
    assert said[1] is None
    next(runs[1].rglob("logprobs_*")).write_text('{"doc_id": 0}')
    with pytest.raises(InputError, match="line 1 has another form"):
        compared(*runs)


# ------------------------------------------------------------------------- the command, the page


def command(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["qwen3cp", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), out, err


def test_tables(runs, monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, *runs)
    assert code == 0
    rows = [line for line in out.splitlines() if "strict-match" in line]
    assert re.search(r"83\.33 \(55\.2 to 95\.3\) +75\.00 \(46\.8 to 91\.1\) +-8\.33", rows[0])
    assert rows[1].split()[3:] == ["2", "1", "1", "5"]
    assert "no difference can be claimed (p = 1)" in rows[2]


def test_json(runs, monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, *runs, "--json")
    document = json.loads(out)
    assert code == 0 and document["rows"][0]["lost"] == 2
    assert document["rows"][0]["verdict"].startswith("no difference")
    assert len(document["changes"]) == 4 and document["path_a"].endswith(".json")


def test_mistakes(runs, tmp_path, monkeypatch, capsys):
    for arguments in (
        (runs[0], tmp_path / "none"),
        (*runs, "--html", tmp_path / "none" / "page.html"),
        (*runs, "--html", tmp_path),
    ):
        code, out, err = command(monkeypatch, capsys, *arguments)
        assert code == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1


class Page(HTMLParser):
    """Checks that elements are closed; collects text and every attribute that could load."""

    void = frozenset(("meta", "br", "link", "img"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.loads += [v for k, v in attrs if v and k.split(":")[-1] in ("src", "href", "action")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page(runs, tmp_path, monkeypatch, capsys):
    file = tmp_path / "page.html"
    code, out, _ = command(monkeypatch, capsys, *runs, "--html", file)
    assert code == 0 and f"written: {file}" in out
    text = file.read_text()
    parsed = Page()
    parsed.feed(text)
    parsed.close()
    assert not parsed.open and parsed.elements.count("article") == 4
    assert parsed.elements.count("svg") == 1 and "script" not in parsed.elements
    # nothing is loaded: links lead into the page, style has no url of elsewhere
    assert all(target.startswith("#") for target in parsed.loads)
    assert all(where.startswith("#") for where in re.findall(r"url\(['\"]?([^)]*)\)", text))
    assert not re.search(r"@import|<link|<img|<iframe", text)
    assert "I <script>alert(1)</script> give up" in parsed.text  # an answer of B
    assert text.index("right to wrong</span>") < text.index("wrong to right</span>")


def test_the_page_has_an_end(runs, monkeypatch):
    found = compared(*runs)
    monkeypatch.setattr(compare_page, "MAX_CHANGES", 1)
    text = compare_page.page(found)
    assert text.count("<article") == 1 and "the first 1 of them" in text


words = st.text(alphabet="ab <>&\"'\n1.", max_size=30)


@given(words, words)
def test_marked_texts_are_the_texts(a, b):
    for text, marked in zip((a, b), compare_page._marked(a, b), strict=True):
        assert html.unescape(re.sub("</?mark>", "", marked)) == text
        assert "<" not in re.sub("</?mark>", "", marked)
    if a == b:
        assert "<mark>" not in compare_page._marked(a, b)[0]


def test_needs_no_torch(runs):
    script = (
        "import sys\nfrom qwen3cp.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "loaded = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "compare", *map(str, runs)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
