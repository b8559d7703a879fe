"""The golden MolmoE as the hub has the real one: its weights in one pickle."""

import shutil
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
PICKLE = GOLDEN / "molmoe-pickle" / "pytorch_model.bin"


def copy_pickled_molmoe(to: Path) -> Path:
    shutil.copytree(GOLDEN / "molmoe", to, ignore=shutil.ignore_patterns("model.safetensors"))
    shutil.copyfile(PICKLE, to / PICKLE.name)
    return to
