"""Names that a pickle of weights never needs, and that run code, read files or open connections when they are called.

The list makes a message, not safety: nothing that a pickle names is ever imported here (see `pickles`).
"""

import re

ROOTS = frozenset(
    # the system, and Python itself
    "os posix nt posixpath ntpath sys subprocess _posixsubprocess socket _socket socketserver importlib imp runpy "
    "builtins __builtin__ __builtins__ shutil commands popen2 pty pdb bdb code codeop site sysconfig "
    "ctypes _ctypes cffi signal atexit threading _thread multiprocessing concurrent asyncio inspect gc types marshal "
    "pickle _pickle cPickle dill cloudpickle zipimport pkgutil pydoc timeit trace profile cProfile doctest platform "
    "ensurepip venv pip setuptools distutils pkg_resources lib2to3 idlelib "
    # files and connections
    "io _io glob fileinput tempfile linecache mmap fcntl select selectors resource sqlite3 dbm shelve zipfile tarfile "
    "urllib urllib2 urllib3 http httplib ftplib smtplib poplib imaplib telnetlib nntplib xmlrpc xmlrpclib ssl "
    "webbrowser wsgiref requests httpx aiohttp paramiko fabric tornado boto3 winreg _winreg msvcrt _winapi "
    "yaml joblib IPython ipykernel jupyter logging antigravity".split()
)
WITHIN = frozenset(  # wherever they stand: `torch.os.system`, `six.moves.builtins.eval`
    "os posix nt sys subprocess socket importlib runpy builtins __builtin__ __builtins__ shutil ctypes pickle".split()
)
FUNCTIONS = frozenset("eval exec execfile system popen import_module load_library cpp_extension".split())
HARMLESS = frozenset(
    [f"{root}.{name}" for root in ("builtins", "__builtin__") for name in (
        "set frozenset list dict tuple int long float complex bool str unicode bytes bytearray object slice range "
        "xrange type NoneType Ellipsis NotImplemented Exception ValueError"
    ).split()]
    + ["types.SimpleNamespace", "types.MappingProxyType", "io.BytesIO", "_io.BytesIO", "io.StringIO", "_io.StringIO"]
    + ["copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__"]
    + ["codecs.encode", "_codecs.encode", "logging.Logger", "logging.getLogger"]
)  # fmt: skip
MODULES = frozenset("copyreg copy_reg codecs _codecs".split())  # dangerous but for what is harmless
NAMES = re.compile(  # of libraries that are harmless otherwise
    r"operator\.(attrgetter|methodcaller)|_operator\.(attrgetter|methodcaller)|functools\.reduce"
    r"|torch\.(load|save|compile)|torch\.serialization\.(load|save|_load|_legacy_load)|torch\.hub\..*"
    r"|torch\.(ops|classes|_ops|_classes)\..*|torch\.jit\..*|torch\._dynamo\.guards\..*|torch\._inductor\..*|torch\.package\..*"
    r"|torch\.fx\..*|torch\.distributed\.rpc\..*|torch\.utils\.(cpp_extension|collect_env|bottleneck|_config_module|model_zoo)\..*"
    r"|torch\.utils\.data\.datapipes\..*|torch\.multiprocessing\..*|torch\.testing\..*|torch\.storage\._load_from_bytes"
    r"|numpy\.(load|save|fromfile|memmap|loadtxt|genfromtxt|f2py\..*|distutils\..*|testing\..*|lib\.npyio\..*)"
    r"|numpy\.lib\._npyio_impl\..*|uuid\._.*|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path\..*|typing\.get_type_hints|mailcap\..*"
    r"|pandas\.(read_\w+|eval|io\..*|core\.computation\..*)|test\.support.*|unittest\.mock\..*"
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
