"""What the app shows, as HTML and as files to download; every text from outside is escaped."""

import base64
import csv
import io
import json
from html import escape
from typing import Any

from medct.app.scans import Engine, Scan, data_uri
from medct.common.formulas import as_text
from medct.reporting.findings import NO_PROBABILITY, Algorithm, Finding, shown_probability

CSS = """
.medct-banner { background: #a00000; color: white; font-weight: 600; padding: 10px 14px; border-radius: 6px; }
.medct-findings { border-collapse: collapse; width: 100%; font-size: 14px; }
table.medct-findings, table.medct-findings tr { border: 0 !important; }
table.medct-findings th, table.medct-findings td { padding: 3px 8px; text-align: left; border: 0 !important; }
table.medct-findings tbody tr { border-top: 1px solid rgba(128, 128, 128, 0.3) !important; }
table.medct-findings .number { text-align: right; font-variant-numeric: tabular-nums; }
table.medct-findings tr.above { font-weight: 700; }
.medct-message { border: 2px solid #a00000; padding: 8px 12px; border-radius: 6px; }
.medct-bar { position: relative; width: 120px; height: 12px; background: rgba(128, 128, 128, 0.25); }
.medct-bar i { position: absolute; left: 0; top: 0; bottom: 0; background: #808080; }
.above .medct-bar i { background: #d55e00; }
.below .medct-bar i { background: #0072b2; }
.medct-bar b { position: absolute; top: -3px; bottom: -3px; width: 2px; background: currentColor; }
.medct-slice img { width: 100%; max-width: 640px; display: block; margin: 0 auto; background: black; }
.medct-slice p, .medct-small { font-size: 13px; opacity: 0.85; overflow-wrap: anywhere; }
.medct-scroll { overflow-x: auto; }
@media (max-width: 640px) { .medct-bar { width: 50px; } }
"""


def banner(algorithm: Algorithm) -> str:
    """What stands on top."""
    said = f"{algorithm.warning} Do not upload patient data. Nothing is kept."
    return f'<div class="medct-banner" role="alert">{escape(said)}</div>'


def model_line(algorithm: Algorithm) -> str:
    """Which model answers."""
    said = "; ".join([f"{algorithm.name} {algorithm.version}", *algorithm.parameters])
    return f'<p class="medct-small">{escape(said)}</p>'


def message(text: str) -> str:
    """What could not be done, and why."""
    return f'<div class="medct-message" role="alert">{escape(text)}</div>'


def findings_table(scan: Scan) -> str:
    """A row a finding: score, operating point and on which side of it, probability where any is calibrated."""
    has_probabilities = any(finding.probability is not None for finding in scan.findings)
    titles = ["<th>finding</th>", '<th class="number">score</th>', "<th></th>", "<th>operating point</th>"]
    titles += ['<th class="number">probability at the site</th>'] if has_probabilities else []
    rows = "".join(_row(finding, has_probabilities) for finding in scan.findings)
    notes = "".join(f"<p>Note: {escape(note)}.</p>" for note in scan.notes)
    return (
        f"<p><b>{escape(scan.name)}</b></p>{notes}"
        f'<div class="medct-scroll"><table class="medct-findings"><thead><tr>{"".join(titles)}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        f'<p class="medct-small">{NO_PROBABILITY} A line in a bar is the operating point.</p>'
    )


def _row(finding: Finding, has_probabilities: bool) -> str:
    kind = {True: "above", False: "below", None: "none"}[finding.is_present]
    score, threshold = finding.figures
    tick, called = "", kind
    if finding.threshold is not None:
        tick = f'<b style="left: {100 * finding.threshold:.1f}%"></b>'
        called = f"{kind} {threshold}"
    bar = f'<div class="medct-bar" aria-hidden="true"><i style="width: {100 * finding.score:.1f}%"></i>{tick}</div>'
    cells = [f"<td>{escape(finding.label)}</td>", f'<td class="number">{score}</td>', f"<td>{bar}</td>"]
    cells.append(f"<td>{called}</td>")
    if has_probabilities:
        probability = "" if finding.probability is None else shown_probability(finding.probability)
        cells.append(f'<td class="number">{escape(probability)}</td>')
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def slice_view(engine: Engine, scan: Scan, index: int, window: str, label: str | None) -> str:
    """A slice, with its description for those who do not see it.

    Args:
        engine: The model.
        scan: The scan.
        index: From 0, at the feet.
        window: Which window of HU.
        label: The finding whose map lies over it; `None`: none.
    """
    caption = f"{window} window, {scan.slices.caption(index)}"
    if label is not None:
        caption += f"; red adds to the score of {label}, blue takes from it: a debugging aid, not a location"
    source = data_uri(engine.picture(scan, index, window, label))
    text = escape(f"Axial slice: {caption}. The patient's right is on the left.")
    return f'<div class="medct-slice"><img alt="{text}" src="{source}"><p>{escape(caption)}</p></div>'


def as_json(algorithm: Algorithm, scan: Scan) -> dict[str, Any]:
    """The findings of a scan for programs.

    Args:
        algorithm: What they were made with.
        scan: The scan.
    """
    findings = [
        {
            "label": each.label,
            "score": each.score,
            "operating_point": each.threshold,
            "present": each.is_present,
            "probability": each.probability,
        }
        for each in scan.findings
    ]
    model = {"software": f"{algorithm.name} {algorithm.version}", "parameters": algorithm.parameters}
    about = {"scan": scan.name, "warning": algorithm.warning, **model, "notes": list(scan.notes)}
    return {**about, "findings": findings}


def downloads(algorithm: Algorithm, scan: Scan) -> str:
    """Links that hold their files, so that none lies on the server.

    Args:
        algorithm: What the findings were made with.
        scan: The scan.
    """
    found = as_json(algorithm, scan)
    table = io.StringIO()
    table.write(f"# {algorithm.warning}\n")
    writer = csv.DictWriter(table, list(found["findings"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**each, "label": as_text(each["label"])} for each in found["findings"])
    files = {
        "findings.csv": ("text/csv", table.getvalue()),
        "findings.json": ("application/json", json.dumps(found, indent=2, ensure_ascii=False) + "\n"),
    }
    links = [
        f'<a download="{name}" href="data:{kind};base64,{base64.b64encode(text.encode()).decode()}">{name}</a>'
        for name, (kind, text) in files.items()
    ]
    return f"<p>Download: {' &middot; '.join(links)}</p>"
