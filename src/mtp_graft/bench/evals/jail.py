"""Confine this process, then run a script in it: a program of its own, not a library.

    python -I -S jail.py SETTINGS SCRIPT ROLE

SETTINGS is JSON: `parent` (a process id), `without`, `cpu_s`, `memory_bytes`, `disk_bytes`. Four
layers, which overlap, are put on unless `without` names them:

- namespaces: no other process, no network, and a file system that holds nothing but Python's
  library (read-only) and one small folder in memory
- landlock: no other file either, no TCP, no signal to the outside
- seccomp: system calls by a list of allowed ones; no process, thread, socket, signal or mount
- limits: CPU time, memory, file size, open files

A layer that cannot be put on is said on standard error and ends the process with status 97. After
confinement nothing is written there again, so silence means that every layer holds.

Standard library only: the script runs without site-packages.
"""

import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, NoReturn

REFUSED = 97
BOX = "/box"

_LIBC = ctypes.CDLL(None, use_errno=True)

# Numbers of <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <linux/landlock.h>.
_NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000
_NEW_NETWORK = 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_NOSUID, _MS_NODEV = 4096, 16384, 1 << 18, 2, 4
_MNT_DETACH = 2
_ATTR_READ_ONLY = 0x1 | 0x2 | 0x4  # and no set-uid files, no devices
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_SYS_MOUNT_SETATTR = 442
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD_RULE, _SYS_LANDLOCK_RESTRICT = 444, 445, 446
_SYS_PIVOT_ROOT, _SYS_CAPSET = {"x86_64": (155, 126), "aarch64": (41, 91)}.get(
    os.uname().machine, (-1, -1)
)
#: Landlock's rights to files that exist since version 3, the first that covers truncation.
_LANDLOCK_FILE_RIGHTS = (1 << 15) - 1
_LANDLOCK_READ = (1 << 2) | (1 << 3)  # files and folders

#: Where shared libraries of Python's extension modules are, besides its own folder.
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")

# x86-64's system calls. Left out on purpose: whatever makes processes, threads, sockets or memory
# that is not in the address space (memfd, shared memory), signals, ptrace, other processes' memory,
# mounts, keys, io_uring, bpf and ioctl; prlimit64, which reaches other processes; and changes of
# modes, owners and times, which Landlock does not cover.
_ALLOWED_X86_64 = """
read 0 write 1 open 2 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 pread64 17 pwrite64 18 readv 19
writev 20 access 21 pipe 22 select 23 pselect6 270 ppoll 271 dup 32 dup2 33 dup3 292 pipe2 293
mmap 9 mprotect 10 munmap 11 brk 12 mremap 25 madvise 28
rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15 sigaltstack 131 pause 34 restart_syscall 219
nanosleep 35 getitimer 36 alarm 37 setitimer 38 gettimeofday 96 times 100 time 201
clock_gettime 228 clock_getres 229 clock_nanosleep 230
getpid 39 getppid 110 getpgrp 111 gettid 186 getuid 102 getgid 104 geteuid 107 getegid 108
getgroups 115 uname 63 getrusage 98 sysinfo 99 getrandom 318
sched_yield 24 sched_getaffinity 204 futex 202 set_robust_list 273 rseq 334 exit 60 exit_group 231
flock 73 fsync 74 fdatasync 75 truncate 76 ftruncate 77 getdents 78 getdents64 217 getcwd 79
chdir 80 fchdir 81 rename 82 renameat 264 renameat2 316 mkdir 83 mkdirat 258 rmdir 84 creat 85
link 86 unlink 87 unlinkat 263 symlink 88 readlink 89 readlinkat 267 umask 95 statfs 137
fstatfs 138 openat 257 newfstatat 262 statx 332 faccessat 269 faccessat2 439 close_range 436
"""
_SYS_FCNTL, _SYS_CLONE3 = 72, 435
#: Duplicating, flags and locks; not F_SETOWN, which has the kernel send signals.
_ALLOWED_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
_AUDIT_ARCH_X86_64 = 0xC000003E


