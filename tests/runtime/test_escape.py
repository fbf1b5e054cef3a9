"""Texts of strangers, escaped for the place where they go."""

from __future__ import annotations

import json
import shlex

import pytest

from hf_locstitch.runtime.escape import (
    cell,
    code,
    fenced,
    figure,
    in_json,
    line,
    link,
    markdown,
    python,
    shell,
    terminal,
)

ESC = "\x1b[2J\x1b]8;;http://evil\x07"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("density 1.5 % of ‖τ‖, +0.3", "density 1.5 % of ‖τ‖, +0.3"),
        ("# head", r"\# head"),
        ("x\n# head", "x # head"),
        ("1. item", r"1\. item"),
        ("- item", r"\- item"),
        ("<img src=x onerror=y>", "&lt;img src=x onerror=y&gt;"),
        ("&lt;b&gt; & c", "&amp;lt;b&amp;gt; & c"),
        ("![a](b)", r"!\[a\](b)"),
        ("*a* _b_ `c` ~~d~~ $e$ f|g \\", r"\*a\* \_b\_ \`c\` \~\~d\~\~ \$e\$ f\|g \\"),
        ("see https://evil.org and www.evil.org", r"see https\://evil.org and www\.evil.org"),
        ("\x1b[31m\u202e", r"\\x1b\[31m\\u202e"),
    ],
)
def test_markdown(text: str, escaped: str) -> None:
    assert markdown(text) == escaped
    assert markdown(markdown(text)) == escaped  # once


def test_pieces_of_code() -> None:
    assert code("a_b") == "`a_b`" and code("a`b|c\nd") == "``a`b\\|c d``" and code("`a") == "`` `a ``"
    assert link("a]b", "https://x/a b)c") == r"[a\]b](https://x/a%20b%29c)"
    assert shlex.split(shell("./a b; rm -rf ~\n```")) == ["./a b; rm -rf ~ ```"]
    assert shell("org/name@a1") == "org/name@a1"
    assert python('a"b\x1b') == '"a\\"b\\u001b"' and python("größe") == '"größe"'


def test_terminal() -> None:
    assert line(f"a{ESC}b\r\nc\u202e\x9b") == r"a\x1b[2J\x1b]8;;http://evil\x07b c\u202e\x9b"
    assert terminal("a\n\x1bb\ud800") == "a\n\\x1bb\\ud800"
    assert line("‖τ‖ 12\u00a0% größe 模型") == "‖τ‖ 12\u00a0% größe 模型"


def test_cells_and_figures() -> None:
    assert [cell(text) for text in ("=1+1", "+a", "-a", "@a", "\ta", "a=b")] == [
        "'=1+1", "'+a", "'-a", "'@a", "'\ta", "a=b"
    ]  # fmt: skip
    assert figure("$x_{$ \x1b") == r"\$x_{\$ \x1b"


def test_json_for_a_terminal() -> None:
    nasty = {f"a{ESC}\x7f\x9b\u202e": ["größe"]}
    assert in_json(nasty).isascii() and all(c.isprintable() or c == "\n" for c in in_json(nasty))
    assert json.loads(in_json(nasty)) == nasty


def test_a_block_of_code_ends_where_it_should() -> None:
    assert fenced("a: 1\n", "yaml") == "```yaml\na: 1\n```"
    text = "a: x\n   ````\n# head \x1b[2J"
    assert fenced(text, "yaml") == f"`````yaml\n{terminal(text)}\n`````" and "\x1b" not in fenced(text, "yaml")
