"""After a fork, the child of a process with a model answers or raises at once, and never hangs."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

import molmo_edge

ROOT = Path(molmo_edge.__file__).parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

HEAD = """
import faulthandler, os, signal, sys, threading, time
from functools import partial
import numpy as np
import molmo_edge
from molmo_edge.errors import MolmoEdgeError

Molmo = partial(molmo_edge.Molmo, max_crops=0)  # twice as fast as with crops
IMAGE, QUESTION = np.full((64, 64, 3), 90, np.uint8), "What is this?"

def ask(molmo, image=IMAGE):
    try:
        return molmo.ask(image, QUESTION, max_new_tokens=3).text
    except MolmoEdgeError as error:
        return f"{type(error).__name__}: {error}"

def fork(work, leave=sys.exit):
    '''What `work` returns in a child, and the child's exit status; a child that hangs says where, and is killed.'''
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        faulthandler.enable()
        os.write(writes, work().encode())
        leave(0)
    os.close(writes)
    for _ in range(400):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            with os.fdopen(reads) as said:
                return said.read(), os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGABRT)
    os.waitpid(child, 0)
    print("the child hung", file=sys.stderr, flush=True)
    os._exit(1)  # even if other threads still run

def in_thread(work):
    threading.Thread(target=work, daemon=True).start()
"""


def run(code: str, *arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("leave", ["sys.exit", "os._exit"])
def test_a_child_forked_before_the_first_question_answers(leave: str) -> None:
    code = f"molmo = Molmo(); said = fork(lambda: ask(molmo), {leave}); print(said); print((ask(molmo), 0))"
    child, parent = run(code)
    assert child == parent


def test_a_child_forked_after_a_question_answers() -> None:
    code = "molmo = Molmo(threads=2); first = ask(molmo); print(fork(lambda: ask(molmo))); print((first, 0))"
    child, parent = run(code)
    assert child == parent


def test_children_of_children_answer() -> None:
    code = """
molmo = Molmo()
print(fork(lambda: fork(lambda: ask(molmo), os._exit)[0]))
print((ask(molmo), 0))
"""
    child, parent = run(code)
    assert child == parent


def test_a_scene_of_the_parent_is_answered_in_the_child() -> None:
    code = """
molmo = Molmo()
scene = molmo.encode(IMAGE)
first = ask(molmo, scene)
print(fork(lambda: ask(molmo, scene)))
print((first, 0))
"""
    child, parent = run(code)
    assert child == parent


def test_a_conversation_goes_on_in_the_child() -> None:
    code = """
molmo = Molmo()
chat = molmo.chat(IMAGE)
chat.ask(QUESTION, max_new_tokens=3)
print(fork(lambda: chat.ask("Why?", max_new_tokens=3).text))
print((chat.ask("Why?", max_new_tokens=3).text, 0))
"""
    child, parent = run(code)
    assert child == parent


def test_a_stream_that_the_parent_began_raises_in_the_child() -> None:
    code = """
molmo = Molmo()
stream = molmo.stream(IMAGE, QUESTION, max_new_tokens=8)
next(stream)
def go_on():
    try:
        return stream.answer.text
    except MolmoEdgeError as error:
        return str(error)
print(fork(go_on))
"""
    (said,) = run(code)
    assert "before this process was forked" in said


@pytest.mark.parametrize("asked", [False, True])
def test_a_child_that_never_asks_ends(asked: bool) -> None:
    code = f"molmo = Molmo(threads=2); {asked} and ask(molmo); print(fork(lambda: 'idle'))"
    assert run(code) == ["('idle', 0)"]


def test_a_child_closes_the_model_of_its_parent() -> None:
    code = "molmo = Molmo(threads=2); ask(molmo); print(fork(lambda: str(molmo.close()) + ask(molmo)))"
    (said,) = run(code)
    assert "this runtime was closed" in said


@pytest.mark.parametrize("asked", [False, True])
def test_a_fork_pool_answers(asked: bool) -> None:
    code = f"""
import multiprocessing
molmo = Molmo()
{asked} and ask(molmo)
def work(value):
    return molmo.ask(np.full((64, 64, 3), value, np.uint8), QUESTION, max_new_tokens=3).text
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map_async(work, [10, 200]).get(timeout=60))
print([work(value) for value in (10, 200)])
"""
    pool, alone = run(code)
    assert pool == alone


def test_threads_that_ask_while_their_process_forks_do_not_block_the_child() -> None:
    code = """
molmo, go_on = Molmo(), True
def keep_asking():
    while go_on:
        ask(molmo)
