"""run.json as people read it: one table at the end of the run, and report.html."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

from rich.markup import escape as rich_escape
from rich.table import Table

from qtrain.console import console

STAGES = {
    "float": "float",
    "ptq": "PTQ (rounded)",
    "qat": "QAT",
    "adapter_start": "start",
    "adapter": "with adapter",
    "merged_float": "merged, float",
    "merged_rounded": "merged, rounded",
    "merged_consistent": "merged",
    "converted": "converted",
}
METRICS = {
    "accuracy": "accuracy",
    "perplexity": "perplexity",
    "cosine": "cosine to float",
    "loss": "loss",
    "agreement": "agreement with float",
    "kl": "KL to float",
}
SHARES = ("accuracy", "agreement")
MOST_COLUMNS = 5
"""Stages that fit beside each other into a terminal."""
ANALYSIS_ROWS = 15
"""How many of the most harmful layers are shown."""


def columns(run: dict[str, Any]) -> list[dict[str, Any]]:
    """What is compared: a column for each stage, then one for what each runtime computes."""
    found: list[dict[str, Any]] = []
    for key, title in STAGES.items():
        if key in run["stages"]:
            found.append({"title": "base" if key == "ptq" and "adapter" in run else title, **run["stages"][key]})
    for entry in run["exports"]:
        receipt = entry["receipt"]
        runtime = {name: pair["runtime"] for name, pair in receipt["metric"].items()}
        latency = receipt.get("latency_ms") or {}
        title = f"deployed ({entry['runtime'].split(' (')[0]})"
        found.append({"title": title, **runtime, "bytes": entry["bytes"], "latency_ms": latency.get("quantized", {})})
        speed = receipt.get("tokens_per_s") or {}
        found[-1]["tokens_per_s"] = speed.get("quantized", {})
        if "float" in latency:
            found[0] |= {"bytes": receipt.get("float_bytes"), "latency_ms": latency["float"]}
        elif receipt.get("float_bytes"):
            found[0] |= {"bytes": receipt["float_bytes"], "tokens_per_s": speed.get("float", {})}
    return found


def summary(run: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The closing table as text: its head, and its rows; a column for each stage, or, where there are many, a row."""
    stages = columns(run)
    rows = [[label, *(_metric(key, c.get(key)) for c in stages)] for key, label in METRICS.items() if any(key in c for c in stages)]
    if any(c.get("bytes") for c in stages):
        rows.append(["size", *(f"{c['bytes'] / 1e6:.2f} MB" if c.get("bytes") else "" for c in stages)])
    for shape in dict.fromkeys(shape for c in stages for shape in c.get("latency_ms", {})):
        times = [c.get("latency_ms", {}).get(shape) for c in stages]
        rows.append([f"latency, {shape.replace('x', ' x ')}", *("" if t is None else f"{t:.2f} ms" for t in times)])
    for kind in dict.fromkeys(kind for c in stages for kind in c.get("tokens_per_s", {})):
        rates = [c.get("tokens_per_s", {}).get(kind) for c in stages]
        rows.append([f"tokens per second, {kind}", *("" if r is None else f"{r:.0f}" for r in rates)])
    table = [["", *(c["title"] for c in stages)], *rows]
    if len(stages) > MOST_COLUMNS:
        table = [list(column) for column in zip(*table, strict=True)]
    return table[0], table[1:]


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if name in SHARES else f"{value:.4f}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def print_summary(run: dict[str, Any], folder: Path) -> None:
    """The closing table and where the files are."""
    head, rows = summary(run)
    table = Table(title=f"{run['recipe']}: {run['status']}", title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(rich_escape(cell) for cell in row))
    console.print(table)
    console.print(_legend(run), style="dim", soft_wrap=True)
    for entry in run["exports"]:
        receipt = entry["receipt"]
        verdict = "[green]passed[/]" if receipt["passed"] else "[red]failed[/]"
        console.print(
            f"receipt {entry['target']}: {verdict}, {receipt['tensors_bit_exact']} of {receipt['tensors']} tensors bit-exact"
            + _logits(receipt),
            soft_wrap=True,
        )
        for name, result in receipt.get("checks", {}).items():
            console.print(f"  {name}: {rich_escape(result)}", style="dim", soft_wrap=True)
        console.print(f"  {entry['path']}", soft_wrap=True)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def _logits(receipt: dict[str, Any]) -> str:
    """How near the logits are; nothing where PyTorch's were not computed (a streamed run)."""
    if any(pair["training"] is None for pair in receipt["metric"].values()):
        return ""
    nmse, same = _number(receipt["logits_nmse"], ".2g"), _number(receipt["top1_agreement"], ".2%")
    return f", logits NMSE {nmse}, top-1 agreement {same}"


