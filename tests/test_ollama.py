"""The Modelfile of a GGUF file: its Go template renders what the chat template does.

The normal tests read the template by a few lines of Python. Go itself runs it where MINISFT_GO names a go binary
(`MINISFT_GO=PATH pytest -m slow tests/test_ollama.py`), in ollama_prompts.go, which has Ollama's rules.
"""

import ast
import json
import os
import random
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from minisft.data.chat.template import ChatTemplate
from minisft.ollama import TEXTS, assembled, changed, fronts, go_template, modelfile, rendered

PATHS = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
TOKENS = (("bos_token", "<s>"), ("eos_token", "</s>"))
TEMPLATES = {path.stem: ChatTemplate(path.read_text(), TOKENS) for path in PATHS}
NO_FORM = ("mistral",)  # whose system text goes into the last question
# first a rule that Ollama's own templates have too, then what a template may print that Go or a Modelfile reads otherwise
SHORT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TEMPLATES["no generation prompt"] = ChatTemplate(SHORT)
TEMPLATES["braces"] = ChatTemplate(
    "{% for m in messages %}{{ '{{{\"' + m.role + '\": {' + m.content + '}}' }}{% endfor %}"
)
TEMPLATES["marks"] = ChatTemplate(
    "{% for m in messages %}{{ '\"\"\"\\u00a0\\u200b{{- \\\\n`%s' + m.role + '\\t{{/*' + m.content }}{% endfor %}"
)
CONTENTS = [
    "a",
    "two\n\nlines\tand a tab",
    "\"quoted\" 'so' `and` \\n so",
    "{{ .Role }} }} {% x %} {{ end }}",
    "\u65e5\u672c \u00e9 \U0001f642 \u00a0\u200b\ufeff",
    "<|im_end|></s><b>&amp;",
]
ROLES = ["u", "su", "uau", "suau", "suauau", "uu", "suuaau", "sus"]
RARE = ["au", "sau", "s", "usu", "uasu"]  # which a template may refuse
NAMES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def chats(roles: str, contents: list[str] = CONTENTS) -> list[list[tuple[str, str]]]:
    """Chats of (role, content): with one content throughout, and with all of them in turn."""
    same = [[(NAMES[role], content) for role in roles] for content in contents]
    return [*same, [(NAMES[role], contents[i % len(contents)]) for i, role in enumerate(roles)]]


