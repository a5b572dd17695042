"""The page in a real browser; skipped where there is no Chromium with playwright."""

import json
import shutil
import socket
import urllib.error
import urllib.request

import cv2
import numpy as np
import pytest
from conftest import gray_frames, write_clip
from pages import assignment_view

build_page = pytest.importorskip("dsrcnn.app.page", exc_type=ImportError).build_page
serving = pytest.importorskip("dsrcnn.app.server", exc_type=ImportError).serving
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("needs Chromium", allow_module_level=True)
SLOW = 60_000  # milliseconds; the machine may be busy


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(detector, photos, tmp_path_factory):
    view = assignment_view(detector, tmp_path_factory.mktemp("labeled"))

    def build():
        return build_page(detector, [str(photos / "a.png")], view)

    with serving(build, port=None, limit=1) as address:
        yield address


@pytest.fixture
def page(browser, address):
    """An open page; requests to other machines are errors."""
    page = browser.new_page()
    foreign = []
    page.on("request", lambda r: foreign.append(r.url) if "//127.0.0.1" not in r.url else None)
    page.set_default_timeout(SLOW)
    page.goto(address)
    page.wait_for_selector("#image")
    yield page
    page.close()
    assert [url for url in foreign if url.startswith("http")] == []


def ask(address, path, **changes):
    """Send a request for a path to the interface that the page itself uses."""
    image = {"path": str(path), **changes}
    url = f"{address}/gradio_api/call/detect"
    body = json.dumps({"data": [image, 0, 2]}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    event = json.loads(urllib.request.urlopen(request, timeout=60).read())["event_id"]
    return urllib.request.urlopen(f"{url}/{event}", timeout=60).read().decode()


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_requests_cannot_name_files_of_this_machine_or_addresses(address, photos, meta):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        other.settimeout(0.5)
        places = (photos / "a.png", photos, "/etc/passwd")
        places += (f"http://127.0.0.1:{other.getsockname()[1]}/a.png",)
        for place in places:
            try:
                answer = ask(address, place, **meta)
            except urllib.error.HTTPError as error:
                answer = f"event: error {error}"
            assert "event: error" in answer
            assert "detections in" not in answer
        with pytest.raises(TimeoutError):
            other.accept()


def test_the_model_serves_one_request_at_a_time(detector):
    page = build_page(detector)
    events = [f for f in page.fns.values() if f.api_name in ("detect", "video")]
    assert {f.concurrency_id for f in events} == {"model"}
    assert len(events) == 2


def upload(page, place, path):
    page.set_input_files(f"{place} input[type=file]", str(path))


def message(page):
    page.wait_for_selector("[data-testid=toast-body]")
    return page.inner_text("[data-testid=toast-body]")


def set_slider(page, place, value):
    page.fill(f"{place} input[type=number]", str(value))
    page.press(f"{place} input[type=number]", "Enter")


def picture(page, place):
    return page.get_attribute(f"{place} img", "src")


def expect_text(page, place, part):
    playwright.expect(page.locator(place)).to_contain_text(part, timeout=SLOW)


@pytest.mark.slow
def test_an_upload_is_detected_and_sliders_change_what_is_shown(page, photos, detector):
    set_slider(page, "#threshold", 0)
    upload(page, "#image", photos / "b.jpg")
    result = detector.predict(photos / "b.jpg", threshold=0)
    height, width = result.size
    expect_text(page, "#summary", f"{len(result)} detections in {width} x {height} pixels")
    expect_text(page, "#table", result.names[0])
    last = picture(page, "#detections")
    set_slider(page, "#stage", 1)
    page.wait_for_function(
        "before => document.querySelector('#detections img').src != before", arg=last
    )
    set_slider(page, "#threshold", 1)
    expect_text(page, "#summary", "0 detections")


def test_a_sample_is_detected_at_a_click(page):
    page.get_by_role("button", name="a.png").or_(page.locator(".gallery-item")).first.click()
    expect_text(page, "#summary", "detections in")


def test_files_that_are_no_images_or_too_large_are_one_message(page, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    upload(page, "#image", tmp_path / "text.jpg")
    shown = message(page)
    assert "text.jpg" in shown
    assert "cannot be read" in shown
    page.reload()
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 800, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "large.png"), pixels)
    upload(page, "#image", tmp_path / "large.png")
    assert "exceed the maximum allowed size of 1.0 Mb" in message(page)


def test_the_view_of_assignments_compares_matchers(page):
    page.get_by_role("tab", name="Assignments").click()
    expect_text(page, "#assignment-summary", "objects at stage 2")
    page.get_by_label("Hungarian").click()
    expect_text(page, "#assignment-summary", "2 proposals for 2 objects at stage 2 (1.0 each)")
    set_slider(page, "#assignment-stage", 1)
    expect_text(page, "#assignment-summary", "at stage 1")


def test_a_video_comes_back_and_plays(page, tmp_path):
    page.get_by_role("tab", name="Videos").click()
    page.get_by_role("button", name="Detect").click()
    assert "Upload a video first" in message(page)
    frames = gray_frames(range(0, 240, 40), height=64, width=96)
    upload(page, "#video", write_clip(tmp_path / "clip.mp4", frames))
    page.wait_for_selector("#video >> text=clip")
    page.get_by_role("button", name="Detect").click()
    expect_text(page, "#video-summary", "6 frames, ")
    width = "document.querySelector('#video-detections video')?.videoWidth"
    page.wait_for_function(f"{width} > 0")
    assert page.evaluate(width) == 96
