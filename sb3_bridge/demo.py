"""``python -m sb3_bridge.demo`` runs ``examples/cartpole_sb3.py``, which a wheel holds beside this file."""

import runpy
from pathlib import Path

_HERE = Path(__file__).parent

if __name__ == "__main__":
    _places = (_HERE / "cartpole_sb3.py", _HERE.parent / "examples" / "cartpole_sb3.py")
    runpy.run_path(str(next(filter(Path.exists, _places))), run_name="__main__")
