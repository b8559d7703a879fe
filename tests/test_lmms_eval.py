"""The adapter for lmms-eval: requests in, answers out; on lmms-eval where it is installed, else on a stand-in."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from molmo_edge import Answer, Molmo

EXAMPLES = Path(__file__).parent.parent / "examples"
ADAPTER = EXAMPLES / "lmms_eval_molmo_edge" / "lmms_eval_molmo_edge.py"
INSTALLED = importlib.util.find_spec("lmms_eval") is not None

pytestmark = pytest.mark.skipif(not ADAPTER.exists(), reason="needs the source tree")


class StandInLmms:
    """What of lmms_eval.api.model.lmms the adapter uses."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@dataclass(frozen=True)
class StandInManifest:
    model_id: str
    simple_class_path: str


@pytest.fixture(scope="module")
def adapter() -> Iterator[ModuleType]:
    """The adapter's module, as a file outside of any package."""
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            for name in ("", ".api", ".api.model", ".models", ".models.registry_v2"):
                patch.setitem(sys.modules, f"lmms_eval{name}", ModuleType(f"lmms_eval{name}"))
            patch.setattr(sys.modules["lmms_eval.api.model"], "lmms", StandInLmms, raising=False)
            registry = sys.modules["lmms_eval.models.registry_v2"]
            patch.setattr(registry, "ModelManifest", StandInManifest, raising=False)
        spec = importlib.util.spec_from_file_location(ADAPTER.stem, ADAPTER)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, ADAPTER.stem, module)
        spec.loader.exec_module(module)
        yield module


@dataclass
class Echo:
    """In place of Molmo: answers with the question, and keeps what it was given."""

    opened: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    encoded: list[Any] = field(default_factory=list)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __call__(self, model: Any, **settings: Any) -> Echo:
        self.opened.append((model, settings))
        return self

    def encode(self, image: Any) -> int:
        self.encoded.append(image)
        return len(self.encoded)

    def ask(self, scene: int, question: str, **sampling: Any) -> Answer:
        assert scene == len(self.encoded)
        self.asked.append((question, sampling))
        return Answer(question)


@pytest.fixture
def echo(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Echo:
    echo = Echo()
    monkeypatch.setattr(adapter, "Molmo", echo)
    return echo


def request(text: str, doc_id: int, task: str = "chartqa", **options: Any) -> Any:
    """A generate_until request whose document is what it shows."""
    arguments = (text, options, lambda doc: doc, doc_id, task, "test")
    if not INSTALLED:
        return SimpleNamespace(args=arguments)
    from lmms_eval.api.instance import Instance

    metadata = {"task": task, "doc_id": doc_id, "repeats": 1}
    return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)


def answers(model: Any, documents: list[Any], *requests: Any) -> list[str]:
    model.task_dict = {task: {"test": documents} for task in {request.args[4] for request in requests}}
    return model.generate_until(list(requests))


def drawn(colour: str) -> Image.Image:
    return Image.new("RGB", (40, 30), colour)


def test_answers_are_those_of_ask_in_the_order_of_the_requests(adapter: ModuleType) -> None:
    coffee, cat = (Image.open(EXAMPLES / name).convert("RGB") for name in ("coffee.jpg", "cat.jpg"))
    asks = [(coffee, "Point to the cup."), (coffee, "How many cats are there?"), (cat, "Point to the cat.")]
    model = adapter.MolmoEdge(bundle="nano", max_crops=1, threads=2)
    said = answers(
        model,
        [[image] for image, _ in asks],
        *(request(text, i, max_new_tokens=16) for i, (_, text) in enumerate(asks)),
    )
    with Molmo(max_crops=1, threads=2) as molmo:
        assert said == [molmo.ask(image, text, max_new_tokens=16).text for image, text in asks]
    assert len(set(said)) == 3


def test_neighbours_about_one_image_share_an_encoding(adapter: ModuleType, echo: Echo) -> None:
    documents = [[drawn("red")], [drawn("red")], [drawn("blue")], [drawn("red")]]  # an object of its own each
    model = adapter.MolmoEdge()
    assert answers(model, documents, *(request(text, i) for i, text in enumerate("abcd"))) == ["a", "b", "c", "d"]
    assert [image.getpixel((0, 0)) for image in echo.encoded] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]


def test_a_document_asked_twice_is_encoded_once(adapter: ModuleType, echo: Echo) -> None:
    assert answers(adapter.MolmoEdge(), [[drawn("red")]], request("a", 0), request("b", 0)) == ["a", "b"]
    assert len(echo.encoded) == 1


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        (["\n\n"], "one\ntwo"),
        (["three", "\n"], "one"),
        (["two\n", "\n\n"], "one\n"),  # the first in the text, not the first in the list
        ("two", "one\n"),
        (["absent"], "one\ntwo\n\nthree"),
        ([], "one\ntwo\n\nthree"),
        (None, "one\ntwo\n\nthree"),
        ([None, ""], "one\ntwo\n\nthree"),  # lmms-eval's, for a task without a delimiter
    ],
)
@pytest.mark.usefixtures("echo")
def test_answers_end_at_until(adapter: ModuleType, until: Any, expected: str) -> None:
    asked = request("one\ntwo\n\nthree", 0, until=until)
    assert answers(adapter.MolmoEdge(), [[drawn("red")]], asked) == [expected]


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, {}),
        ({"max_new_tokens": None, "temperature": None, "top_p": None}, {}),
        ({"max_new_tokens": 16, "temperature": 0.0, "top_p": 0, "num_beams": 1}, {"max_new_tokens": 16}),
        (
            {"max_new_tokens": 16, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "do_sample": True},
            {"max_new_tokens": 16, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
        ),
    ],
)
def test_generation_kwargs_become_sampling(
    adapter: ModuleType, echo: Echo, options: dict[str, Any], sampling: dict[str, Any]
) -> None:
    answers(adapter.MolmoEdge(), [[drawn("red")]], request("a", 0, **options))
    assert echo.asked == [("a", sampling)]


