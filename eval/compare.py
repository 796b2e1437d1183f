"""Two runs on the same documents: which answers changed, and what may be claimed of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from qwen3cp.errors import InputError
from qwen3cp.eval.runs import Run, Sample, TokenLogprobs
from qwen3cp.eval.statistics import difference_interval, mcnemar, share_interval

__all__ = ["Change", "Comparison", "Drift", "Outcome", "Row", "compare_runs"]

Pair = tuple[Sample, Sample]
Kind = Literal["lost", "gained", "other"]
TIE = 1e-3
"""Two logits closer than this may change places between two correct implementations."""
ALL = "all tasks"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of one task under one filter, over the documents that both runs have."""

    task: str
    filter: str
    metric: str
    documents: int
    right_a: int
    right_b: int
    lost: int
    """Right in A, wrong in B."""
    gained: int
    """Wrong in A, right in B."""
    other: int
    """Wrong in both, with another answer."""
    interval_a: tuple[float, float]
    """95 %, of the share of right answers (Wilson)."""
    interval_b: tuple[float, float]
    difference: float
    """Of the shares, B less A."""
    difference_interval: tuple[float, float]
    """95 %, paired (Bonett and Price)."""
    p_value: float
    """McNemar's exact test, two-sided."""

    @staticmethod
    def of(
        task: str, filter: str, metric: str, pairs: Sequence[tuple[bool, bool]], other: int
    ) -> Row:
        """From (right in A, right in B) of each document."""
        counts = Counter(pairs)
        lost, gained, n = counts[True, False], counts[False, True], len(pairs)
        right = counts[True, True]
        return Row(
            task=task,
            filter=filter,
            metric=metric,
            documents=n,
            right_a=right + lost,
            right_b=right + gained,
            lost=lost,
            gained=gained,
            other=other,
            interval_a=share_interval(right + lost, n),
            interval_b=share_interval(right + gained, n),
            difference=(gained - lost) / n,
            difference_interval=difference_interval(gained, lost, n),
            p_value=mcnemar(lost, gained),
        )

    @property
    def verdict(self) -> str:
        """What may be claimed, in a sentence."""
        low, high = (100 * end for end in self.difference_interval)
        if self.p_value <= 0.05:
            word = "fewer" if self.difference < 0 else "more"
            claim = f"B has {word} right answers than A (p = {self.p_value:.2g})"
        elif not self.lost and not self.gained:
            claim = "no answer turned right or wrong"
        else:
            claim = f"no difference can be claimed (p = {self.p_value:.2g})"
        return f"{claim}; 95 %: B less A is between {low:+.2f} and {high:+.2f} points"


@dataclass(frozen=True, kw_only=True)
class Value:
    """A metric that is not right or wrong: what both results files say."""

    task: str
    filter: str
    metric: str
    a: float
    b: float


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Log-probabilities of the same tokens after the same text: B less A, natural logarithm."""

    task: str
    requests: int
    tokens: int | None
    """None: the runs have only sums, and their tokenizer is not here to count tokens with."""
    by_token: bool
    """Whether each token's is known. If not, a request's sum, shared by its tokens, stands in."""
    mean: float
    """Per token (per request, if tokens is None), as are the others."""
    mean_absolute: float
    root_mean_square: float
    largest: float
    """Absolute."""
    histogram: tuple[list[float], list[int]] = field(repr=False)
    """Edges (powers of ten) and counts of the absolute values."""
    diverged: int | None
    """Generated texts whose tokens differ, compared up to there; None if tokens are not known."""
    ties: int | None
    """Of these, where the logits of a run's two likeliest tokens were closer than 1e-3; None if
    that is not known."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    filter: str
    metric: str
    right_a: bool
    right_b: bool
    answer_a: str
    answer_b: str


