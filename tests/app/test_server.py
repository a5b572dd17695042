"""The server of the page: for this machine and its own page only."""

import urllib.error
import urllib.request

import pytest

gradio = pytest.importorskip("gradio")
serving = pytest.importorskip("dsrcnn.app.server", exc_type=ImportError).serving


@pytest.fixture(scope="module")
def address():
    def build():
        with gradio.Blocks(analytics_enabled=False) as page:
            gradio.Markdown("hello")
        return page

    with serving(build, port=None, limit=1) as address:
        yield address


@pytest.mark.parametrize(("path", "headers", "status"), [
    ("config", {}, 200),
    ("config", {"Host": "localhost"}, 200),  # by a tunnel
    ("config", {"Origin": "http://localhost:7860"}, 200),
    ("config", {"Host": "evil.example:7860", "Origin": "http://evil.example:7860"}, 403),
    ("config", {"Host": "evil.example"}, 403),
    ("config", {"Origin": "http://evil.example"}, 403),
    ("config", {"Origin": "null"}, 403),
    ("config", {"Origin": "http://127.0.0.1.evil.example"}, 403),
    ("gradio_api/upload", {"Origin": "http://evil.example"}, 403),
])  # fmt: skip
def test_other_pages_and_names_are_refused(address, path, headers, status):
    request = urllib.request.Request(f"{address}/{path}", headers=headers)
    if path.endswith("upload"):
        request.data = b"x"
    try:
        answer = urllib.request.urlopen(request, timeout=60).status
    except urllib.error.HTTPError as error:
        answer = error.code
    assert answer == status
