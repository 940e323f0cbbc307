"""The modules of this folder find one another."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
