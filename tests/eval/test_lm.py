"""`CPQwen3LM` against lm-eval's own `hf` on the trained checkpoint, on one rank and on several."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from qwen3cp.errors import CommunicationError, InputError, KVCacheFullError
from qwen3cp.eval import CPQwen3LM, lm
from qwen3cp.eval.tasks import new_task_manager
from tests.models import NEAR_TIE, load, reference_logits
from tests.ranks import Ranks

CHECKPOINT = Path(__file__).parent.parent / "assets" / "tiny-qwen3-moe"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<none>{% endif %}{% endif %}"
)


def choices() -> ConfigurableTask:
    """Multiple choice: sums, with answers of one token and of several, and the same words."""
    documents = [
        {"text": f"Question: Ben has {a} eggs. Ben buys {b} more. How many eggs?\nAnswer: ",
         "choices": [str(a + b), str(a + b + 1), str(a), "eggs", "egg and eggs"], "label": 0}
        for a, b in [(2, 3), (4, 4), (12, 7), (30, 1), (5, 2), (44, 21)]
    ]  # fmt: skip
    return ConfigurableTask(
        config={
            "task": "choices",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{text}}",
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )


def texts() -> ConfigurableTask:
    """Rolling log-likelihoods of texts of several windows, of one, and of one token."""
    line = "Mia has 12 eggs. Mia buys 15 more. How many eggs does Mia have now? "
    documents = [{"text": line * n} for n in (1, 9, 20)] + [{"text": "a"}]
    return ConfigurableTask(
        config={
            "task": "texts",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)},
            "output_type": "loglikelihood_rolling",
            "test_split": "test",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        }
    )


def evaluate(model: Any, *, num_fewshot: int | None = None, **options: Any) -> dict[str, Any]:
    """Results and samples of a few documents of each kind of task."""
    manager = new_task_manager("word_problems")
    tasks = [manager.load(["word_problems"])["tasks"]["word_problems"], choices(), texts()]
    results = cast(Any, simple_evaluate)(
        model=model,
        tasks=tasks,
        limit=LIMIT,
        num_fewshot=num_fewshot,
        bootstrap_iters=0,
        task_manager=manager,
        **options,
    )
    assert results is not None
    metrics = {
        task: {name: value for name, value in of_task.items() if isinstance(value, float)}
        for task, of_task in results["results"].items()
    }
    samples = {
        task: [(s["doc_id"], s["arguments"], s["resps"], s["filtered_resps"]) for s in of_task]
        for task, of_task in results["samples"].items()
    }
    return {"metrics": metrics, "samples": samples, "config": results["config"]}


LIMIT = 10
MAX_LENGTH = 400  # fewer than some of the documents have


def ours(cp: int = 1, tp: int = 1, **options: Any) -> CPQwen3LM:
    return CPQwen3LM(load(CHECKPOINT, cp, tp), max_length=MAX_LENGTH, cache_tokens=16384, **options)


@pytest.fixture(scope="module")
def hf() -> Any:
    return cast(Any, HFLM)(
        pretrained=str(CHECKPOINT),
        dtype="float32",
        device="cpu",
        batch_size=8,
        max_length=MAX_LENGTH,
    )


@pytest.fixture(scope="module")
def expected(hf) -> dict[str, Any]:
    return evaluate(hf)


@pytest.fixture(scope="module")
def alone() -> CPQwen3LM:
    return ours()


@pytest.fixture(scope="module")
def actual(alone) -> dict[str, Any]:
    return evaluate(alone)


def check_same(actual: dict[str, Any], expected: dict[str, Any], hf: Any) -> None:
    """Texts are equal but for near ties, listed; log-likelihoods within 1e-3 a token."""
    ties = []
    for task, theirs in expected["samples"].items():
        for (doc_id, arguments, got, filtered), want in zip(
            actual["samples"][task], theirs, strict=True
        ):
            assert (doc_id, arguments) == want[:2]
            if task == "word_problems":
                if got != want[2]:
                    ties.append(doc_id)
                    assert_near_tie(hf, arguments[0], got[0][0], want[2][0][0])
                else:
                    assert filtered == want[3]
            elif task == "choices":
                for argument, (one,), (other,) in zip(arguments, got, want[2], strict=True):
                    most = 1e-3 * max(1, len(hf.tok_encode(argument[1])))
                    assert one[0] == pytest.approx(other[0], abs=most)
                    assert one[1] == other[1]
            else:
                num_tokens = len(hf.tok_encode(arguments[0][0]))
                assert got[0][0] == pytest.approx(want[2][0][0], abs=1e-3 * num_tokens)
    if ties:
        print(f"near ties in the documents {ties}")
    assert len(ties) <= max(1, LIMIT // 50)
    if not ties:
        for task, metrics in expected["metrics"].items():
            assert actual["metrics"][task] == pytest.approx(metrics, rel=1e-3)


def assert_near_tie(hf: Any, arguments: tuple, got: str, want: str) -> None:
    """At the first token where two answers differ, the reference's two best are that close."""
    most = hf.max_length - arguments[1]["max_gen_toks"]
    prompt = hf.tok_encode(arguments[0])[-most:]
    a, b = hf.tok_encode(got, add_special_tokens=False), hf.tok_encode(want)
    same = next(i for i, (x, y) in enumerate(zip([*a, -1], [*b, -2], strict=False)) if x != y)
    logits = reference_logits(CHECKPOINT, torch.tensor([*prompt, *b[:same]]))[-1]
    best = logits.topk(2).values
    assert float(best[0] - best[1]) < NEAR_TIE


