"""`python -m loadtest`."""

import signal
import sys

from loadtest.cli import main

if __name__ == "__main__":
    # A run that is told to end takes its server and its generator along, as with Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main(prog_name="loadtest")
