"""Train or examine the embedded model: `python -m mechtut.mini train --out DIR`."""

from mechtut.mini.training import main

if __name__ == "__main__":
    raise SystemExit(main())
