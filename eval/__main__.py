"""`python -m qwen3cp.eval`, which is `qwen3cp eval`: also for torchrun."""

import sys

from qwen3cp.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "eval")
    main()
