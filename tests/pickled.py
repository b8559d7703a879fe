"""The golden MolmoE with its weights in one pickle, as the real one on the hub."""

import shutil
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
PICKLE = GOLDEN / "molmoe-pickle" / "pytorch_model.bin"


def copy_pickled_molmoe(to: Path) -> Path:
    shutil.copytree(GOLDEN / "molmoe", to, ignore=shutil.ignore_patterns("model.safetensors"))
    shutil.copyfile(PICKLE, to / PICKLE.name)
    return to
