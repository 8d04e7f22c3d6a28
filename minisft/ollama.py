"""The Modelfile beside a GGUF file, from which `ollama create NAME -f Modelfile` makes a model.

Ollama does not run the chat template in the file. It has a template of its own, a Go program. A chat is a sequence of turns, so
what a template puts before each turn depends on that turn and the one before it, in nearly all templates. These texts are
taken from renderings of the template; if they do not give its other renderings, no TEMPLATE is written.
"""

import json

from minisft.data.chat.template import ChatTemplate, render
from minisft.data.rows import RowError

SYSTEM, USER, ASSISTANT = "a SYSTEM text", "a USER text", "an ASSISTANT text"  # no template has them
TURNS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
PROBES = (["user"], ["system", "user"], ["user", "assistant", "user"], ["system", *["user", "assistant"] * 2, "user"])
SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}
OLLAMA_NAMES = {"repetition_penalty": "repeat_penalty"}


def modelfile(
    file: str, template: ChatTemplate | None, bos: str, stops: list[str], sampling: dict
) -> tuple[str, list[str]]:
    """(the text of a Modelfile, lines for the user)

    file: the name of the GGUF file beside it. bos: the text of the token that Ollama puts in front itself, or "". stops: the
    texts of the tokens that end an answer. sampling: generation_config.json, whose usual options of sampling are kept.
    """
    text, lines = [f"FROM ./{file}"], []
    found = None if template is None else go_template(template, bos)
    if found is not None:
        text.append(f'TEMPLATE """{found}"""')
    elif template is not None:
        lines.append("the chat template has no form that Ollama reads: set TEMPLATE in the Modelfile")
        text.append("# TEMPLATE: the chat template is in the GGUF file; it has no form that Ollama reads")
    text += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    for name, kind in SAMPLING.items():
        value = sampling.get(name)
        if type(value) in (int, float) and value == kind(value):
            text.append(f"PARAMETER {OLLAMA_NAMES.get(name, name)} {value}")
    return "\n".join(text) + "\n", lines


def go_template(template: ChatTemplate, bos: str = "") -> str | None:
    """A Go template that renders chats of system, user and assistant as `template` does; None if there is none of this form.

    The content of turns goes in as it is: a chat template may trim it.
    """
    if "strftime_now" in template.text:  # its date would be that of today for ever
        return None
    before = fronts(template)
    if before is None:
        return None
    if any('"""' in text for text in before.values()):
        return None
    before = {key: _escaped(text.removeprefix(bos) if key[0] == "" else text) for key, text in before.items()}
    parts = []
    for role in ("system", "user", "assistant"):
        choices = {last: text for (last, now), text in before.items() if now == role}
        if choices:
            parts.append(f'{{{{ if eq .Role "{role}" }}}}{_choice(choices)}{{{{ .Content }}}}{{{{ end }}}}')
    turns = "".join(parts) + "{{ $last = .Role }}"
    prompt = f'{{{{ if ne $last "assistant" }}}}{before["user", ""]}{{{{ end }}}}'
    return f'{{{{ $last := "" }}}}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{prompt}'


def fronts(template: ChatTemplate) -> dict[tuple[str, str], str] | None:
    """{(role of the turn before, role): the text in front of its content}, "" for the start and for the end of a prompt. None if
    such texts do not make up the template's renderings."""
    before: dict[tuple[str, str], str] = {}
    for roles in PROBES:
        try:
            rest = render(template, [{"role": r, "content": TURNS[r]} for r in roles], add_generation_prompt=True)
        except RowError:
            if "system" in roles:  # a template may take no system turn
                continue
            return None
        last = ""
        for role in [*roles, ""]:
            text, found, rest = rest.partition(TURNS[role]) if role else (rest, "end", "")
            if not found or before.setdefault((last, role), text) != text:
                return None
            last = role
    return before


def _choice(choices: dict[str, str]) -> str:
    """The text that follows the turn before."""
    if len(choices) == 1:
        return next(iter(choices.values()))
    *firsts, (_, otherwise) = choices.items()
    tests = [
        f'{{{{ {"if" if i == 0 else "else if"} eq $last "{last}" }}}}{text}' for i, (last, text) in enumerate(firsts)
    ]
    return "".join(tests) + f"{{{{ else }}}}{otherwise}{{{{ end }}}}"


def _escaped(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')
