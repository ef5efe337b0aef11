"""No file that is read can bring code along: nothing here unpickles, evaluates or executes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from saft_clip.config import _PlainLoader

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for folder in ("saft_kernels", "python", "bench") for path in (ROOT / folder).rglob("*.py")
)

#: Modules that read pickles, or write what only they can read.
MODULES = {
    *("pickle", "_pickle", "cPickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"),
    *("jsonpickle", "torch.package", "torch.hub"),
}
#: Functions that execute what they are given, as plain names and as attributes.
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    *("torch.save", "torch.jit.load", "torch.hub.load", "torch.serialization.load"),
    *("pd.read_pickle", "pandas.read_pickle", "torch.storage._load_from_bytes"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"),
    *("yaml.load_all", "builtins.eval", "builtins.exec"),
}
#: Functions that unpickle, unless this argument says that they must not.
TENSORS_ONLY = {"torch.load", "open_clip.load_checkpoint"}
#: The same, which must not be hidden under a shorter name.
IMPORTED = {"torch.load", "open_clip.load_checkpoint", "open_clip.factory.load_state_dict"}
LOADERS = {"_PlainLoader", "yaml.SafeLoader"}


def dangers(source: str) -> Iterator[str]:
    """What in a source could execute something that a file holds."""
    for node in ast.walk(ast.parse(source)):
        for found in (*_imports(node), *_calls(node)):
            yield f"line {node.lineno}: {found}"


def _imports(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    else:
        return
    yield from (name for name in names if name in MODULES or name in ATTRIBUTES | IMPORTED)


def _calls(node: ast.AST) -> Iterator[str]:
    if not isinstance(node, ast.Call):
        return
    name = ast.unparse(node.func)
    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if name in NAMES | ATTRIBUTES:
        yield name
    if given.get("weights_only", "True") != "True" or given.get("allow_pickle", "False") != "False":
        yield f"{name} with {given}"
    if name in TENSORS_ONLY and "weights_only" not in given:
        yield f"{name} without weights_only=True"
    if name == "yaml.load" and (len(node.args) < 2 or ast.unparse(node.args[1]) not in LOADERS):
        yield "yaml.load without a safe loader"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_executes_what_a_file_holds(path: Path) -> None:
    assert list(dangers(path.read_text(encoding="utf-8"))) == []


def test_the_loader_of_settings_is_a_safe_one() -> None:
    assert issubclass(_PlainLoader, yaml.SafeLoader)
    assert not issubclass(_PlainLoader, yaml.UnsafeLoader)
    with pytest.raises(yaml.YAMLError):
        yaml.load("!!python/object/apply:os.getcwd []", _PlainLoader)


@pytest.mark.parametrize(
    "source",
    [
        *(
            "import pickle",
            "from pickle import loads",
            "import torch.hub",
            "from torch import load",
        ),
        *("eval('1')", "exec(x)", "compile(x, '', 'exec')", "__import__(x)", "torch.save(x, y)"),
        *("torch.load(x)", "torch.load(x, weights_only=False)", "f(x, weights_only=flag)"),
        *("np.load(x, allow_pickle=True)", "yaml.load(x)", "yaml.load(x, yaml.Loader)"),
        *("yaml.unsafe_load(x)", "torch.jit.load(x)", "open_clip.load_checkpoint(m, str(f))"),
    ],
)
def test_every_danger_is_noticed(source: str) -> None:
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source",
    [
        *("model.eval()", "torch.compile(model)", "re.compile('x')", "yaml.safe_load(x)"),
        *("torch.load(x, weights_only=True)", "np.load(x)", "model.load_state_dict(state)"),
    ],
)
def test_what_is_no_danger_is_left_alone(source: str) -> None:
    assert list(dangers(source)) == []
