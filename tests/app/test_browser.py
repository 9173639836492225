"""The app in a real browser: `make test-app`. Skipped where gradio, playwright or chromium are missing."""

import base64
import io
import os
import re
import shutil
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import PIL.Image
import pytest
from app_engine import centre_of_bright, engine_of, write_marked

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: chromium)"),
]
expect = playwright.expect
MAX_FILE_BYTES = 2**21
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def address():
    """The page, served by this process."""
    from medct.app.page import build, launch_options

    page = build(engine_of())
    _, address, _ = page.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options(MAX_FILE_BYTES)
    )
    yield address
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """`visit()`: a session of its own. Whatever it asks for must come from this machine."""
    contexts, asked = [], []

    def visit():
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        page.goto(address)
        page.wait_for_selector("#phantom")
        return page

    yield visit
    for context in contexts:
        context.close()
    hosts = {urlparse(url).hostname for url in asked if urlparse(url).scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}


def take_phantom(page):
    page.click("#phantom")
    page.wait_for_selector("#picture img")


def upload(page, path: Path):
    page.set_input_files("#file input[type=file]", path)


def picture_of(page) -> np.ndarray:
    source = page.locator("#picture img").get_attribute("src")
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def caption_of(page):
    return page.locator("#picture p")


def move_to(page, number: int):
    page.fill("#slice input[type=number]", str(number))
    page.keyboard.press("Enter")
    expect(caption_of(page)).to_contain_text(f"slice {number} of", timeout=PATIENCE_MS)


def test_the_phantom_has_eighteen_rows_and_the_slider_moves(visit):
    page = visit()
    expect(page.locator(".medct-banner")).to_contain_text("Research only")
    expect(page.locator(".medct-banner")).to_contain_text("Do not upload patient data")
    take_phantom(page)
    expect(page.locator("#findings tbody tr")).to_have_count(18)
    move_to(page, 20)
    before = picture_of(page)
    move_to(page, 40)
    assert not np.array_equal(picture_of(page), before)
    page.get_by_label("Soft tissue").check()
    expect(caption_of(page)).to_contain_text("Soft tissue window, slice 40")
    assert "patient's right is on the left" in page.locator("#picture img").get_attribute("alt")


def test_a_finding_jumps_to_its_slice_and_the_overlay_is_off_at_first(visit):
    page = visit()
    take_phantom(page)
    expect(page.locator("#overlay input")).not_to_be_checked()
    engine = engine_of()
    scan = engine.phantom()
    where = {each.label: engine.strongest_slice(scan, each.label) for each in scan.findings}
    shown_first = max(scan.findings, key=lambda each: each.score).label
    label = next(each for each in where if where[each] != where[shown_first])
    page.click("#finding input")
    page.get_by_role("option", name=label, exact=True).click()
    expect(caption_of(page)).to_contain_text(f"slice {where[label] + 1} of")
    before = picture_of(page)
    page.check("#overlay input")
    expect(caption_of(page)).to_contain_text(f"score of {label}")
    assert not np.array_equal(picture_of(page), before)
    assert "debugging aid" in page.locator("#overlay").inner_text()


def test_findings_in_words_and_downloads(visit):
    page = visit()
    take_phantom(page)
    page.fill("#words textarea", "Rib fracture")
    page.click("#ask")
    expect(page.locator("#findings tbody tr")).to_have_count(19)
    with page.expect_download() as download:
        page.get_by_role("link", name="findings.csv").click()
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert text.startswith("# Research only") and "\nRib fracture," in text


def test_letters_are_right_for_a_flipped_scan(visit, tmp_path):
    page = visit()
    for index, flips in enumerate([(), (0,), (0, 1, 2)]):
        upload(page, write_marked(tmp_path / f"scan-{index}.nii.gz", flips))
        expect(page.locator("#findings p b")).to_have_text(f"scan-{index}.nii.gz")
        page.get_by_label("Bone").check()
        expect(caption_of(page)).to_contain_text("Bone window")
        row, column = centre_of_bright(picture_of(page))
        assert row < 0.35 and column < 0.35, "in front is above, the patient's right is on the left"


def test_a_wrong_file_gives_its_message_and_leaves_nothing_behind(visit, tmp_path):
    page = visit()
    take_phantom(page)
    (tmp_path / "wrong.nii.gz").write_text("nothing")
    upload(page, tmp_path / "wrong.nii.gz")
    expect(page.locator("#message")).to_contain_text("wrong.nii.gz: it is not a NIfTI")
    expect(page.locator("#findings tbody tr")).to_have_count(0)
    expect(page.locator("#picture img")).to_have_count(0)
    take_phantom(page)
    expect(page.locator(".medct-message")).to_have_count(0)


def test_a_file_that_is_too_large_is_refused(visit, tmp_path):
    page = visit()
    (tmp_path / "large.nii").write_bytes(bytes(MAX_FILE_BYTES + 1))
    upload(page, tmp_path / "large.nii")
    expect(page.get_by_text(re.compile("maximum allowed size", re.IGNORECASE)).first).to_be_visible()
    expect(page.locator("#findings tbody tr")).to_have_count(0)


def test_two_sessions_see_their_own_scans(visit, tmp_path):
    one, other = visit(), visit()
    upload(one, write_marked(tmp_path / "one.nii.gz"))
    expect(one.locator("#findings p b")).to_have_text("one.nii.gz")
    take_phantom(other)
    expect(other.locator("#findings p b")).to_have_text("synthetic phantom")
    move_to(one, 5)
    expect(caption_of(one)).to_contain_text("of 20")
    expect(one.locator("#findings p b")).to_have_text("one.nii.gz")
    third = visit()
    expect(third.locator("#findings tbody tr")).to_have_count(0)


def test_uploads_are_gone_once_they_are_read(visit, tmp_path):
    page = visit()
    upload(page, write_marked(tmp_path / "kept.nii.gz"))
    expect(page.locator("#findings tbody tr")).to_have_count(18)
    left = [path for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*") if path.is_file() and path.stat().st_size]
    assert left == []


def test_programs_have_one_address(address, tmp_path):
    client_of = pytest.importorskip("gradio_client")
    client = client_of.Client(address, verbose=False)
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/predict"]
    found = client.predict(client_of.handle_file(write_marked(tmp_path / "scan.nii.gz")), api_name="/predict")
    assert len(found["findings"]) == 18 and found["warning"].startswith("Research only")
    (tmp_path / "wrong.nii.gz").write_text("nothing")
    with pytest.raises(client_of.exceptions.AppError, match="not a NIfTI"):
        client.predict(client_of.handle_file(tmp_path / "wrong.nii.gz"), api_name="/predict")
    left = [path for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*") if path.is_file() and path.stat().st_size]
    assert left == []
