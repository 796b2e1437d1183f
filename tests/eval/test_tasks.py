"""Offline tasks: the harness's own, document by document, read from files; and clear errors."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from qwen3cp.errors import InputError
from qwen3cp.eval.tasks import check_tasks, new_task_manager, readers, task_paths

ASSETS = Path(__file__).parents[1] / "assets" / "tiny-qwen3-moe"

# Sentences of our own, in the datasets' published forms.

GSM8K_TRAIN = [
    {
        "question": f"A tram has {n} seats and {n + 3} people get on. How many stand?",
        "answer": f"There are {n + 3}-{n}=<<{n + 3}-{n}=3>>3 too many.\n#### 3",
    }
    for n in range(20, 27)
]
GSM8K_TEST = [
    {
        "question": "Frau Bäcker has 1,200 rolls, sells 200 for $2 each. How much does she get?",
        "answer": "She gets 200*2=$<<200*2=400>>400.\n#### 400",
    },
    {
        "question": 'Five "trains" of 230 people leave. How many people is that?',
        "answer": "5*230=<<5*230=1150>>1,150 people.\n#### 1,150",
    },
]
BOOLQ = [
    {
        "question": "is the harbour of the island open in winter",
        "title": "Harbour (island)",
        "answer": True,
        "passage": "The harbour (/ˈhɑːbə/) stays open in winter -- ice is rare.",
    },
    {
        "question": "can a bicycle be taken on the ferry",
        "title": "Ferry",
        "answer": False,
        "passage": "Bicycles have to be left at the pier.",
    },
    {
        "question": "do lamps need oil",
        "title": "Lamp",
        "answer": True,
        "passage": "These lamps burn oil.",
    },
]
SUPERGLUE = [
    {
        "question": row["question"],
        "passage": f"{row['title']} -- {row['passage']}",
        "idx": i,
        "label": row["answer"],
    }
    for i, row in enumerate(BOOLQ)
]
HELLASWAG = [
    {
        "ind": 7 + i,
        "activity_label": label,
        "ctx_a": ctx_a,
        "ctx_b": ctx_b,
        "ctx": f"{ctx_a} {ctx_b}".strip(),
        "split": "val",
        "split_type": "indomain",
        "label": i,
        "endings": [f"{verb} the  rope. [substeps] Then rest." for verb in verbs],
        "source_id": f"own~{i}",
    }
    for i, (label, ctx_a, ctx_b, verbs) in enumerate(
        [
            ("Sailing", "A crew stands at the mast. They wait.", "the captain", "abcd"),
            (
                "Knots",
                "[header] How to tie [title] Take a rope.",
                "",
                ["cut", "tie", "burn", "eat"],
            ),
        ]
    )
]
CEVAL_DEV = [
    {
        "id": i,
        "question": f"下列哪一个数大于{i + 2}？____",
        "A": str(i),
        "B": str(i + 1),
        "C": str(i + 2),
        "D": f"{i + 3}，或更大",
        "answer": "D",
        "explanation": "比较大小。",
    }
    for i in range(5)
]
CEVAL_VAL = [
    {"id": 0, "question": " 合同“成立”的时间是____ ", **dict(zip("ABCD", "甲乙丙丁", strict=True))}
    | {"answer": "B"},
    {
        "id": 1,
        "question": "以下,正确的是____",
        "A": "一",
        "B": "二",
        "C": "三",
        "D": "四",
        "answer": "C",
    },
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with the files of all four datasets, each in its own."""
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", GSM8K_TRAIN)
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", GSM8K_TEST)
    write_jsonl(tmp_path / "boolq" / "train.jsonl", BOOLQ)
    write_jsonl(tmp_path / "boolq" / "dev.jsonl", BOOLQ[1:])
    write_jsonl(tmp_path / "hellaswag" / "hellaswag_train.jsonl", HELLASWAG)
    write_jsonl(tmp_path / "hellaswag" / "hellaswag_val.jsonl", HELLASWAG[::-1])
    write_csv(tmp_path / "ceval" / "dev" / "law_dev.csv", CEVAL_DEV)
    write_csv(tmp_path / "ceval" / "val" / "law_val.csv", CEVAL_VAL)
    return tmp_path


