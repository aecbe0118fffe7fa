"""Prompts and ready responses from every kind of source, with a real tokenizer, offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.config.schema import Config, StudentSection
from megatron_vopd.data.prompts import (
    Prompts,
    PromptTokenizer,
    evaluation_paths,
    load_evaluation_prompts,
    load_prompts,
    load_training_prompts,
    training_prompts,
)
from megatron_vopd.data.responses import load_responses, shortened
from megatron_vopd.errors import UserError
from tests.support.data_cases import RECORDS, config_of, refused, write_jsonl
from tests.support.tiny_tokenizer import (
    ENDOFTEXT,
    IM_END,
    IM_START,
    save_model_folder,
    save_tokenizer,
)


def tokenizer_of(model: Path, **settings: Any) -> PromptTokenizer:
    return PromptTokenizer.of(str(model), StudentSection(path=str(model), **settings))


def prompts_at(path: str, config: Config, tokenizer: PromptTokenizer) -> Prompts:
    """Return what a run of `config` reads from `path` as training prompts."""
    needs_answer = config.objective.task_reward_weight > 0
    teachers = list(config.named_teachers)
    return load_prompts(path, "data.train", config.data, tokenizer, teachers, needs_answer)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture(scope="module")
def chat(model: Path) -> PromptTokenizer:
    return tokenizer_of(model)


@pytest.fixture(scope="module")
def plain(model: Path) -> PromptTokenizer:
    return tokenizer_of(model, chat_template="none")


BAD_LINES = [
    (b'{"prompt": "a"', ["a.jsonl:2", "column"]),
    (b"[1]", ["a.jsonl:2", "JSON object"]),
    (b'"text"', ["a.jsonl:2", "JSON object"]),
    (b'{"prompt": "\xff"}', ["a.jsonl:2", "UTF-8"]),
    (b"[" * 100_000, ["a.jsonl:2"]),
    (b'{"question": "a"}', ["a.jsonl:2 prompt", "there are: question", "data.prompt_field"]),
    (b'{"prompt": "\\ud800"}', ["a.jsonl:2", "not readable"]),
    (b'{"prompt": null}', ["a.jsonl:2 prompt"]),
    (b'{"prompt": 3}', ["a.jsonl:2 prompt", "got 3"]),
    (b'{"prompt": "  "}', ["a.jsonl:2 prompt", "blank"]),
    (b'{"prompt": []}', ["a.jsonl:2 prompt", "chat messages"]),
    (b'{"prompt": ["a"]}', ["a.jsonl:2 prompt", "role and content"]),
    (b'{"prompt": [{"role": "user"}]}', ["a.jsonl:2 prompt", "role and content"]),
    (b'{"prompt": [{"role": "user", "content": [1]}]}', ["a.jsonl:2 prompt", "role and content"]),
    (
        b'{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        ["a.jsonl:2 prompt", "ends with the assistant"],
    ),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES)
def test_bad_records_are_named(
    line: bytes, words: list[str], tmp_path: Path, chat: PromptTokenizer
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(RECORDS[0]).encode() + b"\n" + line + b"\n")
    refused(lambda: prompts_at(str(path), config_of(), chat), *words)


def test_bad_files_are_named(tmp_path: Path, chat: PromptTokenizer) -> None:
    def load(name: str, content: bytes | None = None) -> Any:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        return lambda: prompts_at(str(tmp_path / name), config_of(), chat)

    refused(load("none.jsonl"), "data.train", "none.jsonl", "existing")
    refused(load("empty.jsonl", b"\n"), "data.train", "no records", "at least one prompt")
    refused(load("a.csv", b"prompt\na\n"), "data.train", "a.csv", ".jsonl")
    refused(load("a.parquet", b"no parquet"), "data.train", "a.parquet")
    (tmp_path / "hollow").mkdir()
    refused(load("hollow"), "data.train")


def test_rendering(model: Path, chat: PromptTokenizer, plain: PromptTokenizer) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    user = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    thinking = tokenizer_of(model, thinking=True)
    assert chat.rendered("Hi", "x") == user + "<think></think>"
    assert chat.rendered(conversation, "x") == system + user + "<think></think>"
    assert thinking.rendered("Hi", "x") == user
    assert plain.rendered("Hi", "x") == "Hi"
    refused(lambda: plain.rendered(conversation, "a:1"), "a:1", "student.chat_template")
    ids = chat.encoded([user])[0]
    assert ids.count(IM_START) == 2 and ids.count(IM_END) == 1
    assert chat.decoded(ids) == "user\nHi\nassistant\n"
    direct = chat.tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert chat.encoded([chat.rendered(conversation, "x")])[0] == direct


def test_a_beginning_token_only_where_no_template_writes_it(tmp_path: Path, model: Path) -> None:
    folder = save_tokenizer(shutil.copytree(model, tmp_path / "m"), begins=True)
    chat, plain = (tokenizer_of(folder, chat_template=choice) for choice in ("tokenizer", "none"))
    begins = [tokenizer.encoded(["ab"])[0][0] == ENDOFTEXT for tokenizer in (chat, plain)]
    assert begins == [False, True]
    assert plain.encoded_response("ab") == plain.encoded(["ab"])[0][1:]


def test_templates(tmp_path: Path, model: Path) -> None:
    def of(choice: str, folder: Path = model) -> PromptTokenizer:
        return tokenizer_of(folder, chat_template=choice)

    jinja = tmp_path / "t.jinja"
    jinja.write_text("Q: {{ messages[0].content }} A:")
    assert of(str(jinja)).rendered("Hi", "x") == "Q: Hi A:"
    jinja.write_text("{% if")
    refused(lambda: of(str(jinja)).rendered("Hi", "a:3"), "a:3", "template")
    jinja.write_text("{{ raise_exception('roles must alternate') }}")
    refused(lambda: of(str(jinja)).rendered("Hi", "a:3"), "a:3", "roles must alternate")
    # A template runs in a sandbox.
    jinja.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    refused(lambda: of(str(jinja)).rendered("Hi", "a:3"), "a:3", "template")
    for text in ("{{ 1 / 0 }}", "{% for i in range(10 ** 9) %}{% endfor %}", "{{ messages[9].x }}"):
        jinja.write_text(text)
        refused(lambda: of(str(jinja)).rendered("Hi", "a:3"), "a:3", "template")
    jinja.write_text(" ")
    refused(lambda: of(str(jinja)), "student.chat_template", "empty")
    bare = save_tokenizer(shutil.copytree(model, tmp_path / "bare"), template=None)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    refused(lambda: of("tokenizer", bare), "student.chat_template", "none")
    assert of("none", bare).rendered("Hi", "x") == "Hi"


def test_a_model_without_a_usable_tokenizer(tmp_path: Path, model: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "m")
    code = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["own.X", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(code))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "tokenizer.json").unlink()
    refused(lambda: tokenizer_of(folder), "student.path")
    assert not (tmp_path / "ran").exists()


def test_prompts_that_are_too_long_are_left_out_and_counted(
    tmp_path: Path, plain: PromptTokenizer
) -> None:
    records = [{"prompt": "x" * size, "answer": 1.5} for size in (5, 64, 65, 200, 1)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    read = prompts_at(path, config_of(), plain)
    assert [len(prompt.ids) for prompt in read.prompts] == [5, 64, 1] and read.num_too_long == 2
    assert [prompt.prompt_id for prompt in read.prompts] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:5"]
    assert {prompt.answer for prompt in read.prompts} == {"1.5"}
    path = write_jsonl(tmp_path / "b.jsonl", records[2:4])
    refused(
        lambda: prompts_at(path, config_of(), plain),
        "2 records, all longer than 64",
        "data.max_prompt_tokens",
    )


def test_many_prompts_keep_their_ids(tmp_path: Path, plain: PromptTokenizer) -> None:
    """They are more than one batch of the tokenizer."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{i}"} for i in range(2001)])
    prompts = prompts_at(path, config_of(), plain).prompts
    assert len(prompts) == 2001 and plain.decoded(prompts[2000].ids) == "p2000"
    assert prompts[1999].ids[0] is prompts[5].ids[0], "one object per id"


