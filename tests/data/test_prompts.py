import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from cmd_jax.data.prompts import Prompt, check_prompt, read_prompts
from cmd_jax.errors import UserError

UCF101 = Path(__file__).parents[2] / "configs" / "prompts" / "ucf101.csv"


@pytest.fixture
def put(tmp_path):
    """put("a.txt", text or bytes or object) -> the path of that file."""

    def put(name, content):
        content = content if isinstance(content, (str, bytes)) else json.dumps(content)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    return put


def refused(path, match, seed=0):
    with pytest.raises(UserError, match=match) as error:
        read_prompts(path, seed)
    assert error.value.field == "sampling.prompts_file"
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# One prompt


@pytest.mark.parametrize(
    "text",
    [
        "a red fox",
        "a dog\truns\r\nalong a beach",
        "👩‍🚀 on the 🌙",  # with a zero-width joiner
        "\u202bكلب يركض على الشاطئ\u202c",
        "\u200fכלב רץ\u200e",
        "e\u0301 \ufffd \U0010ffff",
        pytest.param("a" * 10_000, id="long"),
    ],
)
def test_prompts_that_can_be_drawn_are_kept_as_they_are(text):
    assert check_prompt(text) == text
    assert check_prompt(f" \n{text}\t ") == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "sampling.prompt=: empty; say what to draw"),
        (" \t\n", "sampling.prompt=: empty; say what to draw"),
        ("\u200b\u200f ", "empty; say what to draw"),  # nothing that anyone could see
        ("a\0b", r"sampling.prompt=a\x00b: character 2 is U+0000, a control character; remove it"),
        (" \x1b[31mred", r"sampling.prompt=\x1b[31mred: character 2 is U+001B, a control character; remove it"),
        ("כלב\x7f", r"sampling.prompt=כלב\x7f: character 4 is U+007F"),
        ("a\x85", "character 2 is U+0085, a control character"),
        ("ab\ud83d", r"sampling.prompt=ab\ud83d: character 3 is U+D83D, half a character (a lone surrogate)"),
    ],
)
def test_prompts_that_cannot_be_drawn_are_refused(text, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        check_prompt(text)
    str(error.value).encode()  # can be printed
    with pytest.raises(UserError, match=r"^sampling\.negative=line 7: "):
        check_prompt(text, "sampling.negative", "line 7")


# Files of many


def test_text_file(put):
    path = put(
        "a.TXT", b"\xef\xbb\xbf# mine\r\n\r\na red fox \r\n  # a note\r\n# \r\n#no\r\nbob, alice # and #eve\r\n\tlast"
    )
    assert read_prompts(path) == [Prompt("a red fox"), Prompt("bob, alice # and #eve"), Prompt("last")]
    assert read_prompts(str(path)) == read_prompts(path)


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        ("prompt", "a fox", ("a fox", "")),
        ("class,prompt", "YoYo,a fox", ("a fox", "YoYo")),
        ("videoid,contentUrl,duration,page_dir,name", "12,u,PT1S,0_1,a fox", ("a fox", "12")),
        ("file_name,text,label", "a/b.mp4,a fox,7", ("a fox", "a/b.mp4")),
        ("name, prompt ", "bob,a fox", ("a fox", "bob")),
        ("key,vid_key,video_id,sentence", "r,m,video7020,a fox", ("a fox", "video7020")),
        ("caption,id,name", '"a ""fox"",\r\nrunning",3,x', ('a "fox",\r\nrunning', "3")),
    ],
)
def test_csv_files(put, header, row, expected):
    path = put("a.csv", "\ufeff" + f"{header}\r\n{row}\r\n\r\n{row}")
    assert read_prompts(path) == [Prompt(*expected)] * 2


def test_webvid_s_list_without_its_title_row(put):
    path = put("a.csv", "12,https://x/12.mp4,PT00H00M09S,0_1,a fox\n13,https://x/13.mp4,PT00H00M09S,,a cat\n")
    assert read_prompts(path) == [("a fox", "12"), ("a cat", "13")]


def test_json_lines(put):
    rows = [{"prompt": "a fox", "id": 3}, {"text": "ein Füchslein", "name": "x"}, {"name": "a\nhen"}]
    path = put("a.jsonl", "\n\n".join(map(json.dumps, rows)))
    assert read_prompts(path) == [Prompt("a fox", "3"), Prompt("ein Füchslein", "x"), Prompt("a\nhen")]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", "", "holds no prompts"),
        ("a.txt", "\n# only a note\n", "holds no prompts"),
        ("a.txt", b"a fox\na h\xffn\n", r"a\.txt line 2: not UTF-8 text"),
        ("a.txt", "a fox".encode("utf-16"), r"a\.txt line 1: not UTF-8 text"),
        ("a.txt", "a fox\n\na\0hen\n", r"a\.txt line 3: character 2 is U\+0000"),
        ("a.doc", "a fox", r"use one of \.txt, \.csv, \.jsonl, \.json"),
        ("noending", "a fox", r"use one of \.txt"),
        ("a.csv", "", "it is empty"),
        ("a.csv", "prompt\n", "holds no prompts"),
        ("a.csv", "words,id\na fox,1\n", r"its columns are words, id, none of them prompt, text"),
        ("a.csv", "prompt,prompt\na fox,b\n", "where prompt is needed once"),
        ("a.csv", "prompt\na fox\na fox, red\n", "line 3: more or fewer fields"),
        ("a.csv", 'prompt\na fox\n"a hen\n', "after line 2: unexpected end"),
        ("a.csv", "id,prompt\n1,a fox\n2,\n", r"a\.csv line 3: empty"),
        ("a.csv", b"prompt\na fox\n\xe4\n", r"line 3: not UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\na fox\n', "line 2: not JSON"),
        ("a.jsonl", '["a fox"]', "line 1: not a JSON object"),
        ("a.jsonl", '{"id": 3}', "line 1: no prompt or text"),
        ("a.jsonl", '{"prompt": ["a"]}', "line 1: prompt is no string"),
        ("a.jsonl", '{"prompt": "a", "id": [1]}', "line 1: id is neither"),
        ("a.jsonl", '{"prompt": "a \\ud83d"}', "line 1: .*half a character"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": " "}', "line 2: empty"),
        pytest.param("a.jsonl", "[" * 100_000, "line 1: not JSON", id="too deep"),
    ],
)
def test_faults_of_prompt_files(put, name, content, match):
    refused(put(name, content), match)


