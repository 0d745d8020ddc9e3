import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # where the package `fuzz` is; last, so that it hides nothing
