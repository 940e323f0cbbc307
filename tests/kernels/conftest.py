"""The modules of this folder find one another, here and in scripts that put it on their path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
