"""The page in the browser, made with gradio.

Unusual:
- Pictures and downloads are part of the page, not files of the server. The only file is the upload, which is removed as
  soon as it is read.
- gradio's usage statistics and its history of runs are off; nothing is asked of another machine.
"""

import atexit
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from medct.app import views
from medct.app.scans import PHANTOM, Engine, Scan, ScanError
from medct.common.errors import OK
from medct.errors_medct import MedCTError
from medct.inference.slices import WINDOWS_HU

INSTALL = "pip install gradio"
_KEPT_S = 3600
"""How long a session's scan stays after its last use."""
_SWEEP_S = 300
_MOST_WAITING = 20
_FILE = "A scan: NIfTI, NRRD, MetaImage or a zip of DICOM files"
_OVERLAY = "Overlay where the score comes from: a debugging aid, not the location of the finding"


class AppError(MedCTError, RuntimeError):
    """An app that cannot be started; the message says why and what to do."""


def import_gradio() -> Any:
    """gradio, with all that would call home switched off.

    Raises:
        AppError: If it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise AppError(f"The app needs gradio, which is not installed: {INSTALL}.") from error
    return gradio


def own_temporary_folder() -> Path:
    """Where gradio puts uploads until they are read; removed at the end of the process.

    An upload is removed as soon as it is read. What never gets so far (the connection breaks, the page is closed) is
    removed when it is old.
    """
    folder = Path(tempfile.mkdtemp(prefix="medct-app-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)

    def sweep_for_ever() -> None:
        while folder.exists():
            sweep(folder, _KEPT_S)
            time.sleep(_SWEEP_S)

    threading.Thread(target=sweep_for_ever, name="sweep uploads", daemon=True).start()
    return folder


def sweep(folder: Path, age_s: float) -> None:
    """Remove files that were last written some time ago.

    Args:
        folder: Where to look.
        age_s: How long ago, seconds.
    """
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # gone in the meantime
            if path.is_file() and time.time() - path.stat().st_mtime > age_s:
                path.unlink()


class _Answers:
    """What the page shows after each thing that a user does.

    Args:
        gr: gradio.
        engine: The model that answers.
    """

    def __init__(self, gr: Any, engine: Engine):
        self.gr, self.engine = gr, engine

    def take_file(self, path: str | None, window: str) -> list:
        """A scan that was dropped; the field for it is empty again."""
        if path is None:
            return [self.gr.skip()] * 9
        try:
            return [*self._shown(self.engine.read(path), window), None]
        except ScanError as error:
            return [*self._refused(error), None]
        finally:
            _forget(path)

    def take_phantom(self, window: str) -> list:
        return self._shown(self.engine.phantom(), window)

    def _shown(self, scan: Scan, window: str) -> list:
        """A scan that was just read, in all parts of the page; the overlay is off."""
        for note in scan.notes:
            self.gr.Warning(f"{scan.name}: {note}.")
        first = max(scan.findings, key=lambda each: (each.is_present or False, each.score)).label
        choice = self.gr.Dropdown(choices=scan.labels, value=first)
        return [scan, "", *self._findings(scan), choice, *self._strongest(scan, first, window, False), False]

    def _refused(self, error: ScanError) -> list:
        """Why there is no scan; nothing of one that was there before stays beside it."""
        slider = self.gr.Slider(minimum=1, maximum=2, value=1, interactive=False)
        nothing = self.gr.Dropdown(choices=[], value=None)
        return [None, views.message(str(error)), "", "", nothing, slider, "", False]

    def _findings(self, scan: Scan) -> tuple:
        return views.findings_table(scan), views.downloads(self.engine.algorithm, scan)

    def _strongest(self, scan: Scan, label: str | None, window: str, overlay: bool) -> tuple:
        """The slider and the picture at the strongest slice of a finding."""
        index = self.engine.strongest_slice(scan, label)
        slider = self.gr.Slider(minimum=1, maximum=len(scan.slices), value=index + 1, interactive=True)
        return slider, self.draw(scan, index + 1, window, label, overlay)

    def draw(self, scan: Scan | None, number: float, window: str, label: str | None, overlay: bool) -> str:
        if scan is None:
            return ""
        index = min(max(int(number) - 1, 0), len(scan.slices) - 1)
        is_mapped = overlay and self.engine.can_be_asked
        return views.slice_view(self.engine, scan, index, window, label if is_mapped else None)

    def choose(self, scan: Scan | None, label: str | None, window: str, overlay: bool) -> tuple:
        return (self.gr.skip(), "") if scan is None else self._strongest(scan, label, window, overlay)

    def ask(self, scan: Scan | None, text: str) -> list:
        """Findings in words, beside the model's own."""
        if scan is None:
            return [None, views.message("Load a scan first."), "", "", self.gr.skip()]
        try:
            remark = self.engine.ask(scan, text)
        except ScanError as error:
            return [scan, views.message(str(error)), *self._findings(scan), self.gr.skip()]
        said = "" if remark is None else views.message(remark)
        return [scan, said, *self._findings(scan), self.gr.Dropdown(choices=scan.labels)]

    def predict(self, path: str) -> dict[str, Any]:
        """For programs: a file in, JSON out."""
        try:
            return views.as_json(self.engine.algorithm, self.engine.read(path))
        except ScanError as error:
            raise self.gr.Error(str(error), print_exception=False) from None
        finally:
            _forget(path)