def test_training_stream_and_held_out(tmp_path: Path, chat: PromptTokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{i % 30}"} for i in range(40)])
    config = config_of(data__train=path)
    loaded = load_training_prompts(config.data, chat, ["teacher"], False)
    read = training_prompts(loaded, 8, 3)
    assert len(read.held_out) == 8
    trained = {prompt.ids for prompt in read.stream.next(len(read.stream) * 2)}
    assert len(trained) == 22 and not trained & {prompt.ids for prompt in read.held_out}
    everything = training_prompts(loaded, 0, 3)
    assert len(everything.stream) == 40 and not everything.held_out


def test_evaluation_needs_answers(tmp_path: Path, chat: PromptTokenizer) -> None:
    good = write_jsonl(tmp_path / "math500.jsonl", RECORDS)
    bad = write_jsonl(tmp_path / "bad.jsonl", [*RECORDS, {"prompt": "a"}])
    read = load_evaluation_prompts(config_of(data__evaluation=good).data, chat)
    assert list(read) == ["math500"] and read["math500"].prompts[3].answer == "6"
    config = config_of(data__evaluation={"m": good, "b": bad})
    refused(
        lambda: load_evaluation_prompts(config.data, chat), "bad.jsonl:6 answer", "answer_field"
    )
    for answer in (True, ["b"], " "):
        odd = write_jsonl(tmp_path / "odd.jsonl", [{"prompt": "a", "answer": answer}])
        config = config_of(data__evaluation=odd)
        refused(
            lambda c=config: load_evaluation_prompts(c.data, chat), "odd.jsonl:1 answer", "or a num"
        )
        assert prompts_at(odd, config_of(), chat).prompts[0].answer is None
    rewarded = config_of(objective__task_reward_weight=1.0, rollout__samples_per_prompt=2)
    refused(lambda: prompts_at(bad, rewarded, chat), "bad.jsonl:6 answer")
    assert evaluation_paths("HuggingFaceH4/MATH-500") == {"MATH-500": "HuggingFaceH4/MATH-500"}
    assert evaluation_paths(None) == {}


def test_teacher_by_record(tmp_path: Path, chat: PromptTokenizer) -> None:
    teachers = {"m": {"path": "a/b"}, "c": {"path": "a/c"}}
    config = config_of(teacher=None, teachers=teachers, data__teacher_field="domain")
    records = [{"prompt": "a", "domain": "m"}, {"prompt": "b", "domain": "c"}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    prompts = prompts_at(path, config, chat).prompts
    assert [prompt.teacher for prompt in prompts] == ["teachers.m", "teachers.c"]
    path = write_jsonl(tmp_path / "b.jsonl", [*records, {"prompt": "b", "domain": "x"}])
    refused(lambda: prompts_at(path, config, chat), "b.jsonl:3 domain", "'x'", "m, c")
    alone = config_of(teacher=None, teachers={"m": {"path": "a/b"}})
    assert prompts_at(path, alone, chat).prompts[2].teacher == "teachers.m"


class TestResponses:
    """Ready responses as rollouts that no engine sampled."""

    def load(self, tmp_path: Path, chat: PromptTokenizer, *records: Any, context: int = 128) -> Any:
        path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "Hi", **record} for record in records])
        fixed = {"objective__prefix": "dataset", "curriculum__kind": "fixed"}
        config = config_of(data__responses=path, **fixed)
        return load_responses(
            config.data, chat, list(config.named_teachers), (ENDOFTEXT, IM_END), context
        )

    def test_text_and_ids(self, tmp_path: Path, chat: PromptTokenizer) -> None:
        records = [
            {"response": "ab"},
            {"response": "ab", "finish_reason": "length"},
            {"response": "ab<|endoftext|>"},
            {"response": ""},
            {"response_ids": [64, 65, ENDOFTEXT]},
            {"response_ids": [64, 65]},
            {"prompt": "x" * 65, "response": "a"},
        ]
        read = self.load(tmp_path, chat, *records)
        a, b = chat.encoded_response("ab")
        expected = [
            ((a, b, IM_END), "stop"),
            ((a, b), "length"),
            ((a, b, ENDOFTEXT), "stop"),
            ((IM_END,), "stop"),
            ((64, 65, ENDOFTEXT), "stop"),
            ((64, 65), "length"),
        ]
        assert [(r.response_ids, r.finish_reason) for r in read.rollouts] == expected
        assert read.num_too_long == 1
        first = read.rollouts[0]
        assert first.rollout_logprobs is None and first.policy_version == -1
        assert first.prompt.ids == tuple(chat.encoded([chat.rendered("Hi", "x")])[0])

    @pytest.mark.parametrize(
        ("record", "words"),
        [
            ({}, ["r.jsonl:1 response", "no such field"]),
            ({"response": 3}, ["r.jsonl:1 response", "got 3"]),
            ({"response": "", "finish_reason": "length"}, ["r.jsonl:1 response", "no tokens"]),
            ({"response": "a", "finish_reason": "eos"}, ["r.jsonl:1 finish_reason", "'eos'"]),
            ({"response_ids": []}, ["r.jsonl:1 response_ids"]),
            ({"response_ids": [1, -1]}, ["r.jsonl:1 response_ids"]),
            ({"response_ids": [1, 259]}, ["r.jsonl:1 response_ids", "below 259"]),
            ({"response_ids": [True]}, ["r.jsonl:1 response_ids"]),
            ({"response_ids": "ab"}, ["r.jsonl:1 response_ids"]),
            ({"response": "a" * 100}, ["r.jsonl:1", "101 response tokens", "at most 128"]),
            (
                {"response": "a", "prompt_ids": [1, 2]},
                ["r.jsonl:1 prompt_ids", "2 ids that are not", "chat template"],
            ),
            ({"response": "a", "prompt_ids": "x"}, ["r.jsonl:1 prompt_ids", "no list of ids"]),
        ],
    )
    def test_bad_ones_are_named(
        self, record: Any, words: list[str], tmp_path: Path, chat: PromptTokenizer
    ) -> None:
        refused(lambda: self.load(tmp_path, chat, record), *words)

    def test_prompt_ids_of_the_same_rendering_pass(
        self, tmp_path: Path, chat: PromptTokenizer
    ) -> None:
        ids = chat.encoded([chat.rendered("Hi", "x")])[0]
        record = {"response_ids": [64, 65], "prompt_ids": ids}
        assert self.load(tmp_path, chat, record).rollouts[0].prompt.ids == tuple(ids)

    def test_shortened(self, tmp_path: Path, chat: PromptTokenizer) -> None:
        rollout = self.load(tmp_path, chat, {"response": "abcd"}).rollouts[0]
        cut = shortened(rollout, 3)
        assert cut.response_ids == rollout.response_ids[:3] and cut.finish_reason == "length"
        assert shortened(rollout, 5) is rollout