@pytest.mark.parametrize(
    ("style", "task", "asked"),
    [
        ("none", "chartqa", "Why?"),
        ("auto", "chartqa", "chart_qa: Why?"),
        ("auto", "textvqa_val", "text_vqa: Why?"),
        ("auto", "docvqa_val_lite", "doc_qa: Why?"),
        ("auto", "infovqa_test", "info_qa: Why?"),
        ("auto", "ai2d_no_mask", "ai2_diagram: Why?"),
        ("auto", "vqav2_val", "vqa2: Why?"),
        ("auto", "mmmu_val", "a_okvqa_mc: Why?"),
        ("auto", "realworldqa", "Why?"),
        ("vqa2", "realworldqa", "vqa2: Why?"),
    ],
)
def test_a_style_stands_before_the_question(adapter: ModuleType, echo: Echo, style: str, task: str, asked: str) -> None:
    answers(adapter.MolmoEdge(style=style), [[drawn("red")]], request("Why?", 0, task))
    assert [question for question, _ in echo.asked] == [asked]


@pytest.mark.parametrize(
    ("visuals", "says"),
    [
        ([drawn("red"), drawn("blue")], "document 1 of chartqa has 2 images, but Molmo supports one"),
        ([], "document 1 of chartqa has no image, which Molmo needs"),
        (None, "document 1 of chartqa has no image, which Molmo needs"),
        (["clip.mp4"], "the visual of document 1 of chartqa is a file, usually a video, but Molmo needs a PIL image"),
        (
            [{"array": [0.0], "rate": 16000}],
            "the visual of document 1 of chartqa is of type dict, but Molmo needs a PIL image",
        ),
    ],
)
@pytest.mark.usefixtures("echo")
def test_what_is_not_one_image_is_refused(adapter: ModuleType, visuals: Any, says: str) -> None:
    model = adapter.MolmoEdge()
    with pytest.raises(adapter.LmmsEvalError, match=f"^{says}: leave this task out$"):
        answers(model, [[drawn("red")], visuals], request("a", 0), request("b", 1))


@pytest.mark.usefixtures("echo")
def test_other_kinds_of_request_are_refused(adapter: ModuleType) -> None:
    model = adapter.MolmoEdge()
    with pytest.raises(adapter.LmmsEvalError, match="does not score given texts"):
        model.loglikelihood([])
    with pytest.raises(adapter.LmmsEvalError, match="one image per conversation"):
        model.generate_until_multi_round([])


def test_batches_and_several_processes_are_refused_before_the_model_opens(
    adapter: ModuleType, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    for settings in ({"batch_size": 4}, {"batch_size": "auto"}, {"max_batch_size": 8}):
        with pytest.raises(adapter.LmmsEvalError, match="leave batch_size at 1"):
            adapter.MolmoEdge(**settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(adapter.LmmsEvalError, match="runs in one process"):
        adapter.MolmoEdge()
    assert not echo.opened


def test_model_args_open_the_molmo(adapter: ModuleType, echo: Echo) -> None:
    if INSTALLED:  # its command line: strings become numbers, what was not given is None
        text = "bundle=molmoe-mixed,precision=nf4,max_crops=12,threads=2,style=auto"
        given = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
        adapter.MolmoEdge.create_from_arg_string(text, given)
    else:
        adapter.MolmoEdge("molmoe-mixed", "cpu", "nf4", 12, 2, "auto", batch_size="1")
    settings = {"device": "cpu", "precision": "nf4", "max_crops": 12, "threads": 2}
    assert echo.opened == [("molmoe-mixed", settings)]
    adapter.MolmoEdge()
    assert echo.opened[1] == (None, {"device": "auto", "precision": "auto", "max_crops": None, "threads": None})


def test_the_entry_point_leads_to_the_class(adapter: ModuleType) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ADAPTER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (name, target), *others = project["entry-points"]["lmms_eval.models"].items()
    module, _, function = target.partition(":")
    assert (name, module, others) == ("molmo_edge", ADAPTER.stem, [])
    manifest = getattr(adapter, function)()
    assert (manifest.model_id, manifest.simple_class_path) == (name, f"{module}.MolmoEdge")
    if INSTALLED:  # it looks whether the class is one of its own kind
        from lmms_eval.models.registry_v2 import ModelRegistryV2

        registry = ModelRegistryV2()
        registry.register_manifest(manifest)
        assert registry.get_model_class(name) is adapter.MolmoEdge