def test_is_a_model_of_the_harness():
    assert get_model("qwen3cp") is CPQwen3LM
    assert get_model("hf") is HFLM


def test_same_as_hf(actual, expected, hf):
    check_same(actual, expected, hf)
    assert actual["samples"]["word_problems"][0][2] != [[""]]


def test_truncated_documents_are_counted(alone, actual, hf):
    """Those that `hf` truncates, too: the word problems longer than the model allows."""
    problems = actual["samples"]["word_problems"]
    long = {
        doc_id
        for doc_id, ((prompt, kwargs),), _, _ in problems
        if len(hf.tok_encode(prompt)) > MAX_LENGTH - kwargs["max_gen_toks"]
    }
    assert len(long) >= 2
    assert actual["config"]["truncated_documents"] == len(long)
    assert alone.truncated == {("word_problems", doc_id) for doc_id in long}


def test_results_say_what_ran(actual):
    config = json.loads(json.dumps(actual["config"], default=str))
    assert config["topology"] == {"cp": 1, "tp": 1, "dp": 1, "moe": "tp"}
    assert config["comm"]["all_reduce"] == "exact"
    assert config["versions"]["torch"] == torch.__version__
    assert set(config["versions"]) == {"qwen3cp", "torch", "torch_npu", "transformers"}
    assert config["model_num_parameters"] == 5065472
    assert config["model_dtype"] == "float32"


def test_few_shot_as_hf(alone, hf):
    """Examples before the question, which all documents begin with in part."""
    manager = new_task_manager("word_problems_short")
    results = []
    for model in (alone, hf):
        task = manager.load(["word_problems_short"])["tasks"]["word_problems_short"]
        out = cast(Any, simple_evaluate)(
            model=model,
            tasks=[task],
            limit=6,
            num_fewshot=2,
            bootstrap_iters=0,
            task_manager=manager,
        )
        results.append([(s["arguments"], s["resps"]) for s in out["samples"][task.task_name]])
    assert results[0] == results[1]


# -------------------------------------------------------------------------------- several ranks


def on_all(ranks: Callable[[int], Ranks], size: int, function: Callable, *args: Any) -> list[Any]:
    """As `Ranks.run`, with time for the harness to be imported."""
    started = ranks(size)
    started.start(function, *args)
    outcomes = started.collect(600)
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, BaseException):
            raise AssertionError(f"rank {rank} of {size} failed") from outcome
    return outcomes


def _evaluate_on(cp: int, tp: int) -> dict[str, Any]:
    return evaluate(ours(cp, tp))