threads = [threading.Thread(target=keep_asking) for _ in range(2)]
[thread.start() for thread in threads]
print({fork(lambda: ask(molmo)) for _ in range(3)})
go_on = False
[thread.join() for thread in threads]  # a thread inside ONNX Runtime at the end aborts the process
print({(ask(molmo), 0)})
"""
    child, parent = run(code)
    assert child == parent


def test_a_thread_that_computes_a_cached_property_does_not_block_the_child() -> None:
    code = """
from molmo_edge.system.lazy import cached_property
begun = threading.Event()
class Slow:
    @cached_property
    def value(self):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            time.sleep(60)
        return "computed"
slow = Slow()
in_thread(lambda: slow.value)
begun.wait()
print(fork(lambda: slow.value))
"""
    assert run(code) == ["('computed', 0)"]


def test_a_thread_that_imports_does_not_block_the_child(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import forked_at\nforked_at.begun.set()\nforked_at.time.sleep(1)\nvalue = 'whole'\n"
    )
    (tmp_path / "broken.py").write_text("import forked_at\nforked_at.begun.set()\nforked_at.time.sleep(1)\n1 / 0\n")
    (tmp_path / "forked_at.py").write_text("import threading, time\nbegun = threading.Event()\n")
    code = """
sys.path.insert(0, sys.argv[1])
import forked_at, importlib
def import_broken():
    try:
        import broken
    except ZeroDivisionError:
        return "broken"
for name, work in [("slow", lambda: importlib.import_module("slow").value), ("broken", import_broken)]:
    forked_at.begun.clear()
    in_thread(work)
    forked_at.begun.wait()
    print(fork(work))
"""
    assert run(code, tmp_path) == ["('whole', 0)", "('broken', 0)"]


def test_objects_among_the_modules_do_not_disturb_a_fork() -> None:
    code = """
import importlib.util, warnings
class NoModule:
    __class__ = type(os)  # as those of cffi
class Raising(type(os)):
    def __getattribute__(self, name):
        raise RuntimeError("this module was loaded")
sys.modules["none"], sys.modules["lie"], sys.modules["lazy"] = None, NoModule(), Raising("lazy")
sys.unraisablehook = lambda error: os._exit(7)
print(fork(lambda: "idle"))
os._exit(0)  # the end of the interpreter looks at all modules
"""
    assert run(code) == ["('idle', 0)"]


def test_a_module_that_forks_while_it_is_imported_does_not_wait_for_itself(tmp_path: Path) -> None:
    (tmp_path / "forking.py").write_text("import __main__\nsaid = __main__.fork(lambda: 'idle')\n")
    code = "sys.path.insert(0, sys.argv[1]); import forking; print(forking.said)"
    assert run(code, tmp_path) == ["('idle', 0)"]


def test_a_thread_that_reads_a_picture_does_not_block_the_child() -> None:
    code = """
import io, warnings
from PIL import Image
from molmo_edge.images import load_image
begun = threading.Event()
class SlowFile(io.BytesIO):
    def read(self, *size):
        if size != (0,) and not begun.is_set():
            begun.set()
            time.sleep(1)
        return super().read(*size)
picture = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(picture, "png")
before = list(warnings.filters)
in_thread(lambda: load_image(SlowFile(picture.getvalue())))
begun.wait()
print(fork(lambda: f"{load_image(picture.getvalue())[0, 0]} {warnings.filters == before}"))
"""
    assert run(code) == ["('[255   0   0] True', 0)"]


@pytest.mark.parametrize("asked", [False, True])
def test_a_checkpoint_on_pytorch_raises_in_the_child(asked: bool, golden: Path) -> None:
    pytest.importorskip("torch")
    code = f"molmo = Molmo(sys.argv[1], threads=2); {asked} and ask(molmo); print(fork(lambda: ask(molmo)))"
    (said,) = run(code, golden / "molmoe")
    assert "EngineError: this checkpoint was opened before this process was forked" in said
    assert "spawn" in said


@pytest.mark.parametrize("asked", [False, True])
def test_a_decoder_on_llama_cpp_raises_in_the_child(asked: bool) -> None:
    pytest.importorskip("llama_cpp")
    from exported import gguf_bundle

    code = f"molmo = Molmo(sys.argv[1], threads=2); {asked} and ask(molmo); print(fork(lambda: ask(molmo)))"
    (said,) = run(code, gguf_bundle("molmoe", "f32"))
    assert "EngineError: this model of llama.cpp was opened before this process was forked" in said


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
def test_a_process_group_is_gone_when_training_ends() -> None:
    pytest.importorskip("torch")
    import torch.distributed as dist

    from molmo_edge.training.parallel import world

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    with world("cpu"):  # threads that PyTorch starts once
        pass
    before = threads()
    gc.disable()
    try:
        with world("cpu"):
            cycle: list[object] = [dist.group.WORLD]
            cycle.append(cycle)
            del cycle
            assert threads() > before
        assert threads() == before
    finally:
        gc.enable()
