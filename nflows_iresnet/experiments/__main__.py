"""`python -m nflows_iresnet.experiments` is `nflows-iresnet`, and `compare` may be left out."""

from __future__ import annotations

import sys

from nflows_iresnet.experiments.cli import main

_COMMANDS = ("compare", "table1", "table2", "bench", "figures")

if __name__ == "__main__":
    if sys.argv[1:2] not in [[name] for name in _COMMANDS]:
        sys.argv.insert(1, "compare")
    sys.exit(main())