def test_files_that_cannot_be_read(tmp_path):
    refused(tmp_path / "nowhere.txt", r"nowhere\.txt: cannot be read \(No such file")
    (tmp_path / "folder.csv").mkdir()
    refused(tmp_path / "folder.csv", "not a regular file")
    os.mkfifo(tmp_path / "pipe.jsonl")  # nobody writes to it
    refused(tmp_path / "pipe.jsonl", "not a regular file")


# MSR-VTT


def msrvtt(videos=40, captions=20):
    """Videos of which two thirds are test videos, with captions that differ."""
    ids = [f"video{i}" for i in range(videos)]
    sentences = [
        {"sen_id": i * captions + k, "video_id": video, "caption": f"{video} caption {k}"}
        for i, video in enumerate(ids)
        for k in range(captions)
    ]
    splits = ("test", "train", "test")
    return {
        "info": {},
        "videos": [{"video_id": video, "split": splits[i % 3], "category": 1} for i, video in enumerate(ids)],
        "sentences": sentences,
    }


def test_msrvtt_gives_one_caption_a_test_video(put):
    path = put("test_videodatainfo.json", msrvtt())
    prompts = read_prompts(path)
    assert [p.name for p in prompts] == [f"video{i}" for i in range(40) if i % 3 != 1]
    assert all(p.text.startswith(f"{p.name} caption ") for p in prompts)
    chosen = Counter(p.text.split()[-1] for p in prompts)
    assert len(chosen) > 8  # not always the same one
    assert read_prompts(path, 0) == prompts
    assert sum(a != b for a, b in zip(read_prompts(path, 1), prompts, strict=True)) > 20


def test_msrvtt_draws_by_seed_and_video_alone(put):
    content = msrvtt()
    expected = {p.name: p.text for p in read_prompts(put("a.json", content), 5)}
    content["sentences"].reverse()
    content["videos"] = content["videos"][::-2]
    got = read_prompts(put("b.json", content), 5)
    assert len(got) == 13
    assert all(expected[p.name] == p.text for p in got)


def changed(**changes):
    return {**msrvtt(4, 2), **changes}


TEST_VIDEO = {"video_id": "v", "split": "test"}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "not readable as JSON"),
        ("{", "not readable as JSON"),
        pytest.param("[" * 100_000, "nested too deep", id="too deep"),
        ([], r"it is \[\], not an object"),
        ({"videos": []}, "it lacks sentences; give MSR-VTT's"),
        (changed(videos=[{"video_id": "v"}]), r"videos\[0\] lacks split"),
        (changed(videos=[{"video_id": 3, "split": "test"}]), r"videos\[0\].video_id is 3, not a text"),
        (changed(sentences=[{"video_id": "v", "caption": None}]), r"sentences\[0\].caption is null, not a text"),
        (changed(videos=[]), r"no videos of the split test \(none at all\)"),
        (changed(videos=[TEST_VIDEO | {"split": "train"}]), r"no videos of the split test \(1 of train\)"),
        (changed(videos=[TEST_VIDEO]), "has no captions of v;"),
        (changed(videos=msrvtt(4)["videos"] * 2), "lists video0 more than once"),
        (changed(sentences=[{"video_id": f"video{i}", "caption": " "} for i in range(4)]), "video video0: empty"),
        (changed(sentences=[{"video_id": f"video{i}", "caption": "\ud800"} for i in range(4)]), "lone surrogate"),
    ],
)
def test_faults_of_msrvtt(put, content, match):
    refused(put("a.json", content), match)


# Our own prompts for UCF-101

SPELT_OTHERWISE = {"Skijet": ("jet", "ski")}


def test_ucf101_has_a_prompt_of_our_own_for_each_class():
    prompts = read_prompts(UCF101)
    names = [p.name for p in prompts]
    assert UCF101.read_text().startswith("class,prompt\nApplyEyeMakeup,")
    assert len(set(names)) == len({p.text for p in prompts}) == len(prompts) == 101
    assert names == sorted(names, key=str.lower)  # the order of classInd.txt
    assert (names[0], names[36], names[80], names[-1]) == ("ApplyEyeMakeup", "HandstandPushups", "Skiing", "YoYo")
    assert all(re.fullmatch("([A-Z][a-z]+)+", name) for name in names)


@pytest.mark.parametrize("prompt", read_prompts(UCF101), ids=lambda p: p.name)
def test_a_ucf101_prompt_is_a_sentence_about_its_class(prompt):
    assert 5 <= len(prompt.text.split()) <= 20
    assert re.fullmatch(r"[A-Z].*[a-z]\.", prompt.text)
    letters = re.sub("[^a-z]", "", prompt.text.lower())
    for word in SPELT_OTHERWISE.get(prompt.name) or re.findall("[A-Z][a-z]*", prompt.name):
        assert re.sub("(ing|s)$", "", word.lower()) in letters


def test_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match="a.txt: not a regular file; give a file with text"):
        read_prompts(tmp_path / "a.txt")
