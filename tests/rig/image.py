# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest image: Debian's kernel, busybox, Debian's Python, the fence-agents library and this checkout.

Two archives in one file. The *base* holds what Debian ships; it is built in seconds and cached under a key of
its inputs. The *overlay* holds our packages and the rig's agent; it is made anew for each run in well under a
second. The kernel unpacks both, the overlay last.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode
from py_compile import compile as compile_file

from tests.rig.cpio import Tree, directory, link, regular
from tests.rig.kernel import MODULES, SHIPPED, Kernel, RigError, call, kernel

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "fence_vmchannel": CHECKOUT / "fence_vmchannel",
    "vmchannel_guest": CHECKOUT / "guest" / "vmchannel_guest",
    "vmchannel_agents": CHECKOUT / "agents" / "vmchannel_agents",
}
LAUNCHERS = {
    "/usr/sbin/fence_vmchannel": "vmchannel_agents.entry",
    "/usr/sbin/vmchannel-guestd": "vmchannel_guest.main",
    "/usr/bin/vmchannel": "vmchannel_guest.cli",
}
PYTHON = Path("/usr/bin/python3")
DIST_PACKAGES = Path("/usr/lib/python3/dist-packages")
FENCE_LIBRARY = Path("/usr/share/fence/fencing.py")
BUSYBOX = Path("/bin/busybox")

_DEBIAN_INPUTS = (
    "libc6",
    "busybox-static",
    "python3-pexpect",
    "python3-ptyprocess",
    "python3-pycurl",
    "fence-agents",
)
_STDLIB_LEFT_OUT = frozenset(
    {
        *("test", "idlelib", "lib2to3", "ensurepip", "tkinter", "turtledemo", "sqlite3", "venv", "distutils"),
        *("pydoc_data", "lib-dynload", "dist-packages", "__pycache__", "sitecustomize.py"),
    }
)
# without _ssl and _hashlib, asyncio does not load OpenSSL (a second under TCG); hashlib has its own code
_EXTENSIONS_LEFT_OUT = re.compile(
    r"^(_test|_xx|xx|_ctypes_test|_sqlite3|_dbm|_gdbm|_curses|_tkinter|_ssl|_hashlib|_codecs_|_crypt|nis|ossaudio|readline)"
)
_BASE_RECIPE = 2  # raise it when the code below changes what the base holds


@dataclass(frozen=True, slots=True)
class Image:
    """What QEMU boots."""

    kernel: Path
    initrd: Path
    disk: Path | None = None  # a root disk that all guests share, read-only


def default_cache() -> Path:
    """`$VMCHANNEL_CACHE`, else `.cache` in the checkout."""
    return Path(os.environ.get("VMCHANNEL_CACHE") or CHECKOUT / ".cache").absolute()