def build(engine: Engine) -> Any:
    """The page, as gradio's `Blocks`.

    Args:
        engine: The model that answers.
    """
    gr = import_gradio()
    own_temporary_folder()
    with gr.Blocks(title="MedCT", analytics_enabled=False) as page:
        gr.HTML(views.banner(engine.algorithm))
        gr.Markdown("# MedCT: findings in one chest CT")
        with gr.Row():
            with gr.Column(scale=5):
                parts = _findings_column(gr, engine)
            with gr.Column(scale=4):
                parts |= _picture_column(gr, engine)
        parts["state"] = gr.State(None, time_to_live=_KEPT_S)
        answers = _Answers(gr, engine)
        _connect(SimpleNamespace(**parts), answers)
        _add_endpoint(gr, answers.predict)
    return page.queue(max_size=_MOST_WAITING, default_concurrency_limit=1)


def _findings_column(gr: Any, engine: Engine) -> dict[str, Any]:
    """What a scan is given with, and what was found in it, by name."""
    parts = {
        "file": gr.File(label=_FILE, height=140, elem_id="file"),
        "phantom": gr.Button(f"or take the {PHANTOM}", elem_id="phantom"),
        "message": gr.HTML(elem_id="message"),
        "table": gr.HTML(elem_id="findings"),
        "links": gr.HTML(elem_id="downloads"),
    }
    with gr.Group(visible=engine.can_be_asked):
        parts["words"] = gr.Textbox(label="Other findings in words, one per line", lines=2, elem_id="words")
        parts["asked"] = gr.Button("Ask", elem_id="ask")
    gr.HTML(views.model_line(engine.algorithm))
    return parts


def _picture_column(gr: Any, engine: Engine) -> dict[str, Any]:
    """The picture, and what decides what it shows, by name."""
    bounds = {"minimum": 1, "maximum": 2, "value": 1, "step": 1, "interactive": False}
    jumps = {"label": "Finding: jumps to its strongest slice", "visible": engine.can_be_asked}
    return {
        "finding": gr.Dropdown([], **jumps, elem_id="finding"),
        "window": gr.Radio(list(WINDOWS_HU), value=next(iter(WINDOWS_HU)), label="Window", elem_id="window"),
        "number": gr.Slider(**bounds, label="Slice, from the feet", elem_id="slice", buttons=[]),
        "picture": gr.HTML(elem_id="picture"),
        "overlay": gr.Checkbox(False, label=_OVERLAY, elem_id="overlay", visible=engine.can_be_asked),
    }


def _connect(on: SimpleNamespace, answers: _Answers) -> None:
    """What happens when a user does something. What takes the model waits in line; a picture does not."""
    own = {"api_visibility": "private"}
    model = {**own, "concurrency_id": "model", "concurrency_limit": 1}
    quick = {**own, "queue": False, "show_progress": "hidden", "trigger_mode": "always_last"}
    found = [on.state, on.message, on.table, on.links, on.finding]
    result = [*found, on.number, on.picture, on.overlay]
    look = [on.window, on.finding, on.overlay]
    on.file.upload(answers.take_file, [on.file, on.window], [*result, on.file], **model)
    on.phantom.click(answers.take_phantom, on.window, result, **model)
    on.asked.click(answers.ask, [on.state, on.words], found, **model)
    on.finding.input(answers.choose, [on.state, on.finding, on.window, on.overlay], [on.number, on.picture], **model)
    for listen in (on.number.change, on.window.input, on.overlay.input):
        listen(answers.draw, [on.state, on.number, *look], on.picture, **quick)


def _forget(path: str) -> None:
    """Remove an upload, and its folder if nothing else lies there. A program may have named a folder: that stays."""
    with contextlib.suppress(OSError):
        Path(path).unlink()
        Path(path).parent.rmdir()


def _add_endpoint(gr: Any, predict: Any) -> None:
    """The one address for programs: a file in, JSON out."""
    with gr.Group(visible=False):
        given, found = gr.File(type="filepath"), gr.JSON()
        gr.Button("predict").click(
            predict, given, found, api_name="predict", concurrency_id="model", concurrency_limit=1
        )


def serve(engine: Engine, host: str, port: int | None, max_file_bytes: int) -> None:
    """Serve the page until the process is stopped.

    Args:
        engine: The model that answers.
        host: Address to listen on.
        port: Port to listen on; `None`: the first free one from 7860.
        max_file_bytes: Largest file that is taken.

    Raises:
        AppError: If gradio is missing, or nothing can listen there.
    """
    page = build(engine)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(OK))  # else the temporary folder would stay
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, **launch_options(max_file_bytes)
        )
    except OSError as error:
        raise AppError(f"{host}:{port}: nothing can listen there. Pass another --port, or --host.") from error
    print(f"MedCT: {address}", flush=True)
    page.block_thread()


def launch_options(max_file_bytes: int) -> dict[str, Any]:
    """How the page is served: nothing shared, nothing remembered, nothing asked of others.

    Args:
        max_file_bytes: Largest file that is taken.
    """
    return {
        "css": views.CSS,
        "max_file_size": max_file_bytes,
        "share": False,
        "ssr_mode": False,
        "run_history": False,
        "enable_monitoring": False,
        "footer_links": ["api"],
    }
