"""Task files for data on this disk: `python benchmarks/tasks/write.py DATA_DIR OUT_DIR`, for `kvfold eval --task-path OUT_DIR`.

Copies the YAML files beside this script with the folder of the data in place of `DATA`; lm-eval knows no variable for it.
Tasks whose file is not in DATA_DIR are left out.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def write(data: Path, out: Path) -> list[str]:
    """Write the tasks whose data is in `data` into the folder `out`, made if need be; returns their names."""
    names = []
    for template in sorted(Path(__file__).parent.glob("*.yaml")):
        text = template.read_text(encoding="utf-8")
        if all((data / file).is_file() for file in re.findall(r'"DATA/([^"]+)"', text)):
            out.mkdir(parents=True, exist_ok=True)
            (out / template.name).write_text(text.replace("DATA/", f"{data.resolve().as_posix()}/"), encoding="utf-8")
            names.append(template.stem)
    return names


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} DATA_DIR OUT_DIR")
    written = write(Path(sys.argv[1]), Path(sys.argv[2]))
    if not written:
        sys.exit(f"no task data in {sys.argv[1]}: expected files such as arc_easy.jsonl")
    print(",".join(written))