def on_the_hub() -> dict[tuple[str, str | None], dict[str, datasets.Dataset]]:
    """What datasets.load_dataset would return, were these sentences on the hub."""
    text = datasets.Value("string")
    boolq = datasets.Features(
        question=text,
        passage=text,
        idx=datasets.Value("int32"),
        label=datasets.ClassLabel(names=["False", "True"]),
    )
    swag = [{**row, "label": str(row["label"])} for row in HELLASWAG]
    order = ["ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id"]
    swag = [{key: row[key] for key in [*order, "split", "split_type", "label"]} for row in swag]
    held_out = [{**row, "idx": i} for i, row in enumerate(SUPERGLUE[1:])]
    exam = [{**row, "explanation": ""} for row in CEVAL_VAL]

    def split(rows: list[dict[str, Any]], features: datasets.Features | None = None):
        return datasets.Dataset.from_list(rows, features=features)

    return {
        ("openai/gsm8k", "main"): dict(train=split(GSM8K_TRAIN), test=split(GSM8K_TEST)),
        ("aps/super_glue", "boolq"): dict(
            train=split(SUPERGLUE, boolq), validation=split(held_out, boolq)
        ),
        ("Rowan/hellaswag", None): dict(train=split(swag), validation=split(swag[::-1])),
        ("ceval/ceval-exam", "law"): dict(dev=split(CEVAL_DEV), val=split(exam)),
    }


@pytest.fixture(scope="session")
def harness() -> TaskManager:
    return TaskManager()


def requests(task: Any, shots: int, chat: bool) -> list[Any]:
    """What the model would be asked, and how answers are looked up, document by document."""
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests(
        rank=0,
        world_size=1,
        system_instruction="Be brief." if chat else None,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        chat_template=(lambda turns, **_: json.dumps(turns)) if chat else None,
    )
    return [
        (i.request_type, i.doc_id, i.idx, i.args, i.doc, task.doc_to_target(i.doc))
        for i in task.instances
    ]


def scoring(task: Any) -> dict[str, Any]:
    config = task.config.to_dict()
    named = ("generation_kwargs", "filter_list", "num_fewshot", "repeats", "target_delimiter")
    more = ("fewshot_delimiter", "description", "output_type", "doc_to_choice", "doc_to_text")
    splits = ("test_split", "validation_split", "fewshot_split", "training_split")
    return {
        **{key: config.get(key) for key in (*named, *more, *splits, "should_decontaminate")},
        "sampler": type(task.sampler),
        "aggregation": task.aggregation(),
        "higher_is_better": task.higher_is_better(),
        "arguments": task._metric_fn_kwargs,
        "version": task.VERSION,
    }


SHOTS = {"gsm8k": 5, "boolq": 2, "hellaswag": 1, "ceval-valid_law": 5}
ANSWERS = {
    "gsm8k": ["so #### 400", "#### 1150 people", "$400.", "no number", "Question: #### 1,150"],
    "boolq": [(-1.0, False), (-2.0, False)],
    "hellaswag": [(-9.0, False), (-5.5, False), (-7.0, False), (-8.0, False)],
    "ceval-valid_law": [(-3.0, False), (-1.0, True), (-2.0, False), (-4.0, False)],
}