@dataclass(frozen=True, kw_only=True)
class Change:
    """A document whose answer changed under some filter."""

    task: str
    doc_id: int
    kind: Kind
    prompt: str
    target: str
    text_a: str
    text_b: str
    outcomes: list[Outcome]
    first_difference: str | None
    """Where the tokens part, if they are known."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    path_a: str
    path_b: str
    model_a: str
    model_b: str
    rows: list[Row]
    values: list[Value]
    drifts: list[Drift]
    changes: list[Change]
    texts_differ: dict[str, int]
    """Task -> documents whose generated texts differ at all."""
    only_in_a: dict[str, list[int]]
    """Task -> documents that the other run does not have."""
    only_in_b: dict[str, list[int]]
    settings: dict[str, tuple[Any, Any]]
    """What the results files say differently of how the runs were made."""
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        document = asdict(self)
        for row, source in zip(document["rows"], self.rows, strict=True):
            row["verdict"] = source.verdict
        return document


def compare_runs(a: Run, b: Run, *, allow_different_prompts: bool = False) -> Comparison:
    """Pairs the samples of two runs by document.

    Raises InputError if they have no document in common, or if a document was asked differently,
    unless that is allowed.
    """
    tasks = [task for task in a.samples if task in b.samples]
    notes = [
        f"{task} is in {name} only"
        for name, run, rest in (("A", a, b), ("B", b, a))
        for task in run.samples
        if task not in rest.samples
    ]
    for name, run in (("A", a), ("B", b)):
        if run.older:
            notes.append(
                f"{name}: {len(run.older)} older runs in the folder are left out; the results file "
                f"of one ({run.older[-1]}) can be named instead"
            )
    if not tasks:
        raise InputError(
            f"the runs have no task in common: A has {', '.join(a.samples)}; "
            f"B has {', '.join(b.samples)}"
        )
    found = Comparison(
        path_a=str(a.path),
        path_b=str(b.path),
        model_a=a.model,
        model_b=b.model,
        rows=[],
        values=[],
        drifts=[],
        changes=[],
        texts_differ={},
        only_in_a={},
        only_in_b={},
        settings=_differences(a.settings(), b.settings()),
        notes=notes,
    )
    pooled: dict[tuple[str, str], list[tuple[list[tuple[bool, bool]], int]]] = {}
    num_pairs = 0
    for task in tasks:
        pairs = _paired(task, a, b, found)
        if not pairs:
            continue
        num_pairs += len(pairs)
        _check_prompts(task, pairs, a, b, allow_different_prompts, notes)
        for (filter, metric), outcomes, other in _compare_task(task, pairs, a, b, found):
            found.rows.append(Row.of(task, filter, metric, outcomes, other))
            pooled.setdefault((filter, metric), []).append((outcomes, other))
    if not num_pairs:
        raise InputError(
            f"the runs have no document in common in {', '.join(tasks)}: was one limited to others?"
        )
    for (filter, metric), parts in pooled.items():
        if len(parts) > 1:
            outcomes = [pair for part, _ in parts for pair in part]
            other = sum(count for _, count in parts)
            found.rows.append(Row.of(ALL, filter, metric, outcomes, other))
    return found


# --------------------------------------------------------------------------------------- pairing


def _paired(task: str, a: Run, b: Run, found: Comparison) -> list[Pair]:
    """The same document under the same filter; what has no counterpart is listed."""

    def keyed(samples: Sequence[Sample]) -> dict[tuple[str, str, int], Sample]:
        seen: Counter[tuple[str, str]] = Counter()
        result = {}
        for sample in samples:  # equal documents are told apart by their order
            key = (sample.filter, sample.doc_hash)
            result[*key, seen[key]] = sample
            seen[key] += 1
        return result

    mine, theirs = keyed(a.samples[task]), keyed(b.samples[task])
    for samples, rest, only in (
        (mine, theirs, found.only_in_a),
        (theirs, mine, found.only_in_b),
    ):
        if left := {sample.doc_id for key, sample in samples.items() if key not in rest}:
            only[task] = sorted(left)
    return [(sample, theirs[key]) for key, sample in mine.items() if key in theirs]


def _check_prompts(
    task: str, pairs: Sequence[Pair], a: Run, b: Run, allowed: bool, notes: list[str]
) -> None:
    different = {x.doc_id for x, y in pairs if x.prompt_hash != y.prompt_hash}
    documents = {x.doc_id for x, _ in pairs}
    if different:
        shots = [run.results.get("n-shot", {}).get(task) for run in (a, b)]
        reasons = [f"{shots[0]} and {shots[1]} few-shot examples"] if shots[0] != shots[1] else []
        mine, theirs = a.settings(), b.settings()
        for name in ("chat_template_sha", "system_instruction", "fewshot_as_multiturn"):
            if mine.get(name) != theirs.get(name):
                reasons.append(f"another {name.removesuffix('_sha').replace('_', ' ')}")
        if mine.get("config.fewshot_seed") != theirs.get("config.fewshot_seed"):
            reasons.append("another seed")
        said = (
            f"{task}: {len(different)} of {len(documents)} documents have different prompts in the "
            f"two runs ({', '.join(reasons) or 'the results files do not say why'})"
        )
        if not allowed:
            raise InputError(
                f"{said}: give both the same --num_fewshot, --seed, --apply_chat_template and "
                "--system_instruction, or pass --allow-different-prompts"
            )
        notes.append(said)
    elif any(x.arguments != y.arguments for x, y in pairs):
        notes.append(f"{task}: the prompts are the same, the generation settings are not")


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [*a, *(name for name in b if name not in a)]
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


# --------------------------------------------------------------------------------------- answers


def _compare_task(
    task: str, pairs: Sequence[Pair], a: Run, b: Run, found: Comparison
) -> Iterator[tuple[tuple[str, str], list[tuple[bool, bool]], int]]:
    """((filter, metric), (right in A, right in B) of each document, other wrong answers)."""
    kind = a.output_type(task)
    outcomes: dict[int, list[Outcome]] = {}
    by_filter: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_filter.setdefault(pair[0].filter, []).append(pair)
    for filter, members in by_filter.items():
        for metric in members[0][0].metrics:
            scores = [(x.metrics.get(metric), y.metrics.get(metric)) for x, y in members]
            if not all(score in (0, 1) for pair in scores for score in pair):
                found.values.extend(_value(task, filter, metric, a, b))
                continue
            best = int(a.higher_is_better(task, metric))
            right = [(x == best, y == best) for x, y in scores]
            other = 0
            for (x, y), (right_a, right_b) in zip(members, right, strict=True):
                answers = _answer(x, metric, kind), _answer(y, metric, kind)
                if right_a == right_b and answers[0] == answers[1]:
                    continue
                other += not right_a and not right_b
                outcomes.setdefault(x.doc_id, []).append(
                    Outcome(
                        filter=filter,
                        metric=metric,
                        right_a=right_a,
                        right_b=right_b,
                        answer_a=answers[0],
                        answer_b=answers[1],
                    )
                )
            yield (filter, metric), right, other
    one_each = list({x.doc_id: (x, y) for x, y in pairs}.values())
    if kind == "generate_until":
        found.texts_differ[task] = sum(x.responses != y.responses for x, y in one_each)
    partings = _partings(task, one_each, a, b)
    for x, y in one_each:
        if x.doc_id in outcomes:
            found.changes.append(
                Change(
                    task=task,
                    doc_id=x.doc_id,
                    kind=_kind(outcomes[x.doc_id]),
                    prompt=x.prompt,
                    target=_target(x, kind),
                    text_a=_text(x, kind),
                    text_b=_text(y, kind),
                    outcomes=outcomes[x.doc_id],
                    first_difference=partings.get(x.doc_id),
                )
            )
    found.changes.sort(key=lambda change: ("lost", "gained", "other").index(change.kind))
    if (drift := _drift(task, one_each, a, b)) is not None:
        found.drifts.append(drift)


def _value(task: str, filter: str, metric: str, a: Run, b: Run) -> Iterator[Value]:
    both = [run.results["results"].get(task, {}).get(f"{metric},{filter}") for run in (a, b)]
    if all(isinstance(value, int | float) for value in both):
        yield Value(task=task, filter=filter, metric=metric, a=float(both[0]), b=float(both[1]))


def _kind(outcomes: Sequence[Outcome]) -> Kind:
    if any(o.right_a and not o.right_b for o in outcomes):
        return "lost"
    return "gained" if any(o.right_b and not o.right_a for o in outcomes) else "other"


def _choices(sample: Sample) -> list[tuple[str, float]]:
    """(choice, its log-likelihood) of a multiple-choice document."""
    pairs = zip(sample.arguments, sample.filtered, strict=False)
    return [(str(arguments[1]).strip(" "), float(found[0])) for arguments, found in pairs]


def _answer(sample: Sample, metric: str, kind: str) -> str:
    if kind == "multiple_choice":
        lengths: Callable[[str], int] = {
            "acc_norm": len,
            "acc_bytes": lambda text: len(text.encode()),
        }.get(metric, lambda text: 1)
        return max(_choices(sample), key=lambda c: c[1] / max(1, lengths(c[0])))[0]
    if kind == "loglikelihood":  # whether the continuation is the greedy one
        return str(sample.filtered[0][1])
    return str(sample.filtered[0])


def _text(sample: Sample, kind: str) -> str:
    if kind == "multiple_choice":
        return "\n".join(f"{value:.4f} {choice}" for choice, value in _choices(sample))
    if kind == "loglikelihood":
        return f"{float(sample.filtered[0][0]):.4f}"
    return "\n\n".join(str(text) for repeats in sample.responses for text in repeats)


def _target(sample: Sample, kind: str) -> str:
    if kind == "multiple_choice" and sample.target.isdecimal():
        return _choices(sample)[int(sample.target)][0]
    return sample.target


# ----------------------------------------------------------------------------- log-probabilities


def _equal_tokens(x: TokenLogprobs, y: TokenLogprobs) -> int:
    """How many the two begin with."""
    same = (p == q for p, q in zip(x.tokens, y.tokens, strict=False))
    length = min(len(x.tokens), len(y.tokens))
    return next((i for i, equal in enumerate(same) if not equal), length)


def _known(
    task: str, pairs: Sequence[Pair], a: Run, b: Run
) -> Iterator[tuple[int, TokenLogprobs, TokenLogprobs]]:
    """(document, request in A, request in B) where both runs have each token's."""
    mine, theirs = a.logprobs.get(task, {}), b.logprobs.get(task, {})
    for x, y in pairs:
        requests = zip(mine.get(x.doc_id, ()), theirs.get(y.doc_id, ()), strict=False)
        yield from ((x.doc_id, p, q) for p, q in requests)


