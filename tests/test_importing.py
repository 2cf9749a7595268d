"""Importing, reloading, copying and pickling, each in a process that has imported nothing of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import fresh
import pytest
from conftest import ROOT

pytestmark = pytest.mark.newest

FILES = ("hubconf.py", "weights_manifest.json", "recipes.toml", "pyproject.toml")
NAMES = """
import timm
assert timm.is_model("fixefficientnet_b0"), "not registered"
import fixefficientnet
names = timm.list_models("fixefficientnet*", include_tags=True)
assert len(names) == len(set(names)) == len(fixefficientnet.list_models()), names
assert timm.create_model("fixefficientnet_b0.ns_jft_in1k", device="meta").variant.key == "b0_ns"
"""


def python(code: str, *, cwd: Path = ROOT, check: bool = True) -> str:
    """What a process printed; with `check=False`, the last line of its error."""
    strict = "import warnings; warnings.simplefilter('error', UserWarning)\n"
    done = fresh.python(strict + code, cwd=cwd, check=False)
    assert (done.returncode == 0) == check, done.stdout + done.stderr
    return done.stdout if check else done.stderr.strip().splitlines()[-1]


def copy(target: Path, note: str = "") -> Path:
    """A checkout of its own, of another revision if it has a note."""
    shutil.copytree(ROOT / "fixefficientnet", target / "fixefficientnet", ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, target)
    if note:
        file = target / "weights_manifest.json"
        file.write_text(file.read_text().replace('"size": 256,', f'"size": {note},'))
    return target


@pytest.mark.parametrize(
    "steps",
    [
        "import fixefficientnet; reload(fixefficientnet); import timm",
        "import fixefficientnet, timm; reload(fixefficientnet)",
        "import timm, fixefficientnet; reload(fixefficientnet); reload(timm)",
        "import fixefficientnet.timm_models as it; reload(it); reload(it).register_with_timm(); import timm",
        "import fixefficientnet; forget('fixefficientnet'); import fixefficientnet; import timm",
        "import fixefficientnet, timm; forget('fixefficientnet'); import fixefficientnet",
        "import fixefficientnet; importlib.util.find_spec('timm'); reload(fixefficientnet); import timm.models",
    ],
)
def test_names_are_registered_once_whatever_is_reloaded(steps: str):
    code = f"""
import importlib.util, sys
from importlib import reload

def forget(package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]

{steps}
assert not any(type(finder).__name__ == "_AfterTimm" for finder in sys.meta_path)
"""
    python(code + NAMES)


def test_reloading_all_of_it_as_notebooks_do():
    code = """
import sys
from importlib import reload
import fixefficientnet
fixefficientnet.create("b0", device="meta")
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] == "fixefficientnet":
        reload(module)
assert fixefficientnet.create("b0", device="meta").variant == fixefficientnet.info("b0")
"""
    python(code + NAMES)


@pytest.mark.parametrize("first", ["fixefficientnet", "timm", "both"])
def test_threads_that_import_concurrently(first: str):
    code = f"""
import importlib, sys, threading
barrier, failures = threading.Barrier(8), []
sys.setswitchinterval(1e-5)

def work(number):
    name = ("fixefficientnet", "timm")[number % 2] if {first!r} == "both" else {first!r}
    barrier.wait()
    try:
        importlib.import_module(name)
        import fixefficientnet
        assert fixefficientnet.create("b0", device="meta").variant.key == "b0"
        import timm
        timm.create_model("fixefficientnet_b0", device="meta")
    except BaseException as error:
        failures.append(error)

threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
"""
    python(code + NAMES)


@pytest.mark.parametrize("kind", ["no exec_module", "slots", "no find_spec", "wrapped"])
def test_finders_and_loaders_of_others(kind: str):
    """What stands behind this package's finder may be of any make."""
    code = f"""
import warnings; warnings.simplefilter("ignore")
import importlib.machinery, sys
kind = {kind!r}

class Loader:
    __slots__ = ("own",)
    def __init__(self, own):
        self.own = own
    def create_module(self, spec):
        return self.own.create_module(spec)
    def exec_module(self, module):
        self.own.exec_module(module)

class Proxy:
    def __init__(self, own):
        object.__setattr__(self, "own", own)
    def __getattr__(self, name):
        return getattr(self.own, name)
    def __setattr__(self, name, value):
        setattr(self.own, name, value)
    def exec_module(self, module):
        self.own.exec_module(module)

class Legacy:
    def __init__(self, own):
        self.own = own
    def load_module(self, name):
        return self.own.load_module(name)

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if name == "timm":
            make = {{"wrapped": Proxy, "slots": Loader, "no exec_module": Legacy}}[kind]
            spec.loader = make(spec.loader)
        return spec

class Old:
    def find_module(self, name, path=None):
        return None

sys.meta_path.insert(0, Old() if kind == "no find_spec" else Finder)
import fixefficientnet
import timm
"""
    python(code + NAMES)