@pytest.mark.parametrize("name", SHOTS)
def test_is_the_harnesss_own_task(name, data, harness, monkeypatch):
    """Prompts, documents, filters, metrics and scores of lm-eval's task on the hub's dataset."""
    hub = on_the_hub()
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, **_: hub[path, name])
    theirs: Any = harness.load([name])["tasks"][name]
    assert isinstance(theirs, ConfigurableTask) and theirs.config.custom_dataset is None
    manager = new_task_manager(name, data_dir=data)
    ours: Any = check_tasks(name, manager, data_dir=data)["tasks"][name]
    assert ours.config.custom_dataset.__module__ == "qwen3cp.eval.tasks.readers"
    assert scoring(ours) == scoring(theirs)
    assert ours.aggregation() == dict.fromkeys(ours.aggregation(), mean)
    for shots in (0, SHOTS[name]):
        for chat in (False, True):
            built = requests(ours, shots, chat)
            assert built == requests(theirs, shots, chat)
            assert len({doc_id for _, doc_id, *_ in built}) == 2
    answers = ANSWERS[name]
    for task in (ours, theirs):
        for i, instance in enumerate(task.instances):
            instance.resps = [answers[i % len(answers)]]
        task.apply_filters()
    for own, other in zip(ours.instances, theirs.instances, strict=True):
        assert own.filtered_resps == other.filtered_resps
        for key in own.filtered_resps:
            of_doc = [i for i in ours.instances if i.doc_id == own.doc_id]
            scores = [
                task.process_results(own.doc, [i.filtered_resps[key] for i in of_doc])
                for task in (ours, theirs)
            ]
            assert scores[0] == scores[1] and scores[0]


def test_ceval_has_the_harnesss_subjects(harness):
    """All 52, with its descriptions, and the same group."""
    ours = new_task_manager("ceval", data_dir="anywhere")
    names = [name for name in harness.all_subtasks if name.startswith("ceval-valid_")]
    assert len(names) == 52
    assert [name for name in ours.all_subtasks if name.startswith("ceval-valid_")] == names
    for name in names:
        mine, theirs = ours.task_index[name].cfg, harness.task_index[name].cfg
        assert mine is not None and theirs is not None
        assert mine["description"] == theirs["description"]
        assert mine["dataset_kwargs"] == {"subject": theirs["dataset_name"]}
    group, theirs = ours.task_index["ceval-valid"].cfg, harness.task_index["ceval-valid"].cfg
    assert group == theirs
    assert set(harness.task_index["ceval-valid"].cfg["task"]) == set(names)  # type: ignore[index]


def test_ceval_whole(data):
    """The group under both names, once every subject has its files."""
    for name in new_task_manager("ceval", data_dir=data).all_subtasks:
        if name.startswith("ceval-valid_"):
            subject = name.removeprefix("ceval-valid_")
            write_csv(data / "ceval" / "dev" / f"{subject}_dev.csv", CEVAL_DEV)
            write_csv(data / "ceval" / "val" / f"{subject}_val.csv", CEVAL_VAL)
    for name in ("ceval", "ceval-valid"):
        loaded = check_tasks(name, new_task_manager(name, data_dir=data), data_dir=data)
        assert len(loaded["tasks"]) == 52 and "ceval-valid" in loaded.get("groups", {})


def test_other_published_forms(data):
    """SuperGLUE's files and the hub's parquet files give the same documents as the originals."""
    write_jsonl(data / "superglue" / "BoolQ" / "train.jsonl", SUPERGLUE)
    write_jsonl(data / "superglue" / "BoolQ" / "val.jsonl", SUPERGLUE)
    write_jsonl(data / "boolq" / "dev.jsonl", BOOLQ)
    original = readers.boolq(data_dir=str(data))
    for split, documents in readers.boolq(data_dir=str(data / "superglue")).items():
        assert documents.to_list() == original[split].to_list()
    hub = data / "hub"
    for name, rows in {
        "gsm8k/main/train": GSM8K_TRAIN,
        "gsm8k/main/test": GSM8K_TEST,
        "boolq/train": [{**row, "label": int(row["label"])} for row in SUPERGLUE],
        "boolq/validation": SUPERGLUE,
        "hellaswag/data/train": [{**row, "label": str(row["label"])} for row in HELLASWAG],
        "hellaswag/data/validation": HELLASWAG[::-1],
        "ceval/law/dev": CEVAL_DEV,
        "ceval/law/val": CEVAL_VAL,
    }.items():
        half = len(rows) // 2
        write_parquet(hub / f"{name}-00000-of-00002.parquet", rows[:half])
        write_parquet(hub / f"{name}-00001-of-00002.parquet", rows[half:])
    for source in (readers.GSM8K, readers.BOOLQ, readers.HELLASWAG, readers.ceval_source("law")):
        published, from_hub = source.read(data), source.read(hub)
        for split, documents in published.items():
            assert documents.to_list() == from_hub[split].to_list() and len(documents)


