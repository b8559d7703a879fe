"""The page at / in headless Chromium: photo to points, keyboard, errors; and its files and headers."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image
from serving import Server, serving, wait_until

from molmo_edge import Molmo
from molmo_edge.frontend.prompts import caption_question, count_question, point_question
from molmo_edge.sdk.readable_text import readable
from molmo_edge.server.page import PAGE

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
CUPS = (
    'I see <points x1="10.0" y1="20.0" x2="30.5" y2="40.0" alt="cups">cups</points> and <img src=x onerror=alert(1)>.'
)
LABELS = [
    "cup",
    "the cup",
    "A  cup",
    "an apple?",
    "all cups",
    "my dog.",
    "the",
    "all",
    "Red  cups ;",
    "THE Dog",
    "ünïcode",
]


@pytest.fixture(scope="module")
def of_cups(any_saying: Callable[..., Molmo]) -> Iterator[Server]:
    with serving(any_saying(CUPS)) as server:
        yield server


def test_the_files_have_headers_that_keep_other_code_out(of_cups: Server) -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for path in sorted(PAGE.iterdir()):
        reply = of_cups.send("/" if path.name == "index.html" else f"/{path.name}")
        assert reply.status == 200
        assert reply.body == path.read_bytes()
        assert reply.headers["Content-Type"] == f"{types[path.suffix]}; charset=utf-8"
        policy = reply.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert reply.headers["Referrer-Policy"] == "no-referrer"
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["X-Frame-Options"] == "DENY"
    assert of_cups.send("/nothing.js").status == 404
    assert of_cups.send("/../page.py").status == 404
    assert of_cups.send("/", b"", method="POST").status == 405


def test_the_page_needs_no_other_host_and_no_code_in_its_html() -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", html)
    for path in PAGE.iterdir():
        addresses = re.findall(r"(?:https?:)?//[\w.-]+", re.sub(r"(?m)^\s*//.*", "", path.read_text(encoding="utf-8")))
        assert set(addresses) <= {"http://www.w3.org"}, path  # the name of SVG's namespace
        names = re.findall(r'(?:src|href|from) ?=? ?"(?:\./)?([\w.-]+\.\w+)"', path.read_text(encoding="utf-8"))
        assert all((PAGE / name).is_file() for name in names), path


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as play:
        camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """`open_page(server)` is a page that fails the test on an error of JavaScript or of the security policy."""
    contexts, problems = [], []

    def make(server: Server, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 360, "height": 740}, **options})
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda message: problems.append(message.text) if "Security Policy" in message.text else None)
        page.goto(f"{server.url}/")
        return page

    yield make
    for context in contexts:
        context.close()
    assert problems == []


def jpeg(size: tuple[int, int], orientation: int = 1) -> dict[str, Any]:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (90, 30, 160)).save(file, "JPEG", exif=exif)
    return {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": file.getvalue()}


def give_photo(page: Any, photo: dict[str, Any]) -> None:
    page.set_input_files("#file", photo)
    page.locator("#photo[src]").wait_for()
    wait_until(lambda: page.evaluate("document.getElementById('photo').complete"))


def sent(page: Any, action: Callable[[], None]) -> dict[str, Any]:
    """The body of the request that `action` causes."""
    with page.expect_request("**/v1/chat/completions") as request:
        action()
    body: dict[str, Any] = json.loads(request.value.post_data)
    return body


@pytest.mark.slow
def test_photo_to_points_with_the_keyboard_alone(open_page: Callable[..., Any], of_cups: Server) -> None:
    page = open_page(of_cups, reduced_motion="reduce", color_scheme="dark")
    give_photo(page, jpeg((300, 200)))
    page.focus("input[value=ask]")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("input[value=count]").is_checked()
    page.keyboard.press("Tab")
    page.keyboard.type("the cups")
    body = sent(page, lambda: page.keyboard.press("Enter"))
    assert body["messages"][0]["content"][0]["text"] == "How many cups are there?"
    page.get_by_role("button", name="Copy JSON").wait_for()
    marks = page.locator(".mark")
    assert marks.count() == 2
    frame = page.locator("#photo").bounding_box()
    for index, (x, y) in enumerate([(10.0, 20.0), (30.5, 40.0)]):
        box = marks.nth(index).bounding_box()
        assert box["x"] + box["width"] / 2 == pytest.approx(frame["x"] + frame["width"] * x / 100, abs=1.0)
        assert box["y"] + box["height"] / 2 == pytest.approx(frame["y"] + frame["height"] * y / 100, abs=1.0)
    items = page.get_by_role("list", name="Points").get_by_role("listitem")
    assert [re.sub(r"\s+", " ", text) for text in items.all_inner_texts()] == [
        "cups 10.0 %, 20.0 % 30, 40 px Copy",
        "cups 30.5 %, 40.0 % 92, 80 px Copy",
    ]
    # What the model wrote is text, not HTML; a screen reader gets it once it is complete.
    assert page.locator(".text").inner_text() == readable(CUPS)
    assert page.locator(".answer img").count() == 0
    assert page.locator("#announced").inner_text().startswith(f"2. {readable(CUPS)}")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.slow
def test_large_and_turned_photos_arrive_small_and_upright(open_page: Callable[..., Any], of_cups: Server) -> None:
    page = open_page(of_cups)
    give_photo(page, jpeg((3000, 1000), orientation=6))
    page.fill("#question", "What is it?")
    url = sent(page, lambda: page.click("#send"))["messages"][0]["content"][1]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        assert image.size == (683, 2048)
        assert image.getexif().get(0x0112, 1) == 1
    assert page.locator("#size").inner_text() == "1000 × 3000 pixels, sent as 683 × 2048"
    page.get_by_role("button", name="Copy JSON").wait_for()
    assert "100, 600 px" in page.get_by_role("list", name="Points").inner_text()


@pytest.mark.slow
def test_dropped_and_pasted_photos(open_page: Callable[..., Any], of_cups: Server) -> None:
    page = open_page(of_cups)
    page.evaluate(
        """async () => {
            const canvas = new OffscreenCanvas(40, 30);
            canvas.getContext("2d").fillRect(0, 0, 9, 9);
            const blob = await canvas.convertToBlob();
            window.transfer = new DataTransfer();
            transfer.items.add(new File([blob], "a.png", {type: "image/png"}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
        }"""
    )
    page.get_by_text("40 × 30 pixels").wait_for()
    page.reload()
    page.evaluate(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File(["no image"], "a.txt", {type: "text/plain"}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
        }"""
    )
    page.get_by_role("alert").get_by_text("That is not an image file").wait_for()
    page.evaluate(
        """async () => {
            const canvas = new OffscreenCanvas(50, 20);
            canvas.getContext("2d").fillRect(0, 0, 9, 9);
            const transfer = new DataTransfer();
            transfer.items.add(new File([await canvas.convertToBlob()], "a.png", {type: "image/png"}));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true}));
        }"""
    )
    page.get_by_text("50 × 20 pixels").wait_for()
    assert page.get_by_role("alert").count() == 0


@pytest.mark.slow
def test_errors_are_told_in_a_sentence(open_page: Callable[..., Any], of_cups: Server) -> None:
    page = open_page(of_cups)
    alert = page.locator("#error-text")
    page.fill("#question", "What is it?")
    page.click("#send")
    assert alert.inner_text() == "Choose a photo first."
    page.set_input_files("#file", {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"no image"})
    alert.get_by_text("cannot read the file as an image").wait_for()
    give_photo(page, jpeg((30, 20)))

    def answer(status: int, message: str, headers: dict[str, str]) -> Callable[[Any], None]:
        body = json.dumps({"error": {"message": message}})
        return lambda route: route.fulfill(status=status, body=body, headers=headers)

    place = "**/v1/chat/completions"
    cut = 'data: {"choices": [{"delta": {"content": "A half"}, "finish_reason": null}]}\n\n'
    failed = 'data: {"error": {"message": "the model failed"}}\n\n'
    cases = [
        (answer(429, "busy", {"Retry-After": "7"}), "The server is busy with other questions. Try again in about 7 s."),
        (answer(413, "the request has more than 5 bytes", {}), "The photo is too large: the request has more than 5"),
        (answer(503, "stopping", {}), "The server is stopping."),
        (lambda route: route.abort(), "The server does not answer."),
        (lambda route: route.fulfill(status=200, body=cut), "The connection to the server was lost"),
        (lambda route: route.fulfill(status=200, body=failed), "The model failed."),
        (lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"), "The server answered with status 502."),
    ]
    for handler, message in cases:
        page.route(place, handler)
        page.click("#send")
        alert.get_by_text(message).wait_for()
        page.unroute(place)
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("button", name="Copy JSON").wait_for()
    assert page.get_by_role("alert").count() == 0
    assert page.get_by_text("This answer is not complete.").count() == 1


@pytest.mark.slow
def test_a_key_is_asked_for_and_sent(open_page: Callable[..., Any], any_saying: Callable[..., Molmo]) -> None:
    with serving(any_saying("A cup."), api_key="secret-7") as server:
        page = open_page(server)
        give_photo(page, jpeg((30, 20)))
        page.get_by_label("Caption", exact=True).check()
        page.click("#send")
        dialog = page.get_by_role("dialog", name="This server needs a key")
        dialog.wait_for()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        dialog.get_by_text("does not accept this key").wait_for()
        page.fill("#key", "secret-7")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Copy text").wait_for()
        assert page.locator(".text").all_inner_texts() == ["A cup."]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility_rules_of_axe(open_page: Callable[..., Any], of_cups: Server, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(of_cups, color_scheme=scheme, reduced_motion="reduce")

    def violations() -> list[Any]:
        return [(found["id"], found["nodes"]) for found in axe.run(page).response["violations"]]

    assert violations() == []
    page.click("#send")
    page.get_by_role("alert").wait_for()
    assert violations() == []
    give_photo(page, jpeg((300, 200)))
    page.get_by_label("Count", exact=True).check()
    page.fill("#question", "cups")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Copy JSON").wait_for()
    assert violations() == []


@pytest.mark.slow
def test_a_photo_from_the_camera(open_page: Callable[..., Any], of_cups: Server) -> None:
    page = open_page(of_cups)
    page.click("#camera")
    wait_until(lambda: page.evaluate("document.getElementById('video').videoWidth > 0"))
    page.get_by_role("button", name="Take the photo").click()
    page.locator("#photo[src]").wait_for()
    wait_until(lambda: page.evaluate("document.getElementById('video').srcObject === null"))  # the camera is off again
    page.get_by_label("Caption", exact=True).check()
    url = sent(page, lambda: page.click("#send"))["messages"][0]["content"][1]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    page.get_by_role("button", name="Copy text").wait_for()


def slow(molmo: Molmo, seconds: float) -> Molmo:
    """A fake model whose steps take `seconds`."""
    forward = molmo.fake.forward  # type: ignore[attr-defined]

    def slowly(*given: Any) -> Any:
        time.sleep(seconds)
        return forward(*given)

    molmo.fake.forward = slowly  # type: ignore[attr-defined]
    return molmo


@pytest.mark.slow
def test_points_appear_one_by_one(open_page: Callable[..., Any], any_saying: Callable[..., Molmo]) -> None:
    said = 'Three <points x1="10.0" y1="10.0" x2="20.0" y2="20.0" x3="30.0" y3="30.0" alt="cups">cups</points>.'
    with serving(slow(any_saying(said), 0.03)) as server:
        page = open_page(server)
        give_photo(page, jpeg((30, 20)))
        page.evaluate(
            """() => {
                window.seen = [];
                const marks = document.getElementById("marks");
                const text = () => document.querySelector(".text").textContent;
                const watch = new MutationObserver(() => seen.push([marks.childElementCount, text()]));
                watch.observe(marks, {childList: true});
            }"""
        )
        page.fill("#question", "Where?")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Copy JSON").wait_for()
        seen = page.evaluate("window.seen")
        assert [count for count, _ in seen] == [1, 2, 3]
        assert {text for _, text in seen} == {"Three "}  # all before the tag closes
        assert page.locator(".text").inner_text() == "Three cups."
        assert page.locator(".label").all_inner_texts() == ["cups"] * 3


@pytest.mark.slow
def test_an_answer_that_is_cut_off_shows_its_points_and_no_tag(
    open_page: Callable[..., Any], any_saying: Callable[..., Molmo]
) -> None:
    with serving(any_saying('Here: <points x1="10.0" y1="20.0" ' + "x " * 1500, context=800)) as server:
        page = open_page(server)
        give_photo(page, jpeg((30, 20)))
        page.fill("#question", "Where?")
        page.keyboard.press("Enter")
        page.locator(".answer .hint", has_text="The answer was cut off").wait_for()
        assert page.locator(".text").inner_text() == "Here:"
        assert page.locator(".mark").count() == 1


@pytest.mark.slow
def test_stop_frees_the_model(open_page: Callable[..., Any], any_saying: Callable[..., Molmo]) -> None:
    with serving(slow(any_saying("one " * 3000), 0.05)) as server:
        page = open_page(server)
        give_photo(page, jpeg((30, 20)))
        page.fill("#question", "Why?")
        page.keyboard.press("Enter")
        page.get_by_text("one one").wait_for()
        page.keyboard.press("Escape")
        page.locator(".answer .hint", has_text="You stopped this answer.").wait_for()
        wait_until(lambda: not server.service.queue.running)
        assert page.locator("#stop").is_hidden()


@pytest.mark.slow
def test_questions_and_readable_text_are_those_of_the_sdk(open_page: Callable[..., Any], of_cups: Server) -> None:
    page = open_page(of_cups)
    ask = "async ([mode, text]) => (await import('/questions.js')).question(mode, text)"
    for label in LABELS:
        assert page.evaluate(ask, ["point", label]) == point_question(label)
        assert page.evaluate(ask, ["count", label]) == count_question(label)
    assert page.evaluate(ask, ["caption", ""]) == caption_question()
    assert page.evaluate(ask, ["point", " ?"]) == ""
    show = "async ([text, complete]) => (await import('/questions.js')).readable(text, complete)"
    for text in (
        CUPS,
        'a <point x="1.0" y="2.0" alt="b">b</point> < c',
        "1 < 2 <points",
        '<tracks coords="1 2 3">d</tracks>',
    ):
        assert page.evaluate(show, [text, True]) == readable(text).strip()
    whole = 'a < b <point x="1.0" y="2.0" alt="c">c</point> d'
    seen = [page.evaluate(show, [whole[:end], False]) for end in range(len(whole) + 1)]
    assert all(readable(whole).startswith(part) for part in seen)
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(seen))