def _legend(run: dict[str, Any]) -> str:
    """What the numbers of the closing table are."""
    if not run["exports"]:
        return "nothing was exported"
    if not any(entry["receipt"].get("latency_ms") for entry in run["exports"]):
        return "sizes (and tokens per second, medians on this machine) are of the written files; float: the same model, not quantized"
    return "latency: batch x tokens (or the shape of the images), medians on this machine; float: the same graph in float32"


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
    head, rows = summary(run)
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>{escape(run['recipe'])}</title>",
        f"<style>{_STYLE}</style><h1>{escape(run['recipe'])} <span class='{run['status']}'>{run['status']}</span></h1>",
        f"<p class='dim'>seed {run['seed']}, {sum(run['timing_s'].values()):.0f} s, peak memory {run['peak_rss_bytes'] / 1e9:.2f} GB; "
        f"{escape(_legend(run))}.</p>",
        _table(head, rows),
        *(_receipt(entry) for entry in run["exports"]),
        _adapter(run),
        _layers(run),
        _analysis(run.get("analysis", [])),
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
        ["logits NMSE", _number(receipt["logits_nmse"], ".3g")],
        ["logits, largest difference", _number(receipt["logits_max_abs"], ".3g")],
        ["top-1 agreement", _number(receipt["top1_agreement"], ".2%")],
        *(
            [f"{name}: training / runtime", f"{_number(pair['training'], '.6f')} / {_number(pair['runtime'], '.6f')}"]
            for name, pair in receipt["metric"].items()
        ),
        *([name.replace("_", " "), result] for name, result in receipt.get("checks", {}).items()),
        ["file", f"{entry['path']} ({entry['bytes'] / 1e6:.2f} MB)"],
    ]
    verdict = "passed" if receipt["passed"] else "failed"
    return f"<h2>Receipt: {escape(entry['target'])} in {escape(entry['runtime'])} <span class='{verdict}'>{verdict}</span></h2>" + _table(
        ["", ""], rows
    )


def _adapter(run: dict[str, Any]) -> str:
    """What was trained beside the base, what it needed, and what the model says before and after."""
    adapter = run.get("adapter")
    if not adapter:
        return ""
    expected, measured = (run.get("memory", {}).get(key, {}) for key in ("expected", "measured"))
    rows = [
        ["variant, rank, scaling", f"{adapter['variant']}, {adapter['rank']}, {adapter['scaling']:g}"],
        ["layers", str(adapter["layers"])],
        ["trainable parameters", f"{adapter['trainable_parameters']:,}"],
        ["deployed", adapter["merge"]],
        *([["expected memory of a step", f"{expected['total_bytes'] / 1e6:,.0f} MB"]] if expected else []),
        *([["training's peak of the process", f"{measured['rss_peak_bytes'] / 1e6:,.0f} MB"]] if "rss_peak_bytes" in measured else []),
        *([["training's peak on the GPU", f"{measured['cuda_peak_bytes'] / 1e6:,.0f} MB"]] if "cuda_peak_bytes" in measured else []),
        ["folder, in peft's format", adapter["path"]],
    ]
    sample = adapter.get("sample")
    said = [["before", sample["before"]], ["after", sample["after"]]] if sample else []
    return "<h2>Adapter</h2>" + _table(["", ""], rows) + (_table([sample["prompt"], ""], said) if sample else "")


def _layers(run: dict[str, Any]) -> str:
    body = []
    for layer in run["quantized"]:
        db = layer.get("sqnr_db", 0.0)
        width, text = (90, "exact") if db is None else (1.5 * min(max(db, 0), 60), f"{db:.1f} dB")
        bar = f"<span class='bar' style='width:{width:.0f}px'></span> {text}" if "sqnr_db" in layer else "no float weight to compare with"
        cells = [
            escape(layer["name"]),
            escape(layer["grid"]),
            escape(layer.get("activation_grid", "float")),
            " x ".join(map(str, layer["shape"])),
        ]
        body.append("<tr>" + "".join(f"<td>{c}</td>" for c in [*cells, bar]) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in ("layer", "weight grid", "input", "shape", "SQNR"))
    return f"<h2>Layers on a grid</h2><div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def analysis_head(rows: list[dict[str, Any]]) -> list[str]:
    """Column titles of the sensitivity analysis."""
    main = next((name for name in ("perplexity", "cosine") if name in rows[0]), None)
    lost = [main, "rise" if main == "perplexity" else "drop"] if main else ["accuracy", "points lost"]
    return ["layer", "weight grid", "SQNR of its output", *lost, "agreement", "KL to float"]


def analysis_cells(row: dict[str, Any]) -> list[str]:
    """One layer of the sensitivity analysis as text, under `analysis_head`."""
    db, kl = row["sqnr_db"], row["kl"]
    sqnr = f"{db:.1f} dB" if db is not None else "not finite" if kl is None else "exact"
    if "accuracy" not in row:
        lost = [_number(row[name], ".4f") for name in row if name.startswith(("perplexity", "cosine"))]
    else:
        lost = [_metric("accuracy", row["accuracy"]), f"{100 * row['accuracy_drop']:.2f}"]
    return [row["name"], row["grid"], sqnr, *lost, _metric("agreement", row["agreement"]), _number(kl, ".2e")]


def _analysis(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    more = f"<p class='dim'>and {len(rows) - ANALYSIS_ROWS} more in run.json</p>" if len(rows) > ANALYSIS_ROWS else ""
    table = _table(analysis_head(rows), [analysis_cells(row) for row in rows[:ANALYSIS_ROWS]])
    return f"<h2>Each layer alone on its grid, the most harmful first</h2>{table}{more}"


def _yaml(config: dict[str, Any]) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config))