def test_files_in_the_folder_itself(data):
    """--data-dir may also be the dataset's own folder."""
    manager = new_task_manager("gsm8k", data_dir=data / "gsm8k")
    assert len(check_tasks("gsm8k", manager)["tasks"]["gsm8k"].eval_docs) == 2


# ---------------------------------------------------------------------------------------- errors


def failure(data_dir: Path | None, tasks: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        manager = new_task_manager(tasks, data_dir=data_dir)
        check_tasks(tasks, manager, data_dir=data_dir, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_files_are_named(data):
    (data / "gsm8k" / "test.jsonl").unlink()
    said = failure(data, "gsm8k")
    assert f"{data / 'gsm8k'} has no test.jsonl" in said and "question and answer" in said
    (data / "ceval" / "val" / "law_val.csv").unlink()
    assert "val/law_val.csv" in failure(data, "ceval-valid_law")
    assert "is not a folder" in failure(data / "nowhere", "gsm8k")


def test_few_shot_files_are_needed_only_for_shots(data):
    (data / "gsm8k" / "train.jsonl").unlink()
    said = failure(data, "gsm8k")
    assert "5 few-shot examples" in said and "there are 0" in said and "train.jsonl" in said
    manager = new_task_manager("gsm8k", data_dir=data)
    assert check_tasks("gsm8k", manager, num_fewshot=0, data_dir=data)["tasks"]
    assert "there are 5 in its 'dev' split" in failure(data, "ceval-valid_law", num_fewshot=6)
    assert "there are 64" in failure(None, "word_problems", num_fewshot=65)


@pytest.mark.parametrize(
    ("task", "file", "text", "said"),
    [
        (
            "gsm8k",
            "gsm8k/test.jsonl",
            '{"question": "a"}',
            "line 1: no 'answer'; expected",
        ),
        ("gsm8k", "gsm8k/test.jsonl", '\n{"question": "a",', "line 2 is not JSON"),
        ("gsm8k", "gsm8k/test.jsonl", '["a"]', "line 1 is not a JSON object"),
        ("gsm8k", "gsm8k/test.jsonl", '{"question": 1, "answer": "a"}', "is 1, not a text"),
        ("gsm8k", "gsm8k/test.jsonl", "\n", "has no documents"),
        ("gsm8k", "gsm8k/train.jsonl", '{"q": "a"}', "train.jsonl, line 1: no 'question'"),
        ("boolq", "boolq/dev.jsonl", '{"question": "a", "passage": "b"}', "no 'answer'"),
        (
            "boolq",
            "boolq/dev.jsonl",
            '{"question": "a", "passage": "b", "title": "c", "answer": "yes"}',
            "'yes' is not true or false",
        ),
        ("hellaswag", "hellaswag/hellaswag_val.jsonl", '{"ind": 1}', "no 'endings'"),
        (
            "hellaswag",
            "hellaswag/hellaswag_val.jsonl",
            json.dumps({**HELLASWAG[0], "label": 4}),
            "'label' is 4, and there are 4 endings",
        ),
        (
            "ceval-valid_law",
            "ceval/val/law_val.csv",
            "id,question,A,B,C,D\n0,a,b,c,d,e",
            "no 'answer'",
        ),
        (
            "ceval-valid_law",
            "ceval/val/law_val.csv",
            "id,question,A,B,C,D,answer\n0,a,b,c,d,e,E",
            "row 0: 'answer' is 'E', not one of A, B, C, D",
        ),
    ],
)
def test_rows_of_another_form(data, task, file, text, said):
    (data / file).write_text(text, encoding="utf-8")
    message = failure(data, task)
    assert said in message and str(data / file) in message


def test_files_that_cannot_be_read(data):
    (data / "gsm8k" / "test.jsonl").write_bytes(b'{"question": "\xff"}')
    assert "cannot be read" in failure(data, "gsm8k")
    (data / "gsm8k" / "test.jsonl").unlink()
    (data / "gsm8k" / "main").mkdir()
    (data / "gsm8k" / "main" / "test-0.parquet").write_bytes(b"PAR1")
    assert "cannot be read" in failure(data, "gsm8k")


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ("word_problem", "did you mean word_problems"),
        ("gsm8k,gsm9k,zzzzzz", "no task 'gsm9k': did you mean gsm8k"),
        ("zzzzzzzzzz", "lm-eval ls tasks"),
        ("nowhere.yaml", "there is no task file nowhere.yaml"),
        (" , ", "pass --tasks"),
    ],
)
def test_unknown_tasks(tasks, said):
    manager = new_task_manager("word_problems", data_dir="nowhere")
    with pytest.raises(InputError) as caught:
        check_tasks(tasks, manager)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_nothing_reads(data):
    assert "is read by none of word_problems" in failure(data, "word_problems")
    with pytest.raises(InputError, match="--include_path .*nowhere is not a folder"):
        new_task_manager(include_path=data / "nowhere")