def joined(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Ollama joins turns of one role."""
    found: list[tuple[str, str]] = []
    for role, content in turns:
        if found and found[-1][0] == role:
            found[-1] = role, f"{found[-1][1]}\n\n{content}"
        else:
            found.append((role, content))
    return found


def read_in_python(template: str, turns: list[tuple[str, str]]) -> str:
    """What Go makes of the few actions that go_template writes. Raises LookupError where Go ends in an error."""
    pieces = re.split(r"\{\{ (.*?) \}\}", template, flags=re.DOTALL)  # text, action, text, ...
    out, scope = [], {"$last": "", ".Role": "", ".Content": ""}

    def holds(test: str) -> bool:
        relation, name, *values = shlex.split(test)
        return (scope[name] in values) == (relation == "eq")

    def run(i: int, live: bool) -> tuple[int, str]:
        """Run up to the action that ends a block: (its place, it)."""
        while True:
            out.append(pieces[i] if live else "")
            if i + 1 == len(pieces):
                return i, ""
            i, action = i + 2, pieces[i + 1]
            word, _, rest = action.partition(" ")
            if word in ("else", "end"):
                return i, action
            if word == "range":
                for scope[".Role"], scope[".Content"] in turns:
                    after, _ = run(i, live)
                i = after
            elif word == "if":
                done = False
                while action != "end":
                    now = (
                        live
                        and not done
                        and (action == "else" or holds(action.removeprefix("else ").removeprefix("if ")))
                    )
                    done = done or now
                    i, action = run(i, now)
            elif live and word == "template":
                raise LookupError(rest)
            elif live and word == "$last":
                scope["$last"] = "" if rest == ':= ""' else scope[".Role"]
            elif live:
                out.append(scope[".Content"] if word == ".Content" else ast.literal_eval(action))

    run(0, True)
    return "".join(out)


def expected_of(template: ChatTemplate, turns: list[tuple[str, str]]) -> str | None:
    """The prompt by Jinja. An answer at the end is continued, so that there is nothing after it; None if it is refused."""
    if turns[-1][0] != "assistant":
        return rendered(template, turns)
    longer = rendered(template, [*turns, ("user", "the END")])
    end = (fronts(template) or {})["assistant", "user"] + "the END"
    return None if longer is None else longer.partition(end)[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_renders_what_the_chat_template_does(name):
    template = TEMPLATES[name]
    before = fronts(template)
    assert (before is None) == (name in NO_FORM)
    if before is None:
        return
    for bos in ("", "<s>"):
        found = go_template(before, bos)
        for turns in [joined(chat) for roles in (*ROLES, *RARE) for chat in chats(roles, CONTENTS[:2])]:
            expected = expected_of(template, turns)
            if expected is not None:
                assert read_in_python(found, turns) == expected.removeprefix(bos)


def test_turns_that_the_chat_template_does_not_take_are_refused_and_a_cut_chat_is_not():
    before = fronts(TEMPLATES["gemma"])
    found = go_template(before)
    for turns in chats("su", ["a"]) + chats("utu", ["a"]):
        with pytest.raises(LookupError, match="takes no such turn"):
            read_in_python(found, turns)
    cut = [("assistant", "a"), ("user", "b")]
    assert rendered(TEMPLATES["gemma"], cut) is None
    assert read_in_python(found, cut) == assembled(before, [("user", ""), *cut])


def test_a_system_text_in_the_last_question_has_no_form_and_a_date_has_none():
    assert fronts(TEMPLATES["mistral"]) is None
    assert fronts(ChatTemplate(SHORT + "{{ strftime_now('%Y') }}", (), "2026-01-31")) is None


@pytest.mark.parametrize(
    "text, kinds",
    [
        ("{{ m.content }}", []),
        ("{{ m.content | trim }}", ["begin or end with white space"]),
        ("{{ m.content or 'nothing' }}", ["are empty"]),
        ("{{ m.content.split('</think>')[-1] }}", ["have </think> in them"]),
    ],
)
def test_texts_that_the_chat_template_changes_are_told(text, kinds):
    template = ChatTemplate("{% for m in messages %}[{{ m.role }}]" + text + "{% endfor %}")
    assert changed(template, fronts(template)) == kinds
    _, lines = modelfile("m.gguf", template, "", [], {})
    assert len(lines) == len(kinds) and all(kind in line for kind, line in zip(kinds, lines))


def test_a_modelfile_stops_where_the_model_does():
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True}
    text, lines = modelfile("m.gguf", None, "", ['<|"end"|>', "</s>", "a\u00a0b"], sampling)
    assert text.splitlines() == [
        "FROM ./m.gguf",
        'PARAMETER stop """<|"end"|>"""',
        'PARAMETER stop "</s>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_k 20",
    ]
    assert len(lines) == 1 and "no stop 'a\\xa0b'" in lines[0]


# ---------------------------------------------------------------- Go


@pytest.fixture(scope="session")
def go(tmp_path_factory):
    """jobs -> answers of ollama_prompts.go."""
    if not (path := os.environ.get("MINISFT_GO")):
        pytest.skip("MINISFT_GO names no go binary")
    folder = tmp_path_factory.mktemp("go")
    own = {
        "GOCACHE": str(folder / "cache"),
        "GOPATH": str(folder / "path"),
        "GOTOOLCHAIN": "local",
        "GO111MODULE": "off",
    }
    source, program = Path(__file__).with_name("ollama_prompts.go"), folder / "prompts"
    subprocess.run([path, "build", "-o", str(program), str(source)], env=os.environ | own, check=True)

    def run(jobs: list[dict]) -> list[dict]:
        done = subprocess.run([str(program)], input=json.dumps(jobs).encode(), stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    return run


def as_messages(turns: list[tuple[str, str]]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.slow
@pytest.mark.parametrize("bos", ["", "<s>"])
def test_go_renders_what_the_chat_template_does(bos, go):
    """Byte by byte, every template and chat; where the chat template refuses one, Go ends in an error or the chat was cut."""
    templates = {name: template for name, template in TEMPLATES.items() if name not in NO_FORM}
    texts = [chat for roles in (*ROLES, *RARE, "ua", "utu") for chat in chats(roles)]
    odd = {kind: chats("suauau", [text])[0] for kind, text in TEXTS.items()}
    jobs = [
        {
            "modelfile": modelfile("m.gguf", template, bos, [], {})[0],
            "chats": [*map(as_messages, [*texts, *odd.values()])],
        }
        for template in templates.values()
    ]
    for (name, template), answer in zip(templates.items(), go(jobs)):
        kinds, prompts = changed(template, fronts(template)), answer["prompts"]
        for turns, prompt in zip(texts, prompts):
            expected = expected_of(template, joined(turns)) if "tool" not in dict(turns) else None
            if expected is None:
                is_cut = next((role for role, _ in turns if role != "system"), "") == "assistant"
                assert is_cut or "takes no such turn" in prompt["error"]
            else:
                assert not prompt["error"] and prompt["text"] == expected.removeprefix(bos), name
        for (kind, turns), prompt in zip(odd.items(), prompts[len(texts) :]):
            expected = rendered(template, turns)
            if expected is not None:
                assert (prompt["text"] == expected.removeprefix(bos)) == (kind not in kinds), (name, kind)


@pytest.mark.slow
def test_go_reads_every_text_that_a_template_may_print_and_every_stop(go):
    draw = random.Random(0)
    parts = [
        "{",
        "}",
        "{{",
        "}}",
        "{{- ",
        " -}}",
        '"',
        '""',
        "\\",
        "`",
        "%s",
        "\n",
        "\t",
        " ",
        "a",
        "\u00e9",
        "\U0001f642",
        "/*",
        "*/",
        "#",
    ]
    parts += ["\u00a0", "\u200b", "\r", "\x00", "\u3000", "\U000e0001", "\ue000", "TEMPLATE ", "$last", "."]
    turns, jobs, expected = chats("suauau", ["{{", "b"])[2], [], []
    for _ in range(300):
        before = {key: "".join(draw.choices(parts, k=draw.randrange(8))) for key in fronts(TEMPLATES["chatml"])}
        stops = ["".join(draw.choices([p for p in parts if p.isprintable()], k=draw.randrange(1, 6))) for _ in range(3)]
        _, *lines = modelfile("m.gguf", None, "", stops, {})[0].splitlines(keepends=True)
        text = f'FROM ./m.gguf\nTEMPLATE """{go_template(before)}"""\n' + "".join(lines)
        jobs.append({"modelfile": text, "chats": [as_messages(turns)]})
        expected.append((assembled(before, turns), stops))
    for answer, (text, stops) in zip(go(jobs), expected):
        assert answer["prompts"] == [{"text": text, "error": ""}]
        assert [value for name, value in answer["values"] if name == "stop"] == stops
