import io
from html.parser import HTMLParser

from helpers.data_rows import QUICK, ask, make_renderer, words
from hypothesis import given
from rich.console import Console

from rankwise.data.token_preview import pieces, render_html, render_terminal, visible
from rankwise.data.tokens import encode

RENDERER = make_renderer()


def rows(*pairs, renderer=RENDERER):
    return list(encode([ask(renderer, *pair, f"r{number}") for number, pair in enumerate(pairs)], renderer, None))


def terminal(shown, **options):
    console = Console(file=io.StringIO(), width=200, **options)
    console.print(render_terminal(shown, RENDERER.tokenizer))
    return console.file.getvalue()


@QUICK
@given(words, words)
def test_pieces_are_the_row_text_and_its_tokens(prompt, answer):
    (row,) = rows((prompt, answer))
    found = pieces(row, RENDERER.tokenizer)
    assert "".join(piece.text for piece in found) == RENDERER.tokenizer.decode(row.input_ids)
    assert [token for piece in found for token in piece.token_ids] == row.input_ids.tolist()
    assert [piece.supervised for piece in found for _ in piece.token_ids] == row.supervised.tolist()


def test_a_character_of_several_tokens_is_one_piece():
    (row,) = rows(("日", "é"))
    texts = [piece.text for piece in pieces(row, RENDERER.tokenizer)]
    assert {"日", "é"} <= set(texts)


def test_the_terminal_marks_supervised_text_without_colours_too():
    shown = terminal(rows(("How much?", "Price is $326")), no_color=True)
    assert "⟦Price is $326<|im_end|>⟧" in shown
    assert "How much?<|im_end|>" in shown
    assert "row r0: " in shown
    assert "5 supervised" in shown or "supervised" in shown


def test_the_terminal_colours_supervised_text():
    assert "\x1b[32m⟦one" in terminal(rows(("a", "one")), force_terminal=True, color_system="standard")


def test_data_cannot_steer_the_terminal_or_its_markup():
    shown = terminal(rows(("\x1b[31mred\x07 [bold]x[/bold]", "one\u202etwo\u2028")), no_color=True)
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\\x1b[31mred\\x07 [bold]x[/bold]" in shown
    assert "one\\u202etwo\\u2028" in shown


def test_html_escapes_the_data():
    page = render_html(rows(('<script>alert("x")</script>', "<b>&one</b>")), RENDERER.tokenizer, title="<t>")
    tags = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)

    Reader().feed(page)
    assert set(tags) == {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "span", "div"}
    assert "<title>&lt;t&gt;</title>" in page


def test_html_needs_nothing_else():
    page = render_html(rows(("a", "one")), RENDERER.tokenizer)
    assert not any(word in page for word in ("http:", "https:", "src=", "href=", "url("))


def test_html_marks_each_supervised_token_with_its_number():
    (row,) = rows(("a", "326"))
    page = render_html([row], RENDERER.tokenizer)
    body = page[page.index('<div class="row">') :]
    assert body.count('class="t on"') == int(row.supervised.sum())
    assert body.count('class="t') == len(row.input_ids)
    end = RENDERER.tokenizer.eos_token_id
    assert f'<span class="t on" title="{end}">&lt;|im_end|&gt;</span>' in body


def test_invisible_characters_are_shown():
    assert visible("a\tb\nc\x00\u200b") == "a⇥b↵\nc\\x00\\u200b"