def test_an_import_of_timm_that_fails_may_be_tried_again(tmp_path: Path):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise ImportError('broken')")
    code = f"""
import sys
import fixefficientnet
sys.path.insert(0, {str(tmp_path)!r})
try:
    import timm
except ImportError as error:
    assert str(error) == "broken"
sys.path.remove({str(tmp_path)!r})
"""
    python(code + NAMES)


HUB = """
import os, sys
from importlib.machinery import PathFinder

BEFORE = os.environ.setdefault("PATH_BEFORE", os.pathsep.join(sys.path)).split(os.pathsep)

class Uninstalled:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "fixefficientnet":
            spec = PathFinder.find_spec(name, [place for place in sys.path if place not in BEFORE])
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return spec

sys.meta_path.insert(0, Uninstalled)
import torch
def load(place):
    return torch.hub.load(place, "fixefficientnet_lite0", source="local", pretrained=False, device="meta")
"""
"""Hides the installed package: what is found lies in a folder that was added to the path since."""


def hub(code: str, *, check: bool = True) -> str:
    return python(HUB + code, cwd=Path("/"), check=check)


def test_of_two_revisions_the_second_is_refused(tmp_path: Path):
    old, new = copy(tmp_path / "v1"), copy(tmp_path / "v2", "192")
    code = "print(load({!r}).preprocess.size)\n"
    assert hub(code.format(str(old))) == "256\n"
    assert hub(code.format(str(new))) == "192\n"
    both = code.format(str(old)) + code.format(str(new))
    said = hub(both, check=False)
    for part in ("ImportError", f"from {old} already", f"{new} holds another one", "Restart it"):
        assert part in said
    hub(code.format(str(old)) * 2)


def test_two_copies_of_one_revision_are_one(tmp_path: Path):
    one, two = copy(tmp_path / "one"), copy(tmp_path / "two")
    assert hub(f"print(load({str(one)!r}).preprocess.size, load({str(two)!r}).preprocess.size)") == "256 256\n"


def test_an_installed_copy_beside_another_revision(tmp_path: Path):
    installed, new = copy(tmp_path / "site-packages"), copy(tmp_path / "v2", "192")
    (installed / "weights_manifest.json").rename(installed / "fixefficientnet" / "weights_manifest.json")
    (installed / "recipes.toml").rename(installed / "fixefficientnet" / "recipes.toml")
    path = f"sys.path.append({str(installed)!r})\n"
    said = hub(f"{path}import fixefficientnet\nload({str(new)!r})", check=False)
    assert f"from {installed} already" in said
    assert hub(f"{path}print(load({str(new)!r}).preprocess.size)") == "192\n"  # nothing was loaded before
    same = copy(tmp_path / "same")
    assert hub(f"{path}import fixefficientnet\nprint(load({str(same)!r}).preprocess.size)") == "256\n"


def test_a_checkout_that_is_replaced_under_the_same_name(tmp_path: Path):
    """The force_reload of torch.hub replaces a branch so."""
    place = copy(tmp_path / "main")
    code = f"""
import shutil
load({str(place)!r})
shutil.rmtree({str(place)!r})
shutil.copytree({str(copy(tmp_path / "newer", "192"))!r}, {str(place)!r})
load({str(place)!r})
"""
    assert "holds another one" in hub(code, check=False)


PICKLED = """
import multiprocessing, pickle, sys
import torch

def shown(model):
    return model.variant.key, model.preprocess.size, tuple(model(torch.zeros(1, 3, 32, 32)).shape)

def ask(method, model):
    with multiprocessing.get_context(method).Pool(1) as pool:
        return pool.apply(shown, [model])
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_processes_get_a_model(tmp_path: Path, method: str):
    script = tmp_path / "script.py"
    script.write_text(
        PICKLED
        + f"""
if __name__ == "__main__":
    import fixefficientnet
    print(ask({method!r}, fixefficientnet.create("lite0", "backbone")))
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "('lite0', 256, (1, 1000))\n"


def test_spawned_processes_find_the_checkout_that_torch_hub_loaded(tmp_path: Path):
    """Where nothing is installed: a loading process that is given `model.preprocess`, for one."""
    place = copy(tmp_path / "hub")
    (tmp_path / "work.py").write_text("def size(preprocess):\n    return preprocess.size\n")
    code = f"""
if __name__ == "__main__":
    sys.path.append({str(tmp_path)!r})
    import multiprocessing
    from work import size
    preprocess = load({str(place)!r}).preprocess
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(size, [preprocess]))
"""
    script = tmp_path / "script.py"
    script.write_text(HUB + code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, cwd="/")
    assert done.stdout == "256\n", done.stderr


def test_a_pickled_model_brings_its_package_or_says_which_is_missing(tmp_path: Path):
    file = tmp_path / "model.pt"
    python(f"import torch, fixefficientnet; torch.save(fixefficientnet.create('lite0'), {str(file)!r})")
    load = f"import torch; model = torch.load({str(file)!r}, weights_only=False); print(model.variant.key)"
    assert python(load) == "lite0\n"
    assert hub(load, check=False).startswith("ModuleNotFoundError: No module named 'fixefficientnet")
