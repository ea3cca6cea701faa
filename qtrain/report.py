"""run.json as people read it: one table at the end of the run, and report.html."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

from rich.markup import escape as rich_escape
from rich.table import Table

from qtrain.console import console

STAGES = {"float": "float", "ptq": "PTQ (rounded)", "qat": "QAT"}


def summary_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the closing table: a stage each, then what each runtime computes."""
    rows: list[dict[str, Any]] = []
    for key, title in STAGES.items():
        if key in run["stages"]:
            rows.append({"stage": title, **run["stages"][key]})
    for entry in run["exports"]:
        receipt = entry["receipt"]
        runtime = {name: pair["runtime"] for name, pair in receipt["metric"].items()}
        latency = receipt.get("latency_ms", {})
        rows.append(
            {"stage": f"deployed ({entry['runtime']})", **runtime, "bytes": entry["bytes"], "latency_ms": latency.get("quantized", {})}
        )
        if "float" in latency:
            rows[0] |= {"bytes": receipt.get("float_bytes"), "latency_ms": latency["float"]}
    return rows


def _columns(rows: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    metrics = [m for m in ("accuracy", "loss", "perplexity", "agreement", "kl") if any(m in row for row in rows)]
    shapes = list(dict.fromkeys(shape for row in rows for shape in row.get("latency_ms", {})))
    return metrics, shapes


def _cells(row: dict[str, Any], metrics: list[str], shapes: list[str]) -> list[str]:
    cells = [row["stage"]]
    for metric in metrics:
        value = row.get(metric)
        cells.append("" if value is None else f"{100 * value:.2f} %" if metric in ("accuracy", "agreement") else f"{value:.4f}")
    cells.append(f"{row['bytes'] / 1e6:.2f} MB" if row.get("bytes") else "")
    cells += [f"{row['latency_ms'][s]:.2f} ms" if s in row.get("latency_ms", {}) else "" for s in shapes]
    return cells


def print_summary(run: dict[str, Any], folder: Path) -> None:
    """The closing table and where the files are."""
    rows = summary_rows(run)
    metrics, shapes = _columns(rows)
    table = Table(title=f"{run['recipe']}: {run['status']}")
    table.add_column("stage")
    for name in [*metrics, "size", *(f"latency {s}" for s in shapes)]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(rich_escape(c) for c in _cells(row, metrics, shapes)))
    console.print(table)
    for entry in run["exports"]:
        receipt = entry["receipt"]
        verdict = "[green]passed[/]" if receipt["passed"] else "[red]failed[/]"
        console.print(
            f"receipt {entry['target']}: {verdict}  {receipt['tensors_bit_exact']} of {receipt['tensors']} tensors bit-exact, "
            f"logits NMSE {receipt['logits_nmse']:.2g}, top-1 agreement {100 * receipt['top1_agreement']:.2f} %"
        )
        console.print(f"  {entry['path']}", soft_wrap=True)
    console.print(f"latency: batch x tokens, medians on this machine. report: {folder / 'report.html'}", soft_wrap=True, style="dim")


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #1a7f37; --bad: #cf222e; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin-bottom: .25rem; } h2 { font-size: 1.1rem; margin-top: 2.25rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
thead th { font-weight: 600; background: var(--soft); }
.wide { overflow-x: auto; } .passed { color: var(--good); } .failed { color: var(--bad); } .dim { opacity: .7; }
.bar { display: inline-block; height: .6em; background: #4078c0; border-radius: 2px; vertical-align: middle; }
pre { background: var(--soft); padding: 1rem; overflow-x: auto; border-radius: 6px; font-size: 13px; }
"""


def write_html(run: dict[str, Any], path: Path) -> None:
    """Write report.html, a self-contained page, under a temporary name first."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(html(run), encoding="utf-8")
    os.replace(temporary, path)


def html(run: dict[str, Any]) -> str:
    """The page as text."""
    rows = summary_rows(run)
    metrics, shapes = _columns(rows)
    head = ["stage", *metrics, "size", *(f"latency {s}" for s in shapes)]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>{escape(run['recipe'])}</title>",
        f"<style>{_STYLE}</style><h1>{escape(run['recipe'])} <span class='{run['status']}'>{run['status']}</span></h1>",
        f"<p class='dim'>seed {run['seed']}, {sum(run['timing_s'].values()):.0f} s, peak memory {run['peak_rss_bytes'] / 1e9:.2f} GB; "
        "latency is batch x tokens, medians on the machine of the run.</p>",
        _table(head, [_cells(row, metrics, shapes) for row in rows]),
        *(_receipt(entry) for entry in run["exports"]),
        _layers(run),
        "<h2>Left in float</h2><p>" + (", ".join(map(escape, run["kept_float"])) or "nothing") + "</p>",
        "<h2>Fallbacks</h2>"
        + (_table(["what", "why"], [[f["name"], f["why"]] for f in run["fallbacks"]]) if run["fallbacks"] else "<p>none</p>"),
        "<h2>Time</h2>" + _table(["stage", "seconds"], [[k, f"{v:.1f}"] for k, v in run["timing_s"].items()]),
        "<h2>Configuration</h2><pre>" + escape(_yaml(run["config"])) + "</pre>",
        "<h2>Versions</h2><p>" + ", ".join(f"{escape(k)} {escape(v)}" for k, v in run["versions"].items()) + "</p></html>",
    ]
    return "\n".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _receipt(entry: dict[str, Any]) -> str:
    receipt = entry["receipt"]
    rows = [
        ["tensors equal to training's, to the bit", f"{receipt['tensors_bit_exact']} of {receipt['tensors']}"],
        ["logits NMSE", f"{receipt['logits_nmse']:.3g}"],
        ["logits, largest difference", f"{receipt['logits_max_abs']:.3g}"],
        ["top-1 agreement", f"{100 * receipt['top1_agreement']:.2f} %"],
        *([f"{name}: training / runtime", f"{pair['training']:.6f} / {pair['runtime']:.6f}"] for name, pair in receipt["metric"].items()),
        ["file", f"{entry['path']} ({entry['bytes'] / 1e6:.2f} MB)"],
    ]
    verdict = "passed" if receipt["passed"] else "failed"
    return f"<h2>Receipt: {escape(entry['target'])} in {escape(entry['runtime'])} <span class='{verdict}'>{verdict}</span></h2>" + _table(
        ["", ""], rows
    )


def _layers(run: dict[str, Any]) -> str:
    body = []
    for layer in run["quantized"]:
        db = layer["sqnr_db"]
        bar = f"<span class='bar' style='width:{min(max(db or 60, 0), 60) * 1.5:.0f}px'></span> {'exact' if db is None else f'{db:.1f} dB'}"
        cells = [
            escape(layer["name"]),
            escape(layer["grid"]),
            escape(layer.get("activation_grid", "float")),
            " x ".join(map(str, layer["shape"])),
        ]
        body.append("<tr>" + "".join(f"<td>{c}</td>" for c in [*cells, bar]) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in ("layer", "weight grid", "input", "shape", "SQNR"))
    return f"<h2>Layers on a grid</h2><div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _yaml(config: dict[str, Any]) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config))
