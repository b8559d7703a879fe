"""llama.cpp caches share memory with their copies, without visible effects."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

import exported
from exported import EXACT, GOLDEN, case, gguf_bundle, gguf_runtime, prompt, relative

from molmo_edge import Molmo
from molmo_edge.runtimes import EngineError, open_runtime
from molmo_edge.runtimes.llama import LlamaCache, LlamaRuntime
from molmo_edge.runtimes.llama_native import LlamaContext, LlamaModel


class TestCaches:
    """Copies share memory, without visible effects."""

    rows: np.ndarray

    @pytest.fixture(autouse=True)
    def _prepare(self) -> None:
        self.engine = gguf_runtime("molmoe", "f32")
        self.rows = prompt(self.engine, case("molmoe", "square"))
        self.text = [self.engine.embed(np.array(ids)) for ids in ([5, 9, 77, 3], [200, 1, 8, 9, 10, 11])]

    def alone(self, *parts: np.ndarray) -> np.ndarray:
        rows = np.concatenate(parts)
        return self.engine.forward(rows, self.engine.new_cache(len(rows)))

    def test_copies_are_independent(self) -> None:
        base = self.engine.new_cache(len(self.rows) + 8)
        self.engine.forward(self.rows, base)
        copies = [base.copy() for _ in range(2)]
        found = [self.engine.forward(text, copy) for text, copy in zip(self.text, copies, strict=True)]
        again = self.engine.forward(self.text[1], base)  # the original too, after its copies
        for logits, text in zip([*found, again], [*self.text, self.text[1]], strict=True):
            assert relative(logits, self.alone(self.rows, text)) < 1e-5
        assert [base.length, *(copy.length for copy in copies)] == [len(self.rows) + n for n in (6, 4, 6)]

    def test_many_copies_that_do_not_fit_into_one_memory(self) -> None:
        rows, text = self.rows[:200], self.rows[200:230]
        base = self.engine.new_cache(256)  # a multiple of the size that llama.cpp rounds up to
        self.engine.forward(rows, base)
        copies = [base.copy() for _ in range(20)]  # more copies than sequences, and more tokens than positions
        contexts = [copy.context for copy in copies]
        assert sum(context is base.context for context in contexts) == 15
        exact = self.alone(rows, text)
        for copy in copies:
            assert relative(self.engine.forward(text, copy), exact) < 1e-5
        assert sum(copy.context is base.context for copy in copies) == 1  # the first had the room, the others moved
        assert relative(self.engine.forward(text, base), exact) < 1e-5

    def test_a_move_that_fails_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows, text = self.rows[:200], self.rows[200:230]
        base = self.engine.new_cache(256)
        self.engine.forward(rows, base)
        first, second = base.copy(), base.copy()
        self.engine.forward(text, first)
        for part in ("__init__", "restore"):
            with monkeypatch.context() as patch:
                patch.setattr(LlamaContext, part, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    self.engine.forward(text, second)
            assert second.context is base.context
            assert second.length == 200
        third = base.copy()
        for cache in (second, third):
            assert relative(self.engine.forward(text, cache), self.alone(rows, text)) < 1e-5
        row = self.rows[230:231]
        assert relative(self.engine.forward(row, first), self.alone(rows, text, row)) < 1e-5

    def test_copies_that_are_gone_give_their_room_back(self) -> None:
        base = self.engine.new_cache(len(self.rows) + 6)
        self.engine.forward(self.rows, base)
        for i in range(60):
            copy = base.copy()
            self.engine.forward(self.text[i % 2], copy)
            assert copy.context is base.context
            del copy
            gc.collect()

    def test_a_shorter_length_forgets(self) -> None:
        cache = self.engine.new_cache(len(self.rows) + 16)
        self.engine.forward(self.rows, cache)
        self.engine.forward(self.text[0], cache)
        cache.length = len(self.rows)
        copy = cache.copy()
        for each in (cache, copy):
            logits = self.engine.forward(self.text[1], each)
            assert relative(logits, self.alone(self.rows, self.text[1])) < 1e-5

    def test_a_saved_state_goes_on_elsewhere(self, tmp_path: Path) -> None:
        cache = self.engine.new_cache(len(self.rows) + 6)
        self.engine.forward(self.rows, cache)
        (tmp_path / "state").write_bytes(cache.state())
        other = open_runtime(gguf_bundle("molmoe", "f32"), engine_options=EXACT)  # as another process would
        assert isinstance(other, LlamaRuntime)
        restored = other.restore((tmp_path / "state").read_bytes(), cache.length, cache.length + 6)
        assert relative(other.forward(self.text[0], restored), self.alone(self.rows, self.text[0])) < 1e-5
        with pytest.raises(EngineError, match="are not of this model"):
            other.restore(bytes(cache.state()[:-100]), cache.length, cache.length + 6)
        with pytest.raises(EngineError, match="does not hold 3 positions"):
            other.restore(bytes(cache.state()), 3, cache.length)
        other.close()

    def test_what_does_not_fit_is_refused(self) -> None:
        cache = self.engine.new_cache(4)
        with pytest.raises(EngineError, match="5 positions do not fit into the cache"):
            self.engine.forward(self.rows[:5], cache)
        with pytest.raises(EngineError, match="at least one embedding"):
            self.engine.forward(self.rows[:0], cache)
        with pytest.raises(EngineError, match="32 wide"):
            self.engine.forward(self.rows[:2, :7], cache)
        with pytest.raises(EngineError, match="positions was requested"):
            self.engine.new_cache(10**6)
        with pytest.raises(EngineError, match="another runtime"):
            self.engine.forward(self.rows[:2], exported.runtime("molmoe").new_cache(8))

    def test_an_interrupted_prompt_stops_and_leaves_a_sound_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import llama_cpp

        from molmo_edge.runtimes import llama_native

        cache = self.engine.new_cache(len(self.rows) + 16)
        self.engine.forward(self.text[0], cache)
        started, codes, decode = threading.Event(), [], llama_cpp.llama_decode

        def slow(context: Any, batch: Any) -> int:
            started.set()
            assert cache.context.abort.wait(10)  # so that there is a run to stop, however small the model is
            codes.append(decode(context, batch))
            return codes[-1]

        def interrupted(_running: Any) -> int:
            started.wait(10)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(llama_native, "wait_for", interrupted)
            patch.setattr(llama_cpp, "llama_decode", slow)
            with pytest.raises(KeyboardInterrupt):
                self.engine.forward(self.rows, cache)
        assert codes == [2]  # llama.cpp's code for "aborted"
        assert cache.length == len(self.text[0])
        logits = self.engine.forward(self.text[1], cache)
        assert relative(logits, self.alone(self.text[0], self.text[1])) < 1e-5

    def test_copies_are_made_while_others_run(self) -> None:
        base = self.engine.new_cache(len(self.rows) + 200)
        self.engine.forward(self.rows, base)
        exact, wrong = [self.alone(self.rows, text) for text in self.text], []

        def ask(k: int) -> None:
            for i in range(12):
                found = self.engine.forward(self.text[(i + k) % 2], base.copy())
                if relative(found, exact[(i + k) % 2]) > 1e-5:
                    wrong.append((k, i))

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_threads_share_a_molmo() -> None:
    molmo = Molmo(gguf_bundle("qwen", "f32"), threads=1, engine_options=EXACT, max_crops=1)
    scene = molmo.encode(GOLDEN / "coffee.png", room=40)
    questions = [f"Point to the {thing}." for thing in ("cup", "spoon", "table", "saucer")]
    alone = [molmo.ask(scene, question, max_new_tokens=8).token_ids for question in questions]
    found: dict[str, Any] = {}

    def ask(question: str) -> None:
        found[question] = molmo.ask(scene, question, max_new_tokens=8).token_ids

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[question] for question in questions] == alone
    molmo.close()
    with pytest.raises(EngineError, match="closed"):
        molmo.ask(GOLDEN / "coffee.png", "What?")


def test_a_closed_runtime_s_caches_stay_sound() -> None:
    engine = open_runtime(gguf_bundle("qwen", "f32"))
    cache = engine.new_cache(8)
    assert isinstance(cache, LlamaCache)
    engine.forward(np.zeros((3, 32), np.float32), cache)
    engine.close()
    del engine
    gc.collect()
    assert len(cache.copy().state()) == len(cache.state())


def test_closing_frees_the_model_at_once() -> None:
    engine = open_runtime(gguf_bundle("qwen", "f32"))
    assert isinstance(engine, LlamaRuntime)
    cache = engine.new_cache(600)
    engine.forward(np.zeros((300, 32), np.float32), cache)
    model, context = weakref.ref(engine.model), weakref.ref(cache.context)
    gc.disable()  # objects that need a collection are not freed at once
    try:
        engine.close()
        assert model() is not None  # a cache still refers to it
        del cache, engine
        assert context() is None
        assert model() is None
    finally:
        gc.enable()


def test_a_load_is_stopped_by_closing() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(EngineError, match="was closed"):
        LlamaModel(gguf_bundle("qwen", "f32") / "decoder-f32.gguf", 1, False, EXACT, stop)
