"""`molmo-edge chat` on a terminal (a pty): line editing, history and Ctrl-C."""

from __future__ import annotations

import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from molmo_edge.frontend.prompts import text_ids
from molmo_edge.frontend.tokenizer import Tokenizer

pty = pytest.importorskip("pty", reason="a POSIX terminal")
pytest.importorskip("readline")

TESTS = Path(__file__).parent
PHOTO = TESTS / "golden" / "coffee.png"
# A model that repeats each question, endlessly if the question begins with "Long".
CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
import dataclasses
from conftest import GOLDEN, FakeRuntime
from molmo_edge import molmo
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.frontend.tokenizer import Tokenizer

tokenizer = Tokenizer.from_file(GOLDEN / "molmoe" / "tokenizer.json")
config = read_config(GOLDEN / "molmoe")
config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, max_position_embeddings={context}))
EOS = tokenizer.special.eos

class Repeats(FakeRuntime):
    def forward(self, embeddings, cache):
        if len(embeddings) > 1:
            prompt = tokenizer.decode(int(i) for i in embeddings[:, 0])
            asked = prompt.rpartition(" User: ")[2].removesuffix(" Assistant:")
            self.script = tokenizer.encode(f" So: {{asked}}") * (10_000 if asked.startswith("Long") else 1) + [EOS]
        elif len(self.script) > 1000:
            time.sleep(0.01)
        return super().forward(embeddings, cache)

Molmo = molmo.Molmo
molmo.Molmo = lambda *_, **__: Molmo.from_parts(Repeats(config, []), tokenizer, max_crops=0)
from molmo_edge.cli import main
main()
"""


class Terminal:
    """The command in its own pty."""

    def __init__(self, home: Path, *arguments: object, context: int = 4096) -> None:
        self._master, slave = pty.openpty()
        environment = {
            **os.environ,
            "PYTHONPATH": str(TESTS.parent),
            "MOLMO_EDGE_CACHE": str(home),
            "TERM": "xterm",
            "INPUTRC": os.devnull,
        }

        def own_terminal() -> None:
            import fcntl
            import termios

            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)  # so that Ctrl-C sends a signal
            signal.signal(signal.SIGINT, signal.default_int_handler)

        code = CHILD.format(tests=str(TESTS), context=context)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, "chat", str(PHOTO), *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            preexec_fn=own_terminal,
        )
        os.close(slave)
        self.shown = ""

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> str:
        """The output before `text`; the output after it is kept for the next call."""
        ends = time.monotonic() + 60
        while text not in self.shown:
            ready, _, _ = select.select([self._master], [], [], max(0.0, ends - time.monotonic()))
            assert ready, f"{text!r} did not come; there is {self.shown!r}"
            try:
                data = os.read(self._master, 65536)
            except OSError:  # the other end is closed
                data = b""
            assert data, f"{text!r} did not come before the end; there is {self.shown!r}"
            self.shown += data.decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C until `text` comes.

        Once is not always enough at a prompt: CPython's readline loop does not see a signal that arrives between a
        character and the wait for the next one, until another signal wakes it.
        """
        for _ in range(30):
            self.send("\x03")
            ends = time.monotonic() + 2
            while text not in self.shown and time.monotonic() < ends:
                if select.select([self._master], [], [], 0.1)[0]:
                    self.shown += os.read(self._master, 65536).decode(errors="replace")
            if text in self.shown:
                self.wait_for(text)
                return
        raise AssertionError(f"{text!r} did not come; there is {self.shown!r}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        try:
            return self._process.wait(timeout=60)
        finally:
            self._process.kill()
            os.close(self._master)


def question_tokens(question: str) -> int:
    tokenizer = Tokenizer.from_file(TESTS / "golden" / "molmoe" / "tokenizer.json")
    return len(text_ids(tokenizer, [question]))


Open = Callable[..., Terminal]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Open]:
    opened: list[Terminal] = []

    def make(*arguments: object, **options: Any) -> Terminal:
        opened.append(Terminal(tmp_path / "home", *arguments, **options))
        opened[-1].wait_for("> ")
        return opened[-1]

    yield make
    for each in opened:
        each.kill()