def _partings(task: str, pairs: Sequence[Pair], a: Run, b: Run) -> dict[int, str]:
    found = {}
    for doc_id, x, y in _known(task, pairs, a, b):
        where = _equal_tokens(x, y)
        if where < max(len(x.tokens), len(y.tokens)):
            said = f"the texts part at token {where + 1}"
            if where < min(len(x.tokens), len(y.tokens)):
                chosen = [math.exp(m.logprobs[where]) for m in (x, y)]
                said += f", which has probability {chosen[0]:.4f} in A and {chosen[1]:.4f} in B"
            if (margin := _margin(x, y, where)) is not None:
                said += f"; the two likeliest were {margin:.1e} apart"
            found.setdefault(doc_id, said)
    return found


def _margin(x: TokenLogprobs, y: TokenLogprobs, where: int) -> float | None:
    known = [m.margins[where] for m in (x, y) if m.margins and where < len(m.margins)]
    return min(known, default=None)


def _drift(task: str, pairs: Sequence[Pair], a: Run, b: Run) -> Drift | None:
    known = [(x, y) for _, x, y in _known(task, pairs, a, b)]
    if known:
        lengths = [_equal_tokens(x, y) for x, y in known]
        values = [
            y.logprobs[i] - x.logprobs[i]
            for (x, y), length in zip(known, lengths, strict=True)
            for i in range(length)
        ]
        parted = [
            _margin(x, y, length)
            for (x, y), length in zip(known, lengths, strict=True)
            if length < max(len(x.tokens), len(y.tokens))
        ]
        return _summary(
            task,
            [(value, 1) for value in values],
            requests=len(known),
            by_token=True,
            diverged=len(parted),
            ties=None if None in parted else sum(m is not None and m < TIE for m in parted),
        )
    if a.output_type(task) not in ("multiple_choice", "loglikelihood", "loglikelihood_rolling"):
        return None
    count = _token_counter(task, a, b)
    values = []
    for x, y in pairs:
        for i, (p, q) in enumerate(zip(x.responses, y.responses, strict=True)):
            sums = [float(r[0][0] if isinstance(r[0], list) else r[0]) for r in (p, q)]
            if x.arguments[i] == y.arguments[i] and all(map(math.isfinite, sums)):
                values.append((sums[1] - sums[0], count(x, i) if count else 1))
    if not values:
        return None
    drift = _summary(task, values, requests=len(values), by_token=False, diverged=None, ties=None)
    return drift if count else Drift(**{**vars(drift), "tokens": None})


