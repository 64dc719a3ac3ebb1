"""A web server for a folder: Python's own, with support for ranges.

python tests/support/web.py FOLDER PORT
"""

from __future__ import annotations

import functools
import http.server
import sys
from pathlib import Path


class Server(http.server.SimpleHTTPRequestHandler):
    """The request handler, which supports the header Range."""

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            return super().do_GET()
        start, stop = asked.removeprefix("bytes=").split("-")
        data = path.read_bytes()[int(start) : int(stop) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {start}-{stop}/{path.stat().st_size}")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(
        ("", int(sys.argv[2])), functools.partial(Server, directory=sys.argv[1])
    ).serve_forever()
