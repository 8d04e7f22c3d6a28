"""The Modelfile beside a GGUF file, from which `ollama create NAME -f Modelfile` makes a model.

Ollama makes prompts by a Go template. A chat is a sequence of turns, so what a template puts before each turn depends on that
turn and the one before it, in nearly all templates. These texts are taken from renderings of the chat template; if they do not
give its other renderings, no TEMPLATE is written. What Ollama does with it, and how it reads a Modelfile, is in its source
(template/template.go, server/prompt.go and parser/parser.go of github.com/ollama/ollama, August 2026). In short:

    turns of one role in a row are joined, with a blank line between them
    a chat that is too long for the context loses its oldest turns, system turns excepted, and may then begin with an answer
    a Modelfile loses characters that are not printable, and a value in quotes has no escapes
"""

import json
import re

from minisft.data.chat.template import ChatTemplate, render
from minisft.data.rows import RowError

TURNS = {"system": "a SYSTEM text", "user": "a USER text", "assistant": "an ASSISTANT text"}  # no template has them
PROBES = (["user"], ["system", "user"], ["user", "assistant", "user"], ["system", *["user", "assistant"] * 2, "user"])
RARE_PROBES = (  # chats that a template may refuse, or render in a way of their own
    ["assistant", "user"],
    ["system", "assistant", "user"],
    ["system"],
    ["user", "system", "user"],
    ["user", "assistant", "system", "user"],
)
TEXTS = {
    "begin or end with white space": " a \n",
    "are empty": "",
    "have </think> in them": "<think>\na\n</think>\n\nb",
}
NO_SUCH_TURN = '{{ template "the chat template takes no such turn here" . }}'  # what Go does not find ends in an error
SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}
OLLAMA_NAMES = {"repetition_penalty": "repeat_penalty"}
Fronts = dict[tuple[str, str], str]


def modelfile(
    file: str, template: ChatTemplate | None, bos: str, stops: list[str], sampling: dict
) -> tuple[str, list[str]]:
    """(the text of a Modelfile, lines for the user)

    file: the name of the GGUF file beside it. bos: the text of the token that Ollama puts in front itself, or "". stops: the
    texts of the tokens that end an answer. sampling: generation_config.json, whose usual options of sampling are kept.
    """
    text, lines = [f"FROM ./{file}"], []
    before = None if template is None else fronts(template)
    if template is not None and before is not None:
        text.append(f'TEMPLATE """{go_template(before, bos)}"""')
        lines += [
            f"the chat template changes texts of turns that {kind}; Ollama does not"
            for kind in changed(template, before)
        ]
    elif template is not None:
        lines.append(
            "the chat template has no form in Go: Ollama runs the one in the GGUF file if it can; older releases need TEMPLATE"
        )
        text.append("# TEMPLATE: the chat template is in the GGUF file; it has no form in Go")
    for stop in stops:
        if stop.isprintable():
            text.append(f"PARAMETER stop {quoted(stop)}")
        else:
            lines.append(f"the Modelfile has no stop {stop!r}: Ollama would read another text")
    for name, kind in SAMPLING.items():
        value = sampling.get(name)
        if type(value) in (int, float) and value == kind(value):
            text.append(f"PARAMETER {OLLAMA_NAMES.get(name, name)} {value}")
    return "\n".join(text) + "\n", lines


# ---- what a chat template puts in front of a turn -----------------------------------------------------------------


def fronts(template: ChatTemplate) -> Fronts | None:
    """{(role of the turn before, role): the text in front of its content}, "" for the start and for the end of a prompt. None if
    such texts do not make up the template's renderings."""
    if "strftime_now" in template.text:  # its date would be that of today for ever
        return None
    before: Fronts = {}
    for roles in PROBES:
        text = rendered(template, [(role, TURNS[role]) for role in roles])
        if text is None and "system" in roles:  # a template may take no system turn
            continue
        found = None if text is None else pieces(text, roles)
        if found is None or not agrees(found, before):
            return None
        before |= found
    for roles in RARE_PROBES:
        text = rendered(template, [(role, TURNS[role]) for role in roles])
        found = None if text is None else pieces(text, roles)
        if found is not None and agrees(found, before):
            before |= found
    return before


