"""Writes the report of a pruned model as Markdown."""

from pathlib import Path
from typing import Any

_COSTS = {"macs": "multiply-adds", "params": "parameters", "latency": "latency"}


def markdown(report: dict[str, Any]) -> str:
    """Returns a report as a Markdown page.

    Args:
        report: Dict, as returned by `workflow.prune()`.

    Returns:
        String.
    """
    plan, accuracy = report["plan"], report["accuracy"]

    def row(name: str, key: str, scale: float, unit: str) -> str:
        whole, pruned = report[key]["whole"], report[key]["pruned"]
        return f"| {name} | {whole / scale:.2f} {unit} | {pruned / scale:.2f} {unit} | {pruned / whole:.3f} |"

    lines = [
        f"# {Path(report['model']).name}, pruned",
        "",
        f"Pruning removed {plan['reduction']:.1%} of the {_COSTS[plan['cost']]} (target: {plan['asked']:.1%}). "
        f"Importance: {plan['importance']}. Solver: {plan['solver']}, gap to the fractional bound {plan['gap']:.2e}.",
        "",
        "| | whole | pruned | ratio |",
        "|---|---|---|---|",
        row("multiply-adds", "macs", 1e6, "M"),
        row("parameters", "params", 1e6, "M"),
    ]
    for name, seconds in report["latency"].items():
        whole, pruned = seconds["whole"], seconds["pruned"]
        lines.append(f"| latency, {name} | {whole * 1e3:.2f} ms | {pruned * 1e3:.2f} ms | {pruned / whole:.3f} |")
    counted = report["photographs"]
    lines += [
        "",
        f"| model | accuracy on {counted['test']} photos of {len(counted['classes'])} classes |",
        "|---|---|",
        *(f"| {name} | {value:.2%} |" for name, value in accuracy.items()),
        "",
        "![channels kept per block](channels.png)",
        "",
        "| block | expand | squeeze-and-excite | out |",
        "|---|---|---|---|",
    ]
    for name, old in report["blocks"]["whole"].items():
        pairs = zip(old, report["blocks"]["pruned"][name], strict=True)
        cells = (f"{new} of {full}" if new != full else str(full or "-") for full, new in pairs)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
