"""Traces, as a collector gets them: OTLP over HTTP."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from tests.server.live import live_server

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@contextmanager
def collector() -> Iterator[tuple[str, list[Span]]]:
    """A receiver's address, and the spans it got."""
    spans: list[Span] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        serving = threading.Thread(target=receiver.serve_forever)
        serving.start()
        try:
            yield f"http://127.0.0.1:{receiver.server_port}", spans
        finally:
            receiver.shutdown()
            serving.join()


def test_a_trace_has_the_parts_of_a_request(
    endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path: Path
) -> None:
    with collector() as (address, spans):
        with live_server(endless, tmp_path, "--otlp-endpoint", address) as server:
            server.upload("task", prefixes["short"])
            body = {"inputs": "Hi", "task_id": "task", "parameters": {"max_new_tokens": 5}}
            head = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            server.client.post("/generate", json=body, headers=head)
            server.client.post("/generate_stream", json=body)
            server.client.post("/generate", json={**body, "task_id": "none"})
        named = {span.span_id: span for span in spans if span.name.startswith("POST /generate")}
    mine, streamed, failed = named.values()
    assert (mine.trace_id.hex(), mine.parent_span_id.hex()) == (TRACE, PARENT)
    assert mine.kind == Span.SPAN_KIND_SERVER
    assert streamed.trace_id != mine.trace_id
    assert not streamed.parent_span_id
    for root in (mine, streamed):
        found = {span.name: span for span in spans if span.parent_span_id == root.span_id}
        assert list(found) == ["prefix load", "queue", "prefill", "decode"]
        assert all(span.trace_id == root.trace_id for span in found.values())
        times = [
            root.start_time_unix_nano,
            *(
                time
                for span in found.values()
                for time in (span.start_time_unix_nano, span.end_time_unix_nano)
            ),
            root.end_time_unix_nano,
        ]
        assert times == sorted(times)
        assert attributes(root)["prefixserve.generated_tokens"] == 5
        assert attributes(root)["http.response.status_code"] == 200
    assert attributes(failed)["http.response.status_code"] == 404
    assert not [span for span in spans if span.parent_span_id == failed.span_id]


def attributes(span: Span) -> dict[str, str | int | float]:
    return {
        one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in span.attributes
    }


def test_the_address_may_come_from_opentelemetrys_own_variables(
    endless: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector() as (address, spans):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        with live_server(endless, tmp_path) as server:
            server.client.get("/info")
        assert [span.name for span in spans] == ["GET /info"]