def rendered(template: ChatTemplate, turns: list[tuple[str, str]]) -> str | None:
    """The prompt of a chat of (role, content); None if the template refuses it."""
    try:
        return render(template, [{"role": r, "content": c} for r, c in turns], add_generation_prompt=True)
    except RowError:
        return None


def pieces(text: str, roles: list[str]) -> Fronts | None:
    """What is between the turns of one prompt. None if it does not show them one after the other, each as it is."""
    found, last, rest = {}, "", text
    for role in roles:
        front, content, rest = rest.partition(TURNS[role])
        if not content or found.setdefault((last, role), front) != front:
            return None
        last = role
    found[last, ""] = rest
    return None if any(content in front for front in found.values() for content in TURNS.values()) else found


def agrees(found: Fronts, before: Fronts) -> bool:
    return all(before.get(turn, text) == text for turn, text in found.items())


def changed(template: ChatTemplate, before: Fronts) -> list[str]:
    """Of which texts the template makes others: names of TEXTS."""
    roles = ["system", "user", "assistant", "user"][("", "system") not in before :]
    chats = {kind: [(role, content) for role in roles] for kind, content in TEXTS.items()}
    return [kind for kind, chat in chats.items() if rendered(template, chat) != assembled(before, chat)]


def assembled(before: Fronts, turns: list[tuple[str, str]]) -> str:
    """A chat of (role, content) as Ollama renders it, from the texts in front of its turns."""
    parts, last = [], ""
    for role, content in turns:
        parts += [before[last, role], content]
        last = role
    return "".join(parts) + before[last, ""]


# ---- Go -----------------------------------------------------------------------------------------------------------


def go_template(before: Fronts, bos: str = "") -> str:
    """A Go template of these texts. The content of turns goes in as it is. It ends in an error at a turn that the chat template
    does not take, except an answer at the start, which gets an empty question: Ollama itself may cut a chat there.
    """
    before = {
        ("", ""): "",
        ("", "assistant"): before["", "user"] + before["user", "assistant"],
        ("system", "assistant"): before.get(("system", "user"), "") + before["user", "assistant"],
    } | before
    before = {key: escaped(text.removeprefix(bos) if key[0] == "" else text) for key, text in before.items()}
    fronts_of = {now: {last: text for (last, role), text in before.items() if role == now} for now in (*TURNS, "")}
    turns = {role: cases("$last", texts) + do(".Content") for role, texts in fronts_of.items() if role and texts}
    turn = cases(".Role", turns) + do("$last = .Role")
    prompt = do('if ne $last "assistant"') + cases("$last", fronts_of[""]) + do("end")
    return do('$last := ""') + do("range .Messages") + turn + do("end") + prompt


def cases(value: str, texts: dict[str, str]) -> str:
    """The text whose name is the value; an error if there is none."""
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(f'"{name}"')
    tests = [
        do(f"{'else if' if i else 'if'} eq {value} {' '.join(names[text])}") + text for i, text in enumerate(names)
    ]
    return "".join(tests) + do("else") + NO_SUCH_TURN + do("end")


def do(action: str) -> str:
    return "{{ " + action + " }}"


def escaped(text: str) -> str:
    """As text of a Go template between three quotes: braces would begin an action."""
    text = re.sub(r'\{+|"{3,}', lambda found: do(json.dumps(found[0])), text)
    return "".join(c if c in "\n\t" or c.isprintable() else do(f'"\\U{ord(c):08x}"') for c in text)


def quoted(text: str) -> str:
    """A text of one line as a value of a Modelfile."""
    return f'"""{text}"""' if '"' in text else f'"{text}"'