ODD = [None, True, 0, -1, 1.5, "", " ", "x", [], [1], ["x"], [[]], {}, {"role": 1}, [{}], [None]]
ODD += ["\u0000", "\U0001f600" * 40, 10**400, "teachers.m", [10**30], [{"role": "", "content": ""}]]


def test_whatever_a_field_holds_it_loads_or_is_refused(
    tmp_path: Path, chat: PromptTokenizer
) -> None:
    good = {"prompt": "a", "answer": "1", "domain": "m", "response": "b"}
    fields = [*good, "response_ids", "finish_reason"]
    teachers = {"m": {"path": "a/b"}, "c": {"path": "a/c"}}
    outcomes = {"loaded": 0, "refused": 0}
    for field in fields:
        for odd in ODD:
            path = write_jsonl(tmp_path / "a.jsonl", [{**good, field: odd}])
            config = config_of(
                teacher=None,
                teachers=teachers,
                data__teacher_field="domain",
                data__responses=path,
                objective__prefix="dataset",
                curriculum__kind="fixed",
                data__evaluation=path,
            )
            for load in (
                lambda c=config: load_evaluation_prompts(c.data, chat),
                lambda c=config: load_responses(
                    c.data, chat, list(c.named_teachers), (IM_END,), 64
                ),
            ):
                try:
                    load()
                    outcomes["loaded"] += 1
                except UserError as error:
                    outcomes["refused"] += 1
                    assert "\n" not in str(error) and str(error).isascii()
    assert outcomes["loaded"] > 50 and outcomes["refused"] > 100, outcomes
