"""What rounds of figures come to, for people: a table a server, our ratios to the best peer, and both in Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.measure import Figures, Plan, metrics
from benchmarks.peers.servers import Contender

BITS = (16, 8, 4)


def ratios(chosen: list[Contender], summary: dict[str, Figures], plan: Plan) -> dict[str, dict[str, dict[str, Any]]]:
    """Metric -> width of weights ("any" for all) -> our best over the peers' best, and who these are."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for metric in metrics(plan):
        best = max if metric.higher_is_better else min
        for width in (*BITS, None):
            measured = [one for one in chosen if one.in_ratios and width in (None, one.bits) and summary[one.name]]
            ours = [one for one in measured if one.peer == "llmserve"]
            theirs = [one for one in measured if one.peer != "llmserve"]
            if not (ours and theirs):
                continue
            our_best, their_best = (
                best(side, key=lambda one: summary[one.name][metric.key]) for side in (ours, theirs)
            )
            found.setdefault(metric.title, {})[str(width or "any")] = {
                "ratio": summary[our_best.name][metric.key] / summary[their_best.name][metric.key],
                "ours": our_best.name,
                "peer": their_best.name,
            }
    return found


def columns(plan: Plan) -> dict[str, str]:
    """Title -> key of the figures that are shown."""
    shown = (
        {"decode tok/s c=1": "c1_decode_tok_s", "TTFT p50 ms c=1": "c1_ttft_p50_ms"} if 1 in plan.concurrency else {}
    )
    for concurrency in plan.concurrency:
        if concurrency > 1:
            for title, key in (
                ("out tok/s", "out_tok_s"),
                ("TTFT p50 ms", "ttft_p50_ms"),
                ("ITL p50 ms", "itl_p50_ms"),
                ("ITL p99 ms", "itl_p99_ms"),
                ("front CPU %", "front_cpu_percent"),
            ):
                shown[f"{title} c={concurrency}"] = f"c{concurrency}_{key}"
    return shown | {"prefill tok/s": "prefill_tok_s"}


def print_figures(summary: dict[str, Figures], plan: Plan) -> None:
    """A Markdown table, a row a server. "front CPU" is the share of the server's CPU time that its first process took:
    of ours all that is not the engine; of a peer that is one process, everything."""
    shown = columns(plan)
    print("\n" + " | ".join(["| server", *shown, ""]).rstrip())
    print("|" + "---|" * (len(shown) + 1))
    for name, figures in summary.items():
        if figures:
            print(" | ".join([f"| {name}", *(f"{figures[key]:,.1f}" for key in shown.values()), ""]).rstrip())


def print_ratios(chosen: list[Contender], summary: dict[str, Figures], plan: Plan) -> None:
    """Ours over the best peer, in Markdown. Above 1 is better, but for TTFT, where it is below 1."""
    print("\nour best / best peer, by bits of a weight\n")
    print("| figure | bits | ratio | ours | peer |\n|---|---|---|---|---|")
    for title, widths in ratios(chosen, summary, plan).items():
        for width, row in widths.items():
            print(f"| {title} | {width} | {row['ratio']:.2f} | {row['ours']} | {row['peer']} |")
