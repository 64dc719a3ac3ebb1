"""A service that `wandb` 0.31 takes for W&B: it keeps the rows of a run's history as the real one does."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Service:
    """A running service. address: its URL. history: for each run, its rows as JSON texts."""

    address: str = ""
    history: dict[str, list[str]] = field(default_factory=dict)

    @property
    def environ(self) -> dict[str, str]:
        """The variables with which W&B finds this service and a key for it."""
        return {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": "0" * 40}

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the only run, in the order in which they arrived."""
        [rows] = self.history.values()
        return [json.loads(row) for row in rows]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL query."""
        entity = {"id": "e", "name": "somebody"}
        project = {"id": "p", "name": "some-project", "entity": entity}
        kind = re.search(r"(?:query|mutation)\s+(\w+)", query)
        run = variables.get("name")
        rows = self.history.get(run or "", [])
        if kind and kind[1] == "RunResumeStatus":
            known = {"id": "r", "name": run, "displayName": run, "config": "{}", "tags": [], "logLineCount": 0,
                     "historyLineCount": len(rows), "historyTail": json.dumps(rows[-1:]), "eventsLineCount": 0,
                     "eventsTail": "[]", "wandbConfig": '{"t": {"value": 1}}',
                     "summaryMetrics": rows[-1] if rows else "{}"}
            return {"model": project | {"bucket": known if rows else None}}
        if kind and kind[1] == "UpsertBucket":
            bucket = {"id": "r", "name": run, "displayName": run, "config": "{}", "project": project,
                      "historyLineCount": len(rows)}
            return {"upsertBucket": {"bucket": bucket, "inserted": not rows}}
        viewer = {"id": "v", "entity": "somebody", "username": "somebody", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer, "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []},
                "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9"}, "features": []}}


@contextmanager
def wandb_service() -> Iterator[Service]:
    """Run the service on a free port of this host."""
    service = Service()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def respond(self, answer: dict[str, Any]) -> None:
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.respond({})

        do_GET = do_HEAD

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path.endswith("/file_stream"):
                run = self.path.split("/")[-2]
                sent = (json.loads(body).get("files") or {}).get("wandb-history.jsonl")
                if sent:
                    rows = service.history.setdefault(run, [])
                    rows[sent["offset"]:] = sent["content"]
                self.respond({})
            elif self.path == "/graphql":
                request = json.loads(body)
                self.respond({"data": service.answer(request["query"], request.get("variables") or {})})
            else:
                self.respond({})  # W&B's own telemetry

        do_PUT = do_POST

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
