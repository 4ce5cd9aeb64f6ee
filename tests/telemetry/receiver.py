"""An OTLP-over-HTTP collector on the loopback interface that writes each request to a file, as JSON lines.

python receiver.py FILE     prints its port, and serves until it is killed
"""

from __future__ import annotations

import gzip
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

MESSAGES = {
    "/v1/traces": (ExportTraceServiceRequest, ExportTraceServiceResponse),
    "/v1/logs": (ExportLogsServiceRequest, ExportLogsServiceResponse),
}


class Receiver(BaseHTTPRequestHandler):
    """Parses each request with the protocol's messages and rejects anything else."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path not in MESSAGES or self.headers["Content-Type"] != "application/x-protobuf":
            self.send_error(400)
            return
        request, response = MESSAGES[self.path]
        received = {"path": self.path, "key": self.headers.get("x-key"), **MessageToDict(request.FromString(body))}
        with Path(sys.argv[1]).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(received) + "\n")
        answer = response().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        """Do not log requests."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    print(server.server_port, flush=True)
    server.serve_forever()
