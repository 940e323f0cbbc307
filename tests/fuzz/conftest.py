"""The fuzzer's modules import each other by name, as ``python tests/fuzz/run.py`` finds them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
