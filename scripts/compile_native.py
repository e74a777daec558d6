"""Compile the C++ kernels of the CPU, once for each set of instructions (docs/adr/0011).

    python scripts/compile_native.py [FOLDER]   (without one: build/native, where the engine looks)

Does nothing if what lies there is of these very sources. Without g++ it says so and ends with status 0, because the
engine runs without them.
"""

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sessile.kernels.native import FOLDER, LEVELS, OPTIONS, SOURCES, STAMP, Level, native_stamp

COMPILERS = ("g++", "clang++")


def main(folder: Path) -> int:
    """Compile into a folder if need be; 0 unless the compiler fails."""
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text().strip() == native_stamp():
        return 0
    compiler = next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        print("no C++ compiler here: numba's kernels serve")
        return 0
    print("compiling the kernels, about half a minute", flush=True)
    wanted = native_stamp()
    with tempfile.TemporaryDirectory() as scratch:
        for level in LEVELS if platform.machine() in ("x86_64", "AMD64") else LEVELS[-1:]:
            if not compile_level(compiler, level, Path(scratch)):
                return 1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(scratch, folder)
    stamp.write_text(wanted)
    return 0


def compile_level(compiler: str, level: Level, folder: Path) -> bool:
    """Make one library; False, with what the compiler said, if it fails."""
    target = folder / f"decoder-{level.name}.so"
    command = [compiler, *OPTIONS, *level.options, str(SOURCES / "decoder.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-4000:], f"the kernels were not compiled for {level.name}", sep="\n")
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
