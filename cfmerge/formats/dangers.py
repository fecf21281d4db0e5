"""Names that a pickle of weights never needs, and that run code, read files or open connections when they are called.

The list makes a message, not safety: nothing that a pickle names is ever imported here (see `pickles`).
"""

import re

_ROOTS = (  # the system and Python itself; files and connections
    "os posix nt posixpath ntpath sys subprocess _posixsubprocess socket _socket socketserver importlib imp runpy "
    "builtins __builtin__ __builtins__ shutil commands popen2 pty pdb bdb code codeop site sysconfig ctypes _ctypes "
    "cffi signal atexit threading _thread multiprocessing concurrent asyncio inspect gc types marshal pickle _pickle "
    "cPickle dill cloudpickle zipimport pkgutil pydoc timeit trace profile cProfile doctest platform ensurepip venv "
    "pip setuptools distutils pkg_resources lib2to3 idlelib io _io glob fileinput tempfile linecache mmap fcntl select "
    "selectors resource sqlite3 dbm shelve zipfile tarfile urllib urllib2 urllib3 http httplib ftplib smtplib poplib "
    "imaplib telnetlib nntplib xmlrpc xmlrpclib ssl webbrowser wsgiref requests httpx aiohttp paramiko fabric tornado "
    "boto3 winreg _winreg msvcrt _winapi yaml joblib IPython ipykernel jupyter logging antigravity"
)
_WITHIN = "os posix nt sys subprocess socket importlib runpy builtins __builtin__ __builtins__ shutil ctypes pickle"
_FUNCTIONS = "eval exec execfile system popen import_module load_library cpp_extension"
_TYPES = (
    "set frozenset list dict tuple int long float complex bool str unicode bytes bytearray object slice range xrange "
    "type NoneType Ellipsis NotImplemented Exception ValueError"
)
_HARMLESS = (
    "types.SimpleNamespace types.MappingProxyType io.BytesIO _io.BytesIO io.StringIO _io.StringIO codecs.encode "
    "_codecs.encode copyreg._reconstructor copy_reg._reconstructor copyreg.__newobj__ copyreg.__newobj_ex__ "
    "logging.Logger logging.getLogger"
)
ROOTS = frozenset(_ROOTS.split())
MODULES = frozenset({"copyreg", "copy_reg", "codecs", "_codecs"})  # dangerous but for what is harmless
WITHIN = frozenset(_WITHIN.split())  # wherever they stand: `torch.os.system`, `six.moves.builtins.eval`
FUNCTIONS = frozenset(_FUNCTIONS.split())
HARMLESS = frozenset(
    [*_HARMLESS.split(), *(f"{root}.{name}" for root in ("builtins", "__builtin__") for name in _TYPES.split())]
)
NAMES = re.compile(  # of libraries that are harmless otherwise
    r"_?operator\.(attrgetter|methodcaller)|functools\.reduce|typing\.get_type_hints|mailcap\..*|uuid\._.*"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path\..*|test\.support.*|unittest\.mock\..*"
    r"|torch\.(load|save|compile)|torch\.serialization\.(load|save|_load|_legacy_load)|torch\.storage\._load_from_bytes"
    r"|torch\.(hub|jit|ops|classes|_ops|_classes|_inductor|package|fx|multiprocessing|testing)\..*"
    r"|torch\._dynamo\.guards\..*|torch\.distributed\.rpc\..*|torch\.utils\.data\.datapipes\..*"
    r"|torch\.utils\.(cpp_extension|collect_env|bottleneck|_config_module|model_zoo)\..*"
    r"|numpy\.(load|save|fromfile|memmap|loadtxt|genfromtxt|f2py\..*|distutils\..*|testing\..*|lib\._?npyio.*)"
    r"|pandas\.(read_\w+|eval|io\..*|core\.computation\..*)"
)


def danger(module: str, name: str) -> bool:
    """Whether a pickle that names it is refused.

    >>> danger("os", "system"), danger("torch", "os.system"), danger("collections", "OrderedDict")
    (True, True, False)
    """
    if f"{module}.{name}" in HARMLESS:
        return False
    modules, names = re.split(r"[.\s]", module), re.split(r"[.\s]", name)
    return (
        modules[0] in ROOTS
        or module in MODULES
        or not WITHIN.isdisjoint(modules[1:] + names)
        or not FUNCTIONS.isdisjoint(names)
        or any(part.startswith("__") and part.endswith("__") for part in names)
        or NAMES.fullmatch(f"{module}.{name}") is not None
    )
