"""A plan as people read it."""

from __future__ import annotations

from rich.filesize import decimal
from rich.table import Table

from clients._console import print_table
from clients.planning.plan import Machine, Plan, Workload


def print_plan(plan: Plan, machine: Machine, workload: Workload) -> None:
    """One table: a replica's memory, the hit rates, how many replicas, and the store."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    for number, section in enumerate((_memory, _prefixes, _replicas, _store)):
        if number:
            table.add_row()
        for row in section(plan, machine, workload):
            table.add_row(*row)
    print_table(table)


Rows = list[tuple[str, str, str]]


def _memory(plan: Plan, machine: Machine, workload: Workload) -> Rows:
    memory, model = plan.memory, plan.model
    copies = memory.weights // model.weight_bytes
    return [
        ("a replica's memory", decimal(memory.total), ""),
        ("  weights", decimal(memory.weights), f"{model.parameters:,} parameters × {copies}"),
        (
            "  slots",
            decimal(memory.slots),
            f"{machine.max_slots} of {machine.max_length} positions of "
            f"{decimal(model.position_bytes)}",
        ),
        ("  runtime", decimal(memory.runtime), ""),
        ("  held back", decimal(memory.headroom), ""),
        ("  prefixes", decimal(memory.prefixes), f"--prefix-cache-bytes {memory.prefixes}"),
    ]


def _prefixes(plan: Plan, machine: Machine, workload: Workload) -> Rows:
    resident = min(plan.resident, workload.tasks)
    rows = [
        ("a prefix", decimal(plan.prefix_bytes), f"{workload.prefix_length} positions"),
        ("resident in a replica", f"{resident:,}", f"of {workload.tasks:,} tasks"),
        (
            "hit rate, hashed",
            f"{plan.hashed.device:.1%}",
            "a task's requests go to one replica",
        ),
        ("hit rate, round robin", f"{plan.round_robin.device:.1%}", "they go to any"),
    ]
    if machine.host_cache_bytes:
        rows += [
            ("  or in host memory", f"{plan.hashed.host:.1%}", "hashed"),
            ("  or in host memory", f"{plan.round_robin.host:.1%}", "round robin"),
        ]
    return rows


def _replicas(plan: Plan, machine: Machine, workload: Workload) -> Rows:
    how = "estimated" if plan.estimated else "as given"
    asked = workload.requests_per_second * workload.new_tokens
    return [
        ("a replica's speed", f"{plan.tokens_per_second:,.0f} tokens/s", how),
        ("asked for", f"{asked:,.0f} tokens/s", f"{workload.requests_per_second:,g} requests/s"),
        ("replicas", f"{plan.replicas:,}", "each at most 80 % busy"),
    ]


def _store(plan: Plan, machine: Machine, workload: Workload) -> Rows:
    store = plan.store
    return [
        ("the store's memory", decimal(store.bytes), f"{workload.versions} version(s) of a task"),
        ("loads from it, hashed", f"{store.loads_per_second:,.1f} /s", ""),
        ("bytes from it, hashed", f"{decimal(int(store.bytes_per_second))}/s", ""),
        (
            "bytes, round robin",
            f"{decimal(int(store.bytes_per_second_round_robin))}/s",
            "",
        ),
    ]
