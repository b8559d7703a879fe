"""Conversations give the ids of a full prefill, and run only the tokens of each turn."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from molmo_edge import Answer, Molmo
from molmo_edge.chat import Chat, ConversationFull
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.molmo import QuestionError, Scene
from molmo_edge.runtimes import EngineError
from molmo_edge.runtimes.generate import GenerationError, Sampling, generate

GOLDEN = Path(__file__).parent / "golden"
PHOTO = np.zeros((60, 80, 3), np.uint8)
QUESTIONS = ("Point to the helmet.", "What else is there?", "Why?", "How many people are there?")

Saying = Callable[..., Molmo]


def engine(kind: str, tiny_bundle: Path) -> Molmo:
    """A golden model: on ONNX Runtime, on PyTorch, or with its decoder on llama.cpp."""
    if kind == "onnxruntime":
        return Molmo(tiny_bundle, threads=1, max_crops=1)
    if kind == "pytorch":
        pytest.importorskip("torch")
        return Molmo(GOLDEN / "molmoe", threads=1, max_crops=1, precision="fp32")
    pytest.importorskip("llama_cpp")
    from exported import EXACT, gguf_bundle

    return Molmo(gguf_bundle("molmoe", "f32"), threads=1, engine_options=EXACT, max_crops=1)


ENGINES = ("onnxruntime", "pytorch", "llama.cpp")


def ask_from_scratch(molmo: Molmo, scene: Scene, ids: list[int], sampling: Sampling) -> tuple[int, ...]:
    """Return the ids that follow the image and `ids` when all of them are prefilled at once."""
    runtime, eos = molmo.engine.runtime, molmo.engine.tokenizer.special.eos
    prompt = np.concatenate([scene.embeddings, runtime.embed(np.array(ids))])
    capacity = len(prompt) + sampling.max_new_tokens
    cache, size = runtime.new_cache(capacity), molmo.config.decoder.vocab_size
    return tuple(generate(runtime, prompt, cache, sampling, eos_id=eos, vocab_size=size, capacity=capacity))


def compare_with_scratch(molmo: Molmo, chat: Chat, scene: Scene, *, temperature: float, new_tokens: int) -> None:
    """Ask all questions: each answer must equal that of a full prefill, and run only its own tokens."""
    tokenizer = molmo.engine.tokenizer
    ids: list[int] = []
    for turn, question in enumerate(QUESTIONS):
        own = text_ids(tokenizer, [question]).tolist()
        ids += own
        answer = chat.ask(question, max_new_tokens=new_tokens, temperature=temperature, seed=turn)
        sampling = Sampling(new_tokens, temperature, seed=turn)
        assert answer.token_ids == ask_from_scratch(molmo, scene, ids, sampling)
        tokens = answer.usage.tokens
        assert (tokens.image, tokens.prompt) == (len(scene.embeddings), len(ids))
        # The image is prefilled already. Of an earlier answer, EOS is not in the cache, nor the id that cut it off.
        assert len(own) + min(turn, 1) <= tokens.prefilled <= len(own) + 2 * min(turn, 1)
        ids += [*answer.token_ids, tokenizer.special.eos]
    assert chat.positions == len(scene.embeddings) + len(ids)


@pytest.mark.parametrize("temperature", [0.0, 1.5])  # greedy, these small models repeat one id; drawn, they do not
@pytest.mark.parametrize("kind", ENGINES)
def test_the_ids_are_those_of_a_chat_that_prefills_everything(kind: str, temperature: float, tiny_bundle: Path) -> None:
    with engine(kind, tiny_bundle) as molmo:
        photo = GOLDEN / "astronaut.png"
        scene = molmo.encode(photo)
        for image in (photo, scene):
            compare_with_scratch(molmo, molmo.chat(image), scene, temperature=temperature, new_tokens=12)


def behind_the_likeliest(molmo: Molmo, scene: Scene, ids: list[int], said: tuple[int, ...]) -> float:
    """Return the largest gap of an id of `said` to the likeliest, in logits, when all of `ids` is prefilled at once."""
    runtime, inputs, size = molmo.engine.runtime, scene.grounding, molmo.config.decoder.vocab_size
    embed = runtime.embed if inputs is None else inputs.embed
    rows, grounding = np.concatenate([scene.embeddings, embed(np.array(ids))]), None
    cache: Any = runtime.new_cache(len(rows) + len(said))
    gaps = [0.0]
    for token in said:
        logits = runtime.forward(rows, cache)
        if inputs is None:
            logits = logits[:size]
        else:
            grounding = grounding or inputs.begin(cache.states)
            logits = grounding.logits(logits, cache.states[-1], "graded")
        gaps.append(float(logits.max() - logits[token]))
        rows = runtime.embed(np.array([token])) if grounding is None else grounding.embed(token)
    return max(gaps)


def test_the_embedded_model_differs_by_rounding_alone() -> None:
    """Eight-bit activations round differently in another order, so nearly tied ids may differ."""
    with Molmo(threads=1, max_crops=1) as molmo:
        scene = molmo.encode(GOLDEN / "coffee.png")
        chat, turns = molmo.chat(scene), list[Sequence[int] | str]()
        assert scene.grounding is not None
        first = scene.grounding.token_ids.first
        for question in QUESTIONS:
            ids = text_ids(molmo.engine.tokenizer, [*turns, question]).tolist()
            answer = chat.ask(question, max_new_tokens=24)
            assert behind_the_likeliest(molmo, scene, ids, answer.token_ids) < 0.5
            # In a later prompt, an answer with grounding tokens is text.
            turns += [question, answer.text if max(answer.token_ids) >= first else answer.token_ids]
        assert len({answer.text for answer in chat.answers}) > 1


@pytest.mark.parametrize("kind", ENGINES)
def test_a_conversation_outgrows_its_cache(kind: str, tiny_bundle: Path) -> None:
    with engine(kind, tiny_bundle) as molmo:
        scene = molmo.engine.scene(GOLDEN / "coffee.png")
        roomy, tight = molmo.chat(scene), Chat(molmo.engine, scene, room=1)
        expected = [roomy.ask(question, max_new_tokens=6).token_ids for question in QUESTIONS]
        found, capacities = [], set()
        for question in QUESTIONS:
            answer = tight.ask(question, max_new_tokens=6)
            found.append(answer.token_ids)
            capacities.add(tight.capacity)
            assert answer.usage.tokens.prefilled < 30
        assert found == expected
        assert len(capacities) > 1


@pytest.mark.parametrize("kind", ENGINES)
def test_a_larger_copy_of_a_cache_continues_as_the_cache_does(kind: str, tiny_bundle: Path) -> None:
    with engine(kind, tiny_bundle) as molmo:
        runtime = molmo.engine.runtime
        cache = runtime.new_cache(300)
        runtime.forward(runtime.embed(np.arange(40)), cache)
        larger = cache.copy(600)
        assert (larger.length, larger.capacity, cache.capacity) == (40, 600, 300)
        more = runtime.embed(np.arange(60, 80))
        np.testing.assert_allclose(runtime.forward(more, larger), runtime.forward(more, cache), atol=1e-5)
        assert (larger.length, cache.length) == (60, 60)
        with pytest.raises(EngineError, match="holds 60 positions"):
            cache.copy(59)


@pytest.mark.parametrize("kind", ENGINES)
def test_an_answer_left_half_way_is_forgotten(kind: str, tiny_bundle: Path) -> None:
    with engine(kind, tiny_bundle) as molmo:
        chat, undisturbed = molmo.chat(GOLDEN / "coffee.png"), molmo.chat(GOLDEN / "coffee.png")
        for question in QUESTIONS:
            stream = chat.stream("Something else altogether, and at some length?", max_new_tokens=40)
            next(stream)
            answer = chat.ask(question, max_new_tokens=6)
            assert answer.token_ids == undisturbed.ask(question, max_new_tokens=6).token_ids
            with pytest.raises(GenerationError, match="another question was asked"):
                next(stream)
        assert chat.history == undisturbed.history
        assert [q for q, _ in chat.history] == list(QUESTIONS)


def words(molmo: Molmo, chat: Chat) -> str:
    """Return all rows that went into the chat's cache, without the image, as text. The fake's column 0 is the id."""
    fed = np.concatenate(molmo.fake.fed)[:, 0]  # type: ignore[attr-defined]
    return molmo.engine.tokenizer.decode(int(i) for i in fed[len(chat.scene.embeddings) :])


def test_the_decoder_sees_each_token_once_and_in_the_references_format(saying: Saying) -> None:
    molmo = saying("Yes.")
    chat = molmo.chat(PHOTO)
    for question in ("First?", "And now?", "Then?"):
        chat.ask(question)
    turns = [f" User: {question} Assistant:" for question in ("First?", "And now?", "Then?")]
    assert words(molmo, chat) == " Yes.<|endoftext|>".join(turns) + " Yes."
    assert molmo.fake.images == 1  # type: ignore[attr-defined]
    assert chat.history == [("First?", "Yes."), ("And now?", "Yes."), ("Then?", "Yes.")]
    assert [answer.text for answer in chat.answers] == ["Yes."] * 3


def test_a_question_without_an_image(saying: Saying) -> None:
    molmo = saying("Yes.")
    chat = molmo.chat(molmo.engine.no_image())
    first, second = chat.ask("First?"), chat.ask("And now?")
    assert words(molmo, chat) == " User: First? Assistant: Yes.<|endoftext|> User: And now? Assistant: Yes."
    assert first.usage.tokens.image == second.usage.tokens.image == 1


def test_usage_counts_what_was_prefilled(saying: Saying) -> None:
    molmo = saying("Yes.")
    asked = molmo.ask(PHOTO, "Why?").usage.tokens
    assert asked.prefilled == asked.image + asked.prompt
    of_scene = molmo.ask(molmo.encode(PHOTO), "Why?").usage.tokens
    assert of_scene.prefilled == of_scene.prompt == asked.prompt
    chat = molmo.chat(PHOTO)
    first, second = (chat.ask("Why?").usage.tokens for _ in range(2))
    assert first.prefilled == first.prompt == asked.prompt
    assert second.prompt > second.prefilled == asked.prompt + 1  # and the EOS of the first answer
    (batched,) = molmo.ask_batch([(PHOTO, "Why?")])
    assert batched.usage.tokens == asked
    assert molmo.ask(PHOTO, "Why?").to_dict()["usage"]["tokens"]["prefilled"] == asked.prefilled


def test_reset_keeps_the_image_and_nothing_else(saying: Saying) -> None:
    molmo = saying("Yes.")
    chat = molmo.chat(PHOTO)
    first = chat.ask("First?")
    taken = chat.positions
    chat.ask("Second?")
    chat.reset()
    assert chat.history == []
    assert chat.positions == len(chat.scene.embeddings)
    again = chat.ask("First?")
    assert again.usage.tokens == dataclasses.replace(first.usage.tokens)
    assert chat.positions == taken


def test_a_full_conversation_says_so_and_goes_on_after_a_reset(saying: Saying) -> None:
    image = len(saying("Yes.").chat(PHOTO).scene.embeddings)
    tokens = saying("Yes.").ask(PHOTO, "Why?").usage.tokens
    turn = tokens.prompt + tokens.generated + 1  # and EOS
    molmo = saying("Yes.", context=image + 2 * turn)
    chat = molmo.chat(PHOTO)
    for turns in (1, 2):
        assert chat.ask("Why?").complete
        assert chat.full == (turns == 2)
    with pytest.raises(ConversationFull, match=r"the conversation is full.*reset\(\)"):
        chat.ask("Why?")
    assert len(chat.history) == 2  # nothing changed
    chat.reset()
    assert not chat.full
    assert chat.ask("Why?").complete


def test_an_answer_that_fills_the_context_is_cut_off(saying: Saying) -> None:
    image = len(saying("Yes.").chat(PHOTO).scene.embeddings)
    own = saying("Yes.").ask(PHOTO, "Why?").usage.tokens.prompt
    chat = saying("a rather long story", context=image + own + 1).chat(PHOTO)
    answer = chat.ask("Why?")
    assert not answer.complete
    assert len(answer.token_ids) == 2
    assert chat.full
    with pytest.raises(ConversationFull):
        chat.ask("Why?")


def test_a_first_question_that_is_too_long_is_not_a_full_conversation(saying: Saying) -> None:
    image = len(saying("Yes.").chat(PHOTO).scene.embeddings)
    prompt = saying("Yes.").ask(PHOTO, "Why?").usage.tokens.prompt
    chat = saying("Yes.", context=image + prompt).chat(PHOTO)
    with pytest.raises(GenerationError, match="shorten the question") as caught:
        chat.ask("Why " * 20 + "?")
    assert not isinstance(caught.value, ConversationFull)
    assert len(chat.ask("Why?").token_ids) == 1


def test_a_turn_that_failed_is_forgotten(saying: Saying, monkeypatch: pytest.MonkeyPatch) -> None:
    molmo = saying("a rather long story")
    chat, forward, left = molmo.chat(PHOTO), molmo.fake.forward, [2]  # type: ignore[attr-defined]

    def fail_at_third(embeddings: np.ndarray, cache: Any) -> np.ndarray:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return forward(embeddings, cache)

    with monkeypatch.context() as patch:
        patch.setattr(molmo.fake, "forward", fail_at_third)  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            chat.ask("Why?")
    assert chat.history == []
    molmo.fake.fed[:] = molmo.fake.fed[:1]  # type: ignore[attr-defined]
    assert chat.ask("When?").complete
    assert words(molmo, chat) == " User: When? Assistant: a rather long story"


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda chat: chat.ask(""), QuestionError),
        (lambda chat: chat.ask(None), QuestionError),
        (lambda chat: chat.ask("Why?", temperature=-1), GenerationError),
        (lambda chat: chat.ask("Why?", max_new_tokens=0), GenerationError),
    ],
)
def test_what_cannot_be_asked_changes_nothing(saying: Saying, ask: Callable[[Chat], Answer], error: type) -> None:
    chat = saying("Yes.").chat(PHOTO)
    stream = chat.stream("First?")
    with pytest.raises(error):
        ask(chat)
    assert stream.answer.text == "Yes."
    assert len(chat.history) == 1


def test_another_molmos_scene_is_refused(saying: Saying) -> None:
    with pytest.raises(QuestionError, match="another Molmo"):
        saying("Yes.").chat(saying("No.").encode(PHOTO))


def test_a_scene_may_have_several_chats(tiny_bundle: Path) -> None:
    with Molmo(tiny_bundle, threads=1, max_crops=1) as molmo:
        scene = molmo.encode(GOLDEN / "coffee.png")
        alone = [molmo.chat(scene).ask(question, max_new_tokens=6).token_ids for question in QUESTIONS]
        chats = [molmo.chat(scene) for _ in QUESTIONS]
        found: dict[int, tuple[int, ...]] = {}

        def ask(k: int) -> None:
            found[k] = chats[k].ask(QUESTIONS[k], max_new_tokens=6).token_ids

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(len(chats))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[k] for k in range(len(chats))] == alone
        assert scene.cache is not None
        assert scene.cache.length == len(scene.embeddings)


def test_closing_the_molmo_ends_its_chats(tiny_bundle: Path) -> None:
    with Molmo(tiny_bundle, threads=1, max_crops=1) as molmo:
        chat = molmo.chat(GOLDEN / "coffee.png")
    with pytest.raises(MolmoEdgeError, match="closed"):
        chat.ask("Why?")


@pytest.mark.parametrize("kind", ENGINES)
def test_a_conversation_that_is_too_long_forgets_its_oldest_turns(
    kind: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(kind, tiny_bundle) as molmo:
        scene = molmo.encode(PHOTO)
        tokenizer, context = molmo.engine.tokenizer, len(scene.embeddings) + 160
        monkeypatch.setattr(type(molmo.engine), "context", context)
        chat, question = molmo.chat(scene, trim=True), "a " * 25
        turns, trimmed = [], False
        for turn in range(5):
            answer = chat.ask(f"{turn} {question}", max_new_tokens=4)
            turns.append((f"{turn} {question}", answer.token_ids))
            kept = len(chat.history)
            trimmed |= kept < len(turns)
            assert [asked for asked, _ in chat.history] == [asked for asked, _ in turns[-kept:]]
            said = [part for pair in turns[-kept:] for part in pair][:-1]
            expected = ask_from_scratch(molmo, scene, text_ids(tokenizer, said).tolist(), Sampling(4))
            assert answer.token_ids == expected
            assert chat.positions <= context
        assert trimmed


def test_trimming_leaves_room_and_happens_only_on_request(saying: Saying) -> None:
    molmo = saying("yes", context=600)
    scene = molmo.encode(PHOTO)
    chat, free = molmo.chat(scene), 600 - len(scene.embeddings)
    question = "a " * (free // 9)
    while chat.positions + free // 8 < 600:
        chat.ask(question, max_new_tokens=3)
    full = len(chat.history)
    assert full >= 3
    with pytest.raises(ConversationFull, match="trim=True"):
        chat.ask(question * 2, max_new_tokens=3)
    chat.stream(question, max_new_tokens=3, trim=True).close()  # an abandoned turn forgets nothing
    assert len(chat.history) == full
    chat.ask(question, max_new_tokens=3, trim=True)
    assert 1 < len(chat.history) <= full
    assert chat.positions <= 600 - free // 4 + 4
    before = len(chat.history)
    assert chat.ask("short?", max_new_tokens=3, trim=True).usage.tokens.prefilled < 30
    assert len(chat.history) == before + 1
    chat.ask("long?", max_new_tokens=free - 20, trim=True)  # only the question is left beside such an answer
    assert len(chat.history) == 1
    with pytest.raises(GenerationError, match="shorten the question"):
        chat.ask("a " * 600, trim=True)


def test_a_conversation_continues_from_its_history(tiny_bundle: Path) -> None:
    with engine("onnxruntime", tiny_bundle) as molmo:
        scene = molmo.encode(PHOTO)
        first = molmo.chat(scene)
        for question in QUESTIONS[:2]:
            first.ask(question, max_new_tokens=6)
        history = first.history
        second = molmo.chat(scene, history=history)
        assert second.history == history
        expected = molmo.ask(scene, "Why?", max_new_tokens=6, history=history)
        assert second.ask("Why?", max_new_tokens=6) == expected
        assert len(second.history) == 3
        own = len(text_ids(molmo.engine.tokenizer, ["Who?"]))
        assert second.ask("Who?", max_new_tokens=6).usage.tokens.prefilled <= own + 2
        with pytest.raises(QuestionError, match="history must be"):
            molmo.chat(scene, history="ab")  # type: ignore[arg-type]