def test_ctrl_c_cancels_the_answer_and_keeps_the_chat(terminal: Open) -> None:
    chat = terminal("--max-new-tokens", 3000)  # takes half a minute
    chat.send("First?\r")
    chat.wait_for("So: First?")
    chat.wait_for("> ")
    chat.send("Long one\r")
    chat.wait_for("So: Long one So: Long one")  # it is generating
    chat.send("\x03")
    chat.wait_for("cancelled")
    chat.wait_for("> ")
    chat.send("Second?\r")
    chat.wait_for("So: Second?")
    # Prefilled: the EOS of the first answer, which is not in the cache yet, and the question; nothing of image or
    # "Long".
    read, whole = chat.wait_for(" tokens read").rsplit("\n", 1)[-1].split(" of ")
    assert int(read) == 1 + question_tokens("Second?")
    assert int(whole) > 150 + int(read)
    chat.wait_for("> ")
    chat.send("/quit\r")
    assert chat.end() == 0


def test_ctrl_c_at_the_prompt_drops_the_line(terminal: Open) -> None:
    chat = terminal()
    chat.send("half a quest")
    chat.wait_for("half a quest")
    chat.interrupt("type /quit or press Ctrl-D to exit")
    chat.wait_for("> ")
    chat.send("Whole?\r")
    chat.wait_for("So: Whole?")
    chat.wait_for("> ")
    chat.send("\x04")
    assert chat.end() == 0


def test_lines_are_edited(terminal: Open) -> None:
    chat = terminal()
    chat.send("here?\x01Where \x05 Now\x7f\x7f\x7f\x7f\r")  # to the start, to the end, four characters back
    chat.wait_for("So: Where here?")
    chat.wait_for("> ")
    chat.send("/quit\r")
    assert chat.end() == 0


def test_arrow_up_asks_again_in_this_chat_and_in_the_next(terminal: Open, tmp_path: Path) -> None:
    chat = terminal()
    chat.send("Remember?\r")
    chat.wait_for("So: Remember?")
    chat.wait_for("> ")
    chat.send("\x1b[A\r")
    chat.wait_for("So: Remember?")
    chat.wait_for("> ")
    chat.send("\x04")
    assert chat.end() == 0
    file = tmp_path / "home" / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    chat = terminal()
    chat.send("\x1b[A\r")
    chat.wait_for("So: Remember?")
    chat.wait_for("> ")
    chat.send("\x04")
    assert chat.end() == 0


def test_questions_can_be_kept_out_of_the_history(terminal: Open, tmp_path: Path) -> None:
    chat = terminal("--no-history")
    chat.send("Secret?\r")
    chat.wait_for("So: Secret?")
    chat.wait_for("> ")
    chat.send("\x1b[A\r")  # it is still in the history of this chat
    chat.wait_for("So: Secret?")
    chat.wait_for("> ")
    chat.send("\x04")
    assert chat.end() == 0
    assert not (tmp_path / "home" / "chat_history").exists()


def test_a_history_that_cannot_be_written_is_no_error(terminal: Open, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    chat = terminal()
    chat.send("Why?\r")
    chat.wait_for("So: Why?")
    chat.wait_for("> ")
    chat.send("/quit\r")
    assert chat.end() == 0


def test_a_full_conversation_says_new(terminal: Open) -> None:
    chat = terminal(context=330)
    for _ in range(40):
        chat.send("Why?\r")
        if "the conversation is full" in chat.wait_for("> "):
            break
    else:
        pytest.fail("it never got full")
    chat.send("Why?\r")
    assert "the conversation is full: type /new" in chat.wait_for("> ")
    chat.send("/new\r")
    chat.wait_for("> ")
    chat.send("Why?\r")
    chat.wait_for("So: Why?")
    chat.wait_for("> ")
    chat.send("/quit\r")
    assert chat.end() == 0