def _summary(
    task: str,
    values: Sequence[tuple[float, int]],
    *,
    requests: int,
    by_token: bool,
    diverged: int | None,
    ties: int | None,
) -> Drift:
    """Of (sum over tokens, tokens)."""
    tokens = sum(count for _, count in values)
    each = [(value / count, count) for value, count in values if count]
    total = max(1, tokens)
    sizes = [abs(value) for value, _ in each]
    edges = [10.0**e for e in range(-8, 3)]
    counts = [0] * (len(edges) + 1)
    for size, (_, count) in zip(sizes, each, strict=True):
        counts[sum(size >= edge for edge in edges)] += count
    return Drift(
        task=task,
        requests=requests,
        tokens=tokens,
        by_token=by_token,
        mean=sum(value * count for value, count in each) / total,
        mean_absolute=sum(abs(value) * count for value, count in each) / total,
        root_mean_square=math.sqrt(sum(value**2 * count for value, count in each) / total),
        largest=max(sizes, default=0.0),
        histogram=(edges, counts),
        diverged=diverged,
        ties=ties,
    )


def _token_counter(task: str, a: Run, b: Run) -> Callable[[Sample, int], int] | None:
    """Tokens of a sample's i-th request, from the sidecar or with the tokenizer of a run."""
    for run in (a, b):
        lists = run.logprobs.get(task)
        if lists:
            return lambda sample, i: len(lists[sample.doc_id][i].tokens)
    tokenizer = _local_tokenizer(a.model) or _local_tokenizer(b.model)
    if tokenizer is None:
        return None

    def count(sample: Sample, i: int) -> int:
        texts = [str(text) for text in sample.arguments[i][:2]]
        if len(texts) == 1:  # rolling: the whole text
            return len(tokenizer(texts[0], add_special_tokens=False)["input_ids"])
        context, continuation = texts
        spaces = len(context) - len(context.rstrip())  # lm-eval moves them to the continuation
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        return len(whole) - len(tokenizer(context, add_special_tokens=False)["input_ids"])

    return count


def _local_tokenizer(model: str) -> Any | None:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError):
        return None