@pytest.mark.parametrize("topology", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_same_as_hf_on_ranks(topology, ranks, actual, expected, hf):
    """Every rank runs the harness, and all have the same results."""
    cp, tp = topology
    outcomes = on_all(ranks, cp * tp, _evaluate_on, cp, tp)
    for outcome in outcomes:
        check_same(outcome, expected, hf)
        assert outcome["samples"] == outcomes[0]["samples"]
    assert outcomes[0]["samples"]["word_problems"] == actual["samples"]["word_problems"]


def _request(kind: Any, *arguments: Any, doc_id: int = 0) -> Instance:
    return Instance(
        request_type=kind,
        doc={},
        arguments=arguments,
        idx=0,
        metadata=("a task", doc_id, 1),
    )


def _prompts(*prompts: str, **kwargs: Any) -> list[Instance]:
    options = {"until": ["\n\n"], "max_gen_toks": 8, **kwargs}
    return [_request("generate_until", p, options, doc_id=i) for i, p in enumerate(prompts)]


def _other_requests_on(rank: int) -> str:
    import torch.distributed as dist

    model = ours(2, 1)
    prompts = ["Question: 1", "Question: 2" if dist.get_rank() != rank else "Question: 3"]
    with pytest.raises(InputError) as error:
        model.generate_until(_prompts(*prompts))
    with pytest.raises(InputError, match="use_cache.*`qwen3cp eval`"):
        model.set_cache_hook(model.cache_hook)
    assert model.generate_until(_prompts("Question: 1"))  # and all goes on
    return str(error.value)


def test_ranks_with_other_requests_stop_together(ranks):
    said = on_all(ranks, 2, _other_requests_on, 1)
    assert all("other requests than the first rank" in message for message in said)


def _other_errors() -> list[str]:
    model = ours(2, 1)
    said = []
    for prompts in (_prompts("a", num_beams=4), _prompts(""), _prompts("a", max_gen_toks=9999)):
        with pytest.raises(InputError) as error:
            model.generate_until(prompts)
        said.append(str(error.value))
    return said


def test_bad_requests_stop_all_ranks(ranks):
    for said in on_all(ranks, 2, _other_errors):
        assert "beam_search" in said[0]
        assert "document 0 of a task has an empty prompt" in said[1]
        assert "max_gen_toks=9999" in said[2]


def _replicas(serve: bool) -> Any:
    """Two replicas of one rank; the first rank alone runs the harness."""
    import torch.distributed as dist

    from qwen3cp import CPQwen3MoeForCausalLM, ParallelContext

    ctx = ParallelContext.from_world(1, 1, 2)
    model = CPQwen3MoeForCausalLM.from_pretrained(
        CHECKPOINT, parallel_context=ctx, dtype=torch.float32
    )
    replica = CPQwen3LM(model, max_length=MAX_LENGTH, cache_tokens=16384)
    if not serve:
        return evaluate(replica)
    if dist.get_rank() > 0:
        replica.serve()
        with pytest.raises(CommunicationError, match="the first rank has stopped: .*no more"):
            replica.serve()
        with pytest.raises(InputError, match="empty prompt"):
            replica.serve()
        return None
    with replica.leading():
        kept = {}
        replica.cache_hook.dbdict = kept  # type: ignore[assignment]
        results = evaluate(replica)
    with pytest.raises(ValueError, match="no more"), replica.leading():
        raise ValueError("no more")
    with pytest.raises(InputError, match="empty prompt"), replica.leading():
        replica.generate_until(_prompts(""))
    for _, (arguments,), (texts,), _ in results["samples"]["word_problems"]:
        assert kept[hash_args("generate_until", arguments)] == texts[0]
    return results


@pytest.mark.parametrize("serve", [True, False], ids=["serving", "every rank"])
def test_replicas_share_the_documents(serve, ranks, actual, expected, hf):
    outcomes = on_all(ranks, 2, _replicas, serve)
    for outcome in outcomes if not serve else outcomes[:1]:
        check_same(outcome, expected, hf)
        assert outcome["samples"]["word_problems"] == actual["samples"]["word_problems"]
        assert outcome["config"]["topology"]["dp"] == 2


inputs_of = st.lists(
    st.builds(
        lambda tokens, most: lm._Input(
            tokens=np.asarray(tokens, np.int32), first_wanted=0, max_new_tokens=most
        ),
        st.lists(st.integers(0, 3), min_size=1, max_size=30),
        st.integers(0, 20),
    ),
    min_size=1,
    max_size=20,
)


@given(inputs_of, st.integers(1, 5))
def test_shares_of_replicas(inputs, num_replicas):
    shares = lm._shares(inputs, num_replicas)
    order = lm.sharing_order([x.tokens for x in inputs])
    assert [i for share in shares for i in share] == order
    costs = [len(x.tokens) + x.max_new_tokens for x in inputs]
    for share in shares:
        assert sum(costs[i] for i in share) <= sum(costs) / num_replicas + max(costs)


# ------------------------------------------------------------------------------- single requests


def both(alone: CPQwen3LM, hf: Any, requests: list[Instance]) -> tuple[list[str], list[str]]:
    batch_size, hf.batch_size_per_gpu = hf.batch_size_per_gpu, 1
    try:
        return alone.generate_until(requests), hf.generate_until(requests, disable_tqdm=True)
    finally:
        hf.batch_size_per_gpu = batch_size


PROBLEM = "Question: Mia has 12 eggs. Mia buys 15 more. How many eggs does Mia have now?\nAnswer:"


@pytest.mark.parametrize(
    "until",
    [["7\n#"], [">>2"], ["=27>>", "27"], ["#### 27"], "<<", [""], None, ["never"], ["12", " 12"]],
    ids=repr,
)
def test_stop_strings_as_hf(until, alone, hf):
    """Also those that begin in one token and end in another."""
    kwargs = {"max_gen_toks": 40} if until is None else {"max_gen_toks": 40, "until": until}
    got, want = both(alone, hf, [_request("generate_until", PROBLEM, kwargs)])
    assert got == want


def test_stops_as_soon_as_a_string_is_there(alone):
    """Not only the text is cut: nothing is generated after it."""
    requests = _prompts(PROBLEM, until=["27>>27"], max_gen_toks=40)
    (text,) = alone.generate_until(requests)
    kept = alone.tokens_of("generate_until", requests[0].args)
    assert kept is not None
    assert alone.tokenizer.decode(kept["tokens"]) == text + "27>>27"
    assert len(kept["logprobs"]) == len(kept["tokens"])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 30, "until": []},
        {"max_length": 60},
        {"temperature": 0.0, "do_sample": False, "top_p": 0.9},
        {"max_new_tokens": 3, "max_gen_toks": None},
    ],
    ids=str,
)
def test_generation_arguments_as_hf(kwargs, alone, hf):
    kwargs = {name: value for name, value in {"max_gen_toks": 40, **kwargs}.items() if value}
    requests = [_request("generate_until", PROBLEM, {"until": ["\n\n"], **kwargs})]
    got, want = both(alone, hf, requests)
    assert got == want