def build_image(cache: Path, folder: Path) -> Image:
    """Build the image from this checkout into `folder`; the base comes from the cache. Blocks for seconds.

    Raises:
        RigError: something of Debian's is missing.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache):
        linux = kernel(cache)
        base = _base(cache, linux)
        initrd = folder / "initrd"
        with initrd.open("wb") as out:
            with base.open("rb") as source:
                shutil.copyfileobj(source, out, 1 << 20)
            _overlay(cache).write(out)
    return Image(linux.boot, initrd)


@contextmanager
def locked(cache: Path) -> Generator[None, None, None]:
    """Keep other processes out of the cache; waits for them."""
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _base(cache: Path, linux: Kernel) -> Path:
    key = hashlib.sha256(f"{_BASE_RECIPE} {linux.version} {_debian_versions()}".encode()).hexdigest()[:16]
    path = cache / f"base-{key}.cpio"
    if not path.exists():
        for stale in cache.glob("base-*.cpio"):
            stale.unlink()
        tree = Tree()
        _add_system(tree)
        _add_python(tree)
        _add_modules(tree, linux)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as out:
            tree.write(out)
        partial.rename(path)
    return path


def _debian_versions() -> str:
    python = PYTHON.resolve().name  # the package of that name carries the security updates, python3 does not
    packages = (f"{python}-minimal", f"lib{python}-stdlib", *_DEBIAN_INPUTS)
    return call("dpkg-query", "-W", "-f", "${Package} ${Version}\n", *packages)


def _add_system(tree: Tree) -> None:
    for name in ("bin", "sbin", "lib", "lib64"):
        tree.add(f"/{name}", link(f"usr/{name}"))
    for name in ("proc", "sys", "dev", "run", "root", "var/lib", "usr/share"):
        tree.add(f"/{name}", directory())
    tree.add("/tmp", directory(0o1777))
    tree.copy(BUSYBOX, "/usr/bin/busybox")
    for applet in call(str(BUSYBOX), "--list").split():
        if applet != "busybox":
            tree.add(f"/usr/bin/{applet}", link("busybox"))
    users = {"root": 0, "daemon": 1, "haclient": 189, "user": 1000, "nobody": 65534}
    passwd = "".join(f"{name}:x:{number}:{number}::/root:/bin/sh\n" for name, number in users.items())
    tree.add("/etc/passwd", regular(passwd.encode()))
    tree.add("/etc/group", regular("".join(f"{n}:x:{i}:\n" for n, i in users.items()).encode()))
    tree.add("/etc/hosts", regular(b"127.0.0.1 localhost\n"))


def _add_python(tree: Tree) -> None:
    """The interpreter and the standard library, byte-compiled only: compiling under TCG is slow."""
    program = PYTHON.resolve()
    library = Path("/usr/lib") / program.name
    extensions = [p for p in (library / "lib-dynload").glob("*.so") if not _EXTENSIONS_LEFT_OUT.match(p.name)]
    extensions += DIST_PACKAGES.glob("pycurl.*.so")
    tree.copy(program, f"/usr/bin/{program.name}")
    tree.add("/usr/bin/python3", link(program.name))
    for binary in extensions:
        tree.copy(binary, str(binary))
    for shared in _shared_libraries([program, *extensions]):
        tree.copy(shared, str(shared.parent.resolve() / shared.name))  # /lib is a link in the tree too
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch)
        _stage(library, staged / library.relative_to("/"), _STDLIB_LEFT_OUT)
        for package in ("pexpect", "ptyprocess", "curl"):
            _stage(DIST_PACKAGES / package, staged / DIST_PACKAGES.relative_to("/") / package, frozenset())
        fencing = staged / FENCE_LIBRARY.relative_to("/")
        fencing.parent.mkdir(parents=True)
        shutil.copyfile(FENCE_LIBRARY, fencing)
        call(str(PYTHON), "-m", "compileall", "-b", "-q", "-j2", "-s", scratch, "-p", "/", scratch)
        for compiled in staged.rglob("*.pyc"):
            tree.copy(compiled, f"/{compiled.relative_to(staged)}")


def _stage(source: Path, target: Path, left_out: frozenset[str]) -> None:
    def skip(folder: str, names: list[str]) -> Iterable[str]:
        return [
            n for n in names if n in left_out or not (n.endswith(".py") or Path(folder, n).is_dir())
        ]  # data files have no use here

    shutil.copytree(source, target, ignore=skip)


def _shared_libraries(binaries: list[Path]) -> set[Path]:
    """What the dynamic loader wants for them, the loader included."""
    found = call("ldd", *map(str, binaries))
    return {Path(path) for path in re.findall(r"(?:=> |^\t)(/\S+) \(0x", found, re.MULTILINE)}


def _add_modules(tree: Tree, linux: Kernel) -> None:
    root = f"/usr/lib/modules/{linux.version}"
    for module in linux.load_order(SHIPPED):
        tree.copy(linux.modules / module, f"{root}/{module}")
    for name in ("modules.dep", "modules.alias"):
        tree.copy(linux.modules / name, f"{root}/{name}")
    tree.add("/rig/modules", regular("".join(f"{root}/{m}\n" for m in linux.load_order(MODULES)).encode()))


def _overlay(cache: Path) -> Tree:
    """Our packages (source and byte code), their launchers and the rig's own files."""
    tree = Tree()
    files = Path(__file__).parent / "guest_files"
    tree.add("/init", regular((files / "init").read_bytes(), executable=True))
    tree.copy(files / "agent.py", "/rig/agent.py")
    for name, folder in PACKAGES.items():
        for source in folder.rglob("*.py"):
            path = DIST_PACKAGES / name / source.relative_to(folder)
            tree.copy(source, str(path))
            if compiled := byte_code(cache, source, path):
                tree.copy(
                    compiled, f"{path.parent}/__pycache__/{path.stem}.{sys.implementation.cache_tag}.pyc"
                )
    for command, module in LAUNCHERS.items():
        tree.add(command, regular(_launcher(module), executable=True))
    return tree


def _launcher(module: str) -> bytes:
    return f"#!/usr/bin/python3\nimport sys\n\nfrom {module} import main\n\nsys.exit(main())\n".encode()


def byte_code(cache: Path, source: Path, guest_path: Path) -> Path | None:
    """Compiled once per content. None under another Python than the guest's."""
    if PYTHON.resolve().name != f"python{sys.version_info.major}.{sys.version_info.minor}":
        return None
    key = hashlib.sha256(f"{guest_path}\0".encode() + source.read_bytes()).hexdigest()
    compiled = cache / "pyc" / f"{key}.pyc"
    if not compiled.exists():
        mode = PycInvalidationMode.UNCHECKED_HASH  # the archive keeps no times
        compile_file(
            str(source), str(compiled), str(guest_path), doraise=True, optimize=0, invalidation_mode=mode
        )
    return compiled


def require_tools() -> None:
    """Say early what is missing on this machine.

    Raises:
        RigError: naming the Debian packages to install.
    """
    wanted = {
        "qemu-system-x86_64": "qemu-system-x86",
        "busybox": "busybox-static",
        "depmod": "kmod",
        "setpriv": "util-linux",
    }
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [package for tool, package in wanted.items() if shutil.which(tool, path=path) is None]
    missing += [] if FENCE_LIBRARY.exists() else ["fence-agents"]
    if missing:
        raise RigError(f"missing Debian packages: {' '.join(missing)}; `make deps` installs them")
