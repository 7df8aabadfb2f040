"""The task label stays bounded whatever is asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from server.engine.protocol import EngineStats, StepStats
from server.metrics import BASE_LABEL, OTHER_LABEL, BoundedLabels, Metrics


@given(
    names=st.lists(st.tuples(st.booleans(), st.text(max_size=3)), max_size=60),
    most=st.integers(0, 5),
)
def test_labels_never_outnumber_the_bound(names: list[tuple[bool, str]], most: int) -> None:
    labels = BoundedLabels(most)
    seen = {labels.known(name) if exists else labels.unchecked(name) for exists, name in names} - {
        OTHER_LABEL
    }
    assert len(seen) <= most
    assert seen <= {name for exists, name in names if exists}


def test_the_first_tasks_keep_their_names() -> None:
    labels = BoundedLabels(2)
    assert labels.unchecked("a") == OTHER_LABEL
    assert [labels.known(name) for name in ("a", "b", "c", "a")] == ["a", "b", OTHER_LABEL, "a"]
    assert labels.known(None) == BASE_LABEL
    assert (labels.unchecked("b"), labels.unchecked("c")) == ("b", OTHER_LABEL)


def test_the_engine_is_read_at_the_scrape_and_every_name_has_the_prefix() -> None:
    metrics = Metrics()
    stats = EngineStats(running=3, waiting=2, max_slots=4)
    metrics.watch_engine(lambda: stats)
    metrics.observe_step(
        StepStats(decode_rows=3, prefill_tokens=0, preempted=2, seconds=0.01, stats=stats)
    )
    families = {f.name: f for f in text_string_to_metric_families(metrics.exposition().decode())}
    assert all(name.startswith("prefixserve_") for name in families)
    assert families["prefixserve_running_requests"].samples[0].value == 3
    assert families["prefixserve_waiting_requests"].samples[0].value == 2
    assert families["prefixserve_preempted"].samples[0].value == 2
    batch = {sample.name: sample.value for sample in families["prefixserve_batch_size"].samples}
    assert (batch["prefixserve_batch_size_count"], batch["prefixserve_batch_size_sum"]) == (1, 3)
