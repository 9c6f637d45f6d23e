"""The layer table of architecture.md: imports point down only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvfold

ROOT = Path(kvfold.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
TABLE = (
    ("errors", "config", "codes", "packing", "compat", "files", "progress", "distributed"),
    ("ops",),
    ("codecs",),
    ("cache",),
    ("integration",),
    ("calibrate", "evaluate", "bench"),
    ("cli", "commands", "__main__", "serving", "demo", "__init__"),
)
LEVEL = {name: level for level, names in enumerate(TABLE) for name in names}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything the file imports, wherever in the file; `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(dotted: str) -> int:
    """Level of `kvfold.x.y`; a name that is no part of the package comes from `kvfold/__init__.py`."""
    part = [*dotted.split("."), "__init__"][1]
    return LEVEL[part if (ROOT / part).is_dir() or (ROOT / f"{part}.py").exists() else "__init__"]


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down_only(name: str) -> None:
    own = LEVEL[Path(name).parts[0].removesuffix(".py")]
    up = [dotted for dotted in imports(FILES[name]) if dotted.split(".")[0] == "kvfold" and level(dotted) > own]
    assert not up, f"{name} is of level {own} and imports {up}"


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"compat.py"}))
def test_only_compat_imports_transformers_cache_classes(name: str) -> None:
    cache_classes = ("transformers.cache_utils", "transformers.DynamicCache", "transformers.Cache", "transformers.StaticCache")
    assert not [dotted for dotted in imports(FILES[name]) if dotted.startswith(cache_classes)]


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_unpickled(name: str) -> None:
    text = FILES[name].read_text()
    assert not {"pickle", "dill", "joblib", "shelve", "marshal"} & {dotted.split(".")[0] for dotted in imports(FILES[name])}
    assert not [word for word in ("torch.load(", "torch.save(", "allow_pickle") if word in text]


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_longer_than_500_lines(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= 500