class _Unavailable(Exception):
    """A layer that this machine does not let us put on."""


def main() -> NoReturn:
    """Confine ourselves as the arguments say, then run the script's `main(role)`."""
    settings = json.loads(sys.argv[1])
    script, role = sys.argv[2:4]
    with open(script, encoding="utf-8") as file:
        code = compile(file.read(), script, "exec")
    null = os.open(os.devnull, os.O_RDWR)
    _end_with_parent()
    if os.getppid() != settings["parent"]:
        os._exit(REFUSED)  # it ended before it could take us with it
    try:
        _confine(settings)
    except _Unavailable as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(REFUSED)
    os.dup2(null, 2)
    module: dict[str, Any] = {"__name__": "guest"}
    exec(code, module)
    module["main"](role, null)
    os._exit(0)


def _confine(settings: dict[str, Any]) -> None:
    """Put on every layer that is not left out; only the confined process returns."""
    layers: dict[str, Callable[[], None]] = {
        "namespaces": lambda: _enter_namespaces(settings["disk_bytes"]),
        "landlock": _enter_landlock,
        "limits": lambda: _set_limits(settings),
        "seccomp": _enter_seccomp,  # the last: it forbids what the others need
    }
    for layer, enter in layers.items():
        try:
            if layer == "landlock":  # namespaces need capabilities, the others must not have them
                _drop_privileges()
            if layer not in settings["without"]:
                enter()
        except OSError as error:
            raise _Unavailable(f"{layer}: {error}") from error


def _end_with_parent() -> None:
    """Be killed when the process that started us ends, however it does."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _call(name: str, result: int) -> int:
    """Return what a C function returned; raises OSError with its name where it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _syscall(name: str, number: int, *arguments: Any) -> int:
    if number < 0:
        raise OSError(0, f"{name}: its number on {os.uname().machine} is not known here")
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _call(name, _LIBC.syscall(ctypes.c_long(number), *wide))


def _prctl(option: int, *arguments: int) -> None:
    wide = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    _call("prctl", _LIBC.prctl(option, *wide))


def _readable() -> list[str]:
    """Return the folders that Python needs to import its library, none inside another."""
    wanted = [path for path in sys.path if os.path.isdir(path)]
    wanted += [os.path.join(sys.base_prefix, "lib"), *_SYSTEM_LIBRARIES]
    found = sorted({path for path in wanted if os.path.isdir(path)})
    return [p for p in found if not any(p != q and p.startswith(q + "/") for q in found)]


