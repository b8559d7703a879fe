"""From the messages of a request to a question with its history and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from molmo_edge.server.errors import bad_request


@dataclass(frozen=True)
class Message:
    """A message of a conversation, in the form that OpenAI's APIs share."""

    role: str  # "system", "user" or "assistant"
    text: str
    images: tuple[str, ...] = ()  # URLs
    low_detail: bool = False  # one of its images has "detail": "low"


@dataclass(frozen=True)
class Conversation:
    """A question and what came before it."""

    question: str
    history: tuple[tuple[str, str], ...]
    images: tuple[str, ...]  # URLs, of all messages
    low_detail: bool

    @property
    def characters(self) -> int:
        """The length of the question and of all that came before it."""
        return len(self.question) + sum(len(text) for turn in self.history for text in turn)


def read_conversation(messages: Sequence[Message], param: str) -> Conversation:
    """Join system messages with the first question, and user messages that follow each other. Raises ApiError.

    Molmo has no place for instructions other than a question. `param`: the field with the messages, for errors.
    """
    system: list[str] = []
    turns: list[tuple[str, list[str]]] = []  # (role, texts)
    for message in messages:
        if message.role == "system":
            system.append(message.text)
        elif turns and turns[-1][0] == message.role == "user":
            turns[-1][1].append(message.text)
        elif message.role == ("assistant" if len(turns) % 2 else "user"):
            turns.append((message.role, [message.text]))
        else:
            raise bad_request("messages of user and assistant must alternate, and begin with the user", param)
    if len(turns) % 2 == 0:
        raise bad_request("the last message must be a question of the user", param)
    texts = ["\n\n".join(text for text in parts if text.strip()) for _, parts in turns]
    texts[0] = "\n\n".join(text for text in (*system, texts[0]) if text.strip())
    if not all(text.strip() for text in texts[::2]):
        raise bad_request("a message of the user has no text: ask a question about the image", param)
    return Conversation(
        question=texts[-1],
        history=tuple(zip(texts[:-1:2], texts[1::2], strict=True)),
        images=tuple(url for message in messages for url in message.images),
        low_detail=any(message.low_detail for message in messages),
    )
