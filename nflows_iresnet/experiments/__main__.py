"""`python -m nflows_iresnet.experiments` is `nflows-iresnet compare`."""

from __future__ import annotations

import sys

from nflows_iresnet.experiments.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "compare")
    sys.exit(main())