def test_lm_evals_own_tasks_are_known_when_they_are_named(harness, monkeypatch):
    """And indexed only then."""
    indexed = []
    original = TaskManager.__init__

    def counted(self, *args: Any, **kwargs: Any) -> None:
        indexed.append(kwargs.get("include_defaults", True))
        if indexed[-1]:  # thousands of files
            self.__dict__.update(harness.__dict__)
        else:
            original(self, *args, **kwargs)

    monkeypatch.setattr(TaskManager, "__init__", counted)
    new_task_manager("word_problems,word_problems_long")
    assert indexed == [False]
    assert "arc_easy" in new_task_manager("word_problems,arc_easy").all_tasks
    assert indexed == [False, False, True]


def test_a_task_that_would_download(harness, monkeypatch):
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match="gsm8k cannot be loaded: no network.*--data-dir"):
        check_tasks("gsm8k", harness)


def test_local_tasks_say_that_they_need_a_folder():
    manager = TaskManager(include_path=[*task_paths("x")], include_defaults=False)
    with pytest.raises(InputError, match='--data-dir .*--metadata .*"data_dir"'):
        check_tasks("gsm8k", manager)


# -------------------------------------------------------------------------------- word problems


def test_word_problems_are_those_of_the_checkpoint():
    splits = readers.word_problems()
    for split, file in (("test", "problems-test.jsonl"), ("fewshot", "problems-fewshot.jsonl")):
        lines = (ASSETS / file).read_text().splitlines()
        rows = splits[split].to_list()
        assert Counter(map(json.dumps, rows)) == Counter(json.dumps(json.loads(x)) for x in lines)


def test_any_first_documents_are_a_fair_share():
    kinds = readers.word_problems()["test"]["kind"]
    totals = Counter(kinds)
    assert totals == {"short": 250, "facts": 90, "long": 60}
    for count in range(1, 401):
        shown = Counter(kinds[:count])
        assert all(abs(shown[kind] - count * n / 400) <= 1.5 for kind, n in totals.items())


def test_word_problems_score_as_gsm8k(harness, data):
    loaded = check_tasks("word_problems*", new_task_manager("word_problems*"))["tasks"]
    sizes = {name: len(task.eval_docs) for name, task in loaded.items()}
    assert sizes == {
        "word_problems": 400,
        "word_problems_short": 250,
        "word_problems_facts": 90,
        "word_problems_long": 60,
    }
    gsm8k: Any = check_tasks("gsm8k", new_task_manager("gsm8k", data_dir=data))["tasks"]["gsm8k"]
    for task in loaded.values():
        mine: Any = task
        for key in ("doc_to_text", "doc_to_target", "filter_list", "metric_list"):
            assert mine.config.to_dict()[key] == gsm8k.config.to_dict()[key]
        asked = mine.config.generation_kwargs
        assert asked == {
            **gsm8k.config.generation_kwargs,
            "until": ["\n\n", *gsm8k.config.generation_kwargs["until"]],
            "max_gen_toks": 64,
        }