def test_samples_are_a_documents_own(alone):
    """Drawn from its own generator: the same whatever else is in the batch; nearly all but the
    likeliest token cut off, it is the greedy answer."""
    prompts = [PROBLEM, "Question: Ben", "Once"]
    hot = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 12, "until": []}
    torch.manual_seed(5)
    together = alone.generate_until(_prompts(*prompts, **hot))
    one = CPQwen3LM(alone.model, cache_tokens=4096, batch_size=1)
    assert one.generate_until(_prompts(*prompts, **hot)) == together
    torch.manual_seed(6)
    assert alone.generate_until(_prompts(*prompts, **hot)) != together
    narrow = alone.generate_until(_prompts(*prompts, **{**hot, "top_k": 1}))
    assert narrow == alone.generate_until(_prompts(*prompts, max_gen_toks=12, until=[]))


def test_refused_generation_arguments(alone):
    for kwargs, said in [
        ({"no_such": 1}, "no_such: there is no such argument"),
        ({"num_beams": 2}, "beam_search"),
        ({"do_sample": True}, "temperature above 0"),
        ({"stop_strings": ["a"]}, "stop_strings cannot be honoured"),
        ({"max_gen_toks": MAX_LENGTH}, "leaves no room for a prompt"),
        ({"max_length": 1}, "all that max_length=1 allows"),
    ]:
        with pytest.raises(InputError, match=said):
            alone.generate_until(_prompts("Question: a b c", **kwargs))


def test_chat_templates_as_hf(alone, hf):
    """System prompt, few-shot as turns, `enable_thinking`."""
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
    ]
    options: dict[str, Any] = {"enable_thinking": False}
    models = [
        CPQwen3LM(alone.model, cache_tokens=4096, **options),
        cast(Any, HFLM)(pretrained=hf.model, tokenizer=hf.tokenizer, **options),
    ]
    said = []
    for model in models:
        model.tokenizer.chat_template = TEMPLATE
        said.append(model.apply_chat_template(chat))
        said.append(model.apply_chat_template(chat[:3], add_generation_prompt=False))
    assert said[:2] == said[2:]
    assert said[0].endswith("2+2?<|im_end|>\n<|im_start|>assistant\n<none>")
    assert models[0].chat_template(True) == TEMPLATE
    with pytest.raises(InputError, match="think_end_token"):
        CPQwen3LM(alone.model, cache_tokens=4096, enable_thinking=True)