def _enter_namespaces(disk_bytes: int) -> None:
    """Become process 1 of a world of our own; the process that was here waits for it."""
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", _LIBC.unshare(_NEW_NAMESPACES | _NEW_NETWORK))
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {uid} 1"),
        ("gid_map", f"0 {gid} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as target:
            target.write(text)
    watched, held = os.pipe()
    child = os.fork()
    if child:
        os.closerange(0, held)  # the pipes end with the child
        os.closerange(held + 1, 2**16)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    os.close(held)
    _end_with_parent()
    if select.select([watched], [], [], 0)[0]:
        os._exit(REFUSED)  # the end of a pipe that nobody holds: the other process has gone
    os.close(watched)
    _change_root(disk_bytes)


def _change_root(disk_bytes: int) -> None:
    """Leave nothing of the file system but what is readable, and an empty folder in memory."""
    root = "/dev"  # any folder that exists and holds nothing that is bound below
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=64k,nr_inodes=256")
    for path in _readable():
        os.makedirs(root + path, exist_ok=True)
        _mount(path, root + path, None, _MS_BIND | _MS_REC)
        _set_read_only(root + path)
    os.mkdir(root + BOX)
    box = f"size={disk_bytes},nr_inodes=1024,mode=700"
    _mount("tmpfs", root + BOX, "tmpfs", _MS_NOSUID | _MS_NODEV, box)
    os.chdir(root)
    _syscall("pivot_root", _SYS_PIVOT_ROOT, b".", b".")
    _call("umount2", _LIBC.umount2(b".", _MNT_DETACH))
    _set_read_only("/", recursive=False)
    os.chdir(BOX)


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    encoded = [None if text is None else text.encode() for text in (source, kind, options)]
    of, fs, data = encoded
    _call(f"mount {target}", _LIBC.mount(of, target.encode(), fs, ctypes.c_ulong(flags), data))


def _set_read_only(path: str, *, recursive: bool = True) -> None:
    attributes = struct.pack("=QQQQ", _ATTR_READ_ONLY, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    arguments = (_AT_FDCWD, path.encode(), flags, attributes, len(attributes))
    _syscall("mount_setattr", _SYS_MOUNT_SETATTR, *arguments)


def _drop_privileges() -> None:
    """Give up every capability, root's own ones too, and any way to gain one."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3, this process
    _syscall("capset", _SYS_CAPSET, header, struct.pack("=6I", 0, 0, 0, 0, 0, 0))


def _enter_landlock() -> None:
    version = _syscall("landlock_create_ruleset", _SYS_LANDLOCK_CREATE, None, 0, 1)
    if version < 3:
        raise OSError(0, f"version {version} of this kernel does not cover truncation, 3 does")
    no_tcp = 0b11 if version >= 4 else 0
    scoped = 0b11 if version >= 6 else 0  # abstract sockets and signals
    attributes = struct.pack("=QQQ", _LANDLOCK_FILE_RIGHTS, no_tcp, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _syscall("landlock_create_ruleset", _SYS_LANDLOCK_CREATE, attributes, size, 0)
    allowed = [(path, _LANDLOCK_READ) for path in _readable()]
    if os.getcwd() == BOX:  # made by the namespaces; without them nothing can be written
        allowed.append((BOX, _LANDLOCK_FILE_RIGHTS))
    for path, rights in allowed:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, folder)
        _syscall("landlock_add_rule", _SYS_LANDLOCK_ADD_RULE, rules, 1, rule, 0)
        os.close(folder)
    _syscall("landlock_restrict_self", _SYS_LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def _set_limits(settings: dict[str, Any]) -> None:
    values = {
        resource.RLIMIT_CPU: settings["cpu_s"],
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_FSIZE: settings["disk_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 1,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, value in values.items():
        resource.setrlimit(limit, (value, value))


def _enter_seccomp() -> None:
    if os.uname().machine != "x86_64" or sys.maxsize < 2**32:
        raise OSError(0, f"no list of system calls for {os.uname().machine}, only for x86_64")
    program = _filter()
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    header = ctypes.create_string_buffer(fprog, len(fprog))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(header))  # 2: a filter


def _filter() -> bytes:
    """Return the BPF program: allowed calls pass, the others fail with EPERM (seccomp(2))."""
    load, equal, give = 0x20, 0x15, 0x06  # load a word, jump if equal, return
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    calls, commands = [int(n) for n in _ALLOWED_X86_64.split()[1::2]], _ALLOWED_FCNTL
    code = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT_ARCH_X86_64), (give, 0, 0, kill)]
    code.append((load, 0, 0, 0))
    # Without clone3 the C library uses clone, and is told that it may not.
    code += [(equal, 0, 1, _SYS_CLONE3), (give, 0, 0, refuse | 38)]
    code += [(equal, 0, len(commands) + 2, _SYS_FCNTL), (load, 0, 0, 24)]  # its second argument
    code += [(equal, len(commands) - i + len(calls) + 1, 0, n) for i, n in enumerate(commands)]
    code.append((give, 0, 0, refuse | 1))
    code += [(equal, len(calls) - i, 0, n) for i, n in enumerate(calls)]
    code += [(give, 0, 0, refuse | 1), (give, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


if __name__ == "__main__":
    main()
