"""A child process of `verify`, which says what it finds as JSON lines."""

from __future__ import annotations

import sys

from handful.verify.run import serve

if __name__ == "__main__":
    serve(sys.argv[1:])