@pytest.mark.parametrize("think_end", ["<<", 285])
def test_thinking_is_cut_off_as_hf_does(think_end, alone, hf):
    options = {"enable_thinking": True, "think_end_token": think_end, "max_length": MAX_LENGTH}
    thinks = CPQwen3LM(alone.model, cache_tokens=4096, **options)
    reference = cast(Any, HFLM)(pretrained=hf.model, tokenizer=hf.tokenizer, **options)
    got, want = both(thinks, reference, _prompts(PROBLEM, max_gen_toks=40))
    assert got == want and got[0]
    with pytest.raises(InputError, match="enable_thinking"):
        thinks.loglikelihood([_request("loglikelihood", "a", "b")])


PAIRS = [
    ("", " Mia has"),
    ("Question:", " Mia"),
    ("Question: ", "Mia"),
    ("Question:", " Ben"),
    ("<|endoftext|>", "Question"),
    ("", "<|endoftext|>Question"),
    ("a " * 500, " Mia has 12 eggs"),
    (PROBLEM, " 12 + 15 = <<12+15=27>>27\n#### 27"),
]


@pytest.mark.parametrize("options", [{}, {"add_bos_token": True}, {"prefix_token_id": 7}], ids=str)
def test_continuations_as_hf(options, alone, hf):
    """Empty contexts, spaces between the two, a beginning-of-text token, contexts too long."""
    models: list[Any] = [
        CPQwen3LM(alone.model, cache_tokens=4096, max_length=MAX_LENGTH, **options),
        cast(Any, HFLM)(pretrained=hf.model, max_length=MAX_LENGTH, **options),
    ]
    requests = [_request("loglikelihood", *pair, doc_id=i) for i, pair in enumerate(PAIRS)]
    got, want = (model.loglikelihood(requests, disable_tqdm=True) for model in models)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    assert [x for x, _ in got] == pytest.approx([x for x, _ in want], abs=2e-3)
    assert models[0].truncated == {("a task", 6)}
    assert models[0].find_truncated(requests) == {("a task", 6)}


def test_continuations_that_cannot_be_scored(alone):
    for pair in (("a", ""), ("", ""), ("a", "b " * 500)):
        with pytest.raises(InputError, match="document 3 of a task: a contin.* 1 to"):
            alone.loglikelihood([_request("loglikelihood", *pair, doc_id=3)])


def test_documents_larger_than_the_cache(alone):
    small = CPQwen3LM(alone.model, cache_tokens=128)
    with pytest.raises(KVCacheFullError, match="cache_tokens"):
        small.generate_until(_prompts(PROBLEM, max_gen_toks=200))


def test_wrong_arguments(alone):
    for options, said in [
        ({"no_such": 1}, "no_such: there is no such argument"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "many"}, "batch_size"),
        ({"max_length": -1}, "max_length"),
        ({"cache_tokens": 0}, "cache_tokens"),
    ]:
        with pytest.raises(InputError, match=said):
            CPQwen3LM(alone.model, **options)


def test_batch_size_is_the_rows_of_the_batch(alone, monkeypatch):
    rows = []
    decode = type(alone.model).decode

    def watched(self, cache, sequences, next_ids):
        rows.append(len(sequences))
        return decode(self, cache, sequences, next_ids)

    monkeypatch.setattr(type(alone.model), "decode", watched)
    for batch_size, most in ((2, 2), ("auto", 5)):
        rows.clear()
        model = CPQwen3LM(alone.model, cache_tokens=4096, batch_size=batch_size)
        model.generate_until(_prompts(*"abcde", max_gen_toks=4, until=[]))
        assert max(rows) == most


def test_a_cache_by_memory_is_the_same_on_all_ranks(ranks):
    for pages in on_all(ranks, 2, _pages):
        assert pages == 1 + 3  # of the rank that has least


def _pages() -> int:
    import torch.distributed as dist

    return CPQwen3LM(
        load(CHECKPOINT, 2, 1), cache_tokens=128 * (3 + dist.get_rank())
    ).kv_cache.num_pages


def test_progress(alone, capsys):
    alone.generate_until(_prompts(PROBLEM, "Question: Ben"))
    shown = capsys.readouterr().err
    assert "2/2" in shown and "tokens/s" in shown and "/128 pages" in shown
    alone.generate_until(_prompts(PROBLEM), disable_tqdm=True)
    assert capsys.readouterr().err == ""


def _progress() -> bool:
    import contextlib
    import io

    model = ours(2, 1)
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        model.generate_until(_prompts("Question: Ben"))
    return "pages" in shown.getvalue()


def test_only_the_first_rank_shows_progress(ranks):
    assert on_all(ranks, 2, _progress) == [True, False]
