"""Text piece by piece: nothing uncertain is given, and a chat sees what was said before."""

from types import SimpleNamespace

import numpy as np
import pytest

import minilora as ml
from minilora.cli.commands.generate import _answer
from minilora.io.formats.tokenizers.base import Tokenizer
from minilora.training import generate as generate_module
from minilora.training import streaming
from minilora.training.streaming import Chat, Settings, Writing

END, NEXT = 0, b"\nu:two\na:"


class Letters(Tokenizer):
    """A token a byte; a template that names each role by its first letter."""

    stop_ids, vocab = (END,), 256
    chat_template = "in Python"

    def encode(self, text, special=True):
        return [*text.encode()]

    def decode(self, ids, special=False):
        return bytes(i for i in ids if i != END).decode(errors="replace")

    def token_text(self, id):
        return chr(id)

    def chat(self, messages, generate=False, today=None):
        if any(m["content"] == "refused" for m in messages):
            raise ValueError("the chat template refuses the messages")
        return "".join(f"{m['role'][0]}:{m['content']}\n" for m in messages) + "a:" * generate


@pytest.fixture
def model(monkeypatch):
    """A model that writes the bytes in ``model.says``; it keeps the prompts that it was given."""
    made = SimpleNamespace(
        base=SimpleNamespace(config=None, tokenizer=Letters()),
        weights={},
        tuning=None,
        says=b"",
        prompts=[],
    )

    def generate(prompts, *_, max_new_tokens, stop, **__):
        made.prompts.append(bytes(prompts[0]).decode())
        for token in made.says[:max_new_tokens]:
            yield [token]
            if token in stop:
                return

    monkeypatch.setattr(streaming, "generate", generate)
    monkeypatch.setattr(streaming, "fitting", lambda c, n, most: most)
    return made


def written(model, says, *stop, most=99):
    model.says = says.encode() if isinstance(says, str) else says
    writing = Writing(model, [ord("x")], Settings(stop=stop, max_new_tokens=most))
    return [*writing], writing


def test_a_character_of_several_tokens_is_one_piece(model):
    pieces, writing = written(model, "aé東\0")
    assert pieces == ["a", "é", "東"]
    assert (writing.tokens, writing.cut, writing.text) == (7, False, "aé東")
    assert written(model, "aé".encode()[:-1])[0] == ["a"]


def test_text_ends_before_a_stop_text_and_none_of_it_is_given(model):
    pieces, writing = written(model, "one\nUser: two", "\nUser:")
    assert pieces == ["o", "n", "e"]
    assert not writing.cut
    assert written(model, "one\nUseful", "\nUser:")[0] == ["o", "n", "e", "\nUsef", "u", "l"]
    assert written(model, "one\nUs", "\nUser:")[0] == ["o", "n", "e", "\nUs"]


def test_of_several_stop_texts_the_earliest_ends(model):
    assert "".join(written(model, "a.b,c", ",", ".")[0]) == "a"
    assert "".join(written(model, "abcd", "bc", "abc")[0]) == ""


def test_the_writing_says_that_it_was_cut_off(model):
    assert written(model, "abcdef", most=3)[1].cut
    assert not written(model, "abc\0", most=4)[1].cut


def test_a_stop_text_that_ends_everything_is_refused():
    with pytest.raises(ValueError, match="stop ''"):
        Settings(stop=("",))


def test_a_chat_sees_its_system_prompt_and_all_that_was_said(model):
    chat = Chat(model, Settings(), "Be kind.")
    for question, answer in (("one", "1\0"), ("two", "2\0")):
        model.says = answer.encode()
        writing = chat.ask(question)
        assert "".join(writing) == answer[0]
        chat.keep(writing)
    assert model.prompts == [
        "s:Be kind.\nu:one\na:",
        "s:Be kind.\nu:one\na:1\nu:two\na:",
    ]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be kind."}]


def test_a_chat_reads_what_is_new_alone_and_answers_as_without_a_cache(monkeypatch):
    c = ml.Llama(vocab=256, d=8, layers=2, heads=2, ffn=8, kv_heads=1, head_dim=4)
    W = ml.draw_weights(c, np.random.default_rng(0), std=0.5)
    base = SimpleNamespace(config=c, tokenizer=Letters())
    model = SimpleNamespace(base=base, weights=W, tuning=ml.TrainableSpec())
    lengths, forward = [], generate_module.next_logits

    def counting(batch, *arguments):
        lengths.append(batch.ids.shape[1])
        return forward(batch, *arguments)

    def said(keeps):
        chat, answers, prompt = Chat(model, Settings(max_new_tokens=4)), [], [*b"u:one\na:"]
        monkeypatch.setattr(chat, "prompt", lambda: [*prompt])
        for _ in range(3):
            writing = chat.ask("one")
            "".join(writing)
            answers.append(writing.ids)
            chat.keep(writing)
            prompt += [*writing.ids, *NEXT]
            if not keeps:
                chat.read = []
        return answers

    monkeypatch.setattr(generate_module, "next_logits", counting)
    without = said(False)
    assert all(len(answer) == 4 for answer in without)
    first = len(b"u:one\na:")
    assert [n for n in lengths if n > 1] == [first + i * (4 + len(NEXT)) for i in range(3)]
    lengths.clear()
    assert said(True) == without
    # the last token that was drawn, which nothing has read, and what is new
    assert [n for n in lengths if n > 1] == [first, 1 + len(NEXT), 1 + len(NEXT)]


def test_a_history_that_has_changed_is_read_again_from_there(model):
    chat = Chat(model, Settings())
    chat.read = [*b"u:one\na:yes"]
    assert chat.ask("one more").cached == len("u:one")
    assert chat.read == [*b"u:one"]


def test_a_message_that_the_template_refuses_is_forgotten(model):
    chat = Chat(model, Settings())
    with pytest.raises(ValueError, match="refuses"):
        chat.ask("refused")
    assert chat.messages == []
    assert chat.ask("one").prompt == [*b"u:one\na:"]


@pytest.mark.parametrize(("says", "left"), [(b"", 0), (b"yes", 2)])
def test_ctrl_c_ends_an_answer_and_keeps_what_there_is_of_it(says, left, monkeypatch, capsys):
    class Interrupted:
        text, tokens, seconds, cut, read = says.decode(), len(says), 1.0, False, []

        def __iter__(self):
            yield self.text
            raise KeyboardInterrupt

    chat = Chat(SimpleNamespace(base=SimpleNamespace(tokenizer=Letters())), Settings())
    monkeypatch.setattr(streaming, "Writing", lambda *_: Interrupted())
    _answer(chat, "one")
    assert len(chat.messages) == left
    assert capsys.readouterr().out == f"{says.decode()}\n"
