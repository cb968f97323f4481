"""What a person sees while a server starts: bars while fetching and loading, the plan, and when it is ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from llmserve.config import format_bytes
from llmserve.messages import LoadProgress, MemoryPlan

StageProgress = Callable[[str, int, int], None]  # stage, done, total


class LoadingDisplay:
    """Plans and bars of the models that are loading side by side."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def plan_printer(self, name: str) -> Callable[[MemoryPlan], None]:
        """Prints a model's plan above the bars when it is known."""
        return lambda plan: self._progress.console.print(plan_table(name, plan))

    def fetching(self, name: str) -> StageProgress:
        """Bars for the stages of getting a model."""
        return _bars(self._progress, name)

    def progress_bar(self, name: str) -> Callable[[LoadProgress], None]:
        """A bar of the bytes loaded."""
        report = _bars(self._progress, name)
        return lambda message: report(message.stage, message.done, message.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server that has started serves, and where."""

    url: str
    grpc: str | None = None  # the address of gRPC, if there is any
    names: Sequence[str] = ()
    only_v2: Sequence[str] = ()  # models that `/v1` does not serve
    failed: Sequence[str] = ()  # models whose failure keeps the server from being ready
    has_docs: bool = True  # whether a browser may read `/docs`


class StartupDisplay:
    """Writes to one console. Where that is no terminal, the bars are left out and the lines stay."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def fetching(self, name: str) -> Iterator[StageProgress]:
        """Bars for the stages of getting a model; nothing is shown if there is nothing to get."""
        with _progress(self._console) as progress:
            yield _bars(progress, name)

    @contextmanager
    def loading(self) -> Iterator[LoadingDisplay]:
        """Bars and plans of the models that load."""
        with _progress(self._console) as progress:
            yield LoadingDisplay(progress)

    def ready(self, served: Served, seconds: float) -> None:
        """The line people wait for."""
        names = (", ".join(served.names) or "no model") + (
            f"; /v2 also {', '.join(served.only_v2)}" if served.only_v2 else ""
        )
        also = f" gRPC: {served.grpc}." if served.grpc else ""
        docs = f" Docs: {served.url}/docs" if served.has_docs else ""
        said = f"[bold green]Ready[/] in {seconds:.1f} s"
        if served.failed:
            reason = f"{', '.join(served.failed)} could not be loaded (see above; --no-strict-readiness: ready without)"
            said = f"[bold yellow]Serving[/] in {seconds:.1f} s, but not ready, as {reason}"
        self._console.print(f"{said}: {served.url}/v1 serves {names}.{also}{docs}", soft_wrap=True)


def plan_table(name: str, plan: MemoryPlan) -> Table:
    """Where the memory of a device will go."""
    table = Table(title=f"{name} on {plan.device}", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan")
    table.add_column(justify="right")
    table.add_column()
    table.add_row("weights", format_bytes(plan.weight_bytes), f"{plan.dtype}, {plan.weight_format}")
    table.add_row("activations", format_bytes(plan.activation_bytes), f"{plan.max_num_batched_tokens} tokens a step")
    if plan.graph_bytes:
        table.add_row("CUDA graphs", format_bytes(plan.graph_bytes), "")
    table.add_row(
        "KV cache",
        format_bytes(plan.kv_cache_bytes),
        f"{plan.num_blocks} blocks of {plan.block_size} = {plan.num_tokens} tokens, {plan.kv_cache_dtype}",
    )
    if plan.num_host_blocks:
        tokens = plan.num_host_blocks * plan.block_size
        table.add_row("host tier", "", f"{plan.num_host_blocks} blocks = {tokens} tokens, in the host's memory")
    table.add_row("free now", format_bytes(plan.available_bytes), "")
    limits = f"context {plan.max_model_len} tokens, {plan.max_num_seqs} sequences at once"
    table.add_row("limits", "", limits)
    return table


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _bars(progress: Progress, name: str) -> StageProgress:
    """One bar a stage, made when the stage is first heard of."""
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = progress.add_task(f"{name}: {stage}", total=total)
        progress.update(tasks[stage], completed=done, total=total)

    return report
