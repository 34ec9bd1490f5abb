"""`python -m nflows_iresnet.compare` is `nflows-iresnet compare`."""

from __future__ import annotations

import sys

from nflows_iresnet.compare.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "compare")
    sys.exit(main())
