"""Compressed frames to pixels, in another process, for damaged ones make decoders written in C crash, hang and swell.

Unusual: this file is two programs. Imported, it is the side that asks. Run as a script, by `_Helper`, it is the side
that decodes: it reads requests from its standard input, keeps to limits of time and memory, and ends when its input
does. It imports nothing of this package, so it starts in a fraction of a second, needs no `if __name__ == "__main__"`
in the caller's program, and works in notebooks, loader processes and threads alike. Each thread that decodes at the
same time has a helper of its own; they are kept for later, and one that dies is replaced.

Nothing that a decoder says reaches the caller's output: what is written to the helper's standard error counts as a
report of damage.
"""

import atexit
import contextlib
import errno
import faulthandler
import importlib
import importlib.util
import io
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

try:
    import resource
except ImportError:  # Windows, where only time is limited
    resource = None

START_SECONDS = 60.0
SECONDS = 3.0
"""For a frame; sound ones of 512 x 512 take some hundredths."""
SECONDS_PER_PIXEL = 1.5e-6
MEMORY_BYTES = 2**29
"""For a frame, beyond what the helper has when it is ready."""
MEMORY_BYTES_PER_PIXEL = 16

# Module, rows, columns, bits allocated, seconds, bytes of memory, length.
_REQUEST = struct.Struct("<16sIIBdQQ")
_REPLY = struct.Struct("<BBBQ")  # outcome, bytes a pixel, whether signed, length
_READY, _DONE, _DAMAGED, _REPORTED, _NO_MEMORY = range(5)
_OUT_OF_TIME = 1
"""Exit status that `faulthandler` gives."""
_WORDS_BYTES = 4096
"""Reserved on the disk for what decoders say: if it gets full later, their reports must not be lost."""


class DecodeError(Exception):
    """A frame that cannot be decoded; says why in a few words of this file's own."""


class _DiedError(Exception):
    pass


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# ---------------------------------------------------------------------------------------------------------------------
# The side that asks
# ---------------------------------------------------------------------------------------------------------------------


class _Helper:
    """A process that decodes one frame after the other."""

    def __init__(self) -> None:
        if not sys.executable or getattr(sys, "frozen", False):
            raise OSError(errno.ENOEXEC, "there is no Python interpreter of its own")
        # The caller's paths, for packages that it found by them; -P keeps the names of this folder out.
        paths = os.pathsep.join(path for path in sys.path if path)
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, **threads, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"},
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self._is_ready = False

    def decode(self, module: str, data: bytes, shape: tuple[int, int], bits: int) -> np.ndarray:
        pixels = math.prod(shape)
        seconds = SECONDS + pixels * SECONDS_PER_PIXEL
        memory = MEMORY_BYTES + pixels * MEMORY_BYTES_PER_PIXEL + 2 * len(data)
        if not self._is_ready:
            self._read(_REPLY.size)
            self._is_ready = True
        self._write(_REQUEST.pack(module.encode(), *shape, bits, seconds, memory, len(data)))
        self._write(data)
        outcome, item_size, is_signed, length = _REPLY.unpack(self._read(_REPLY.size))
        if outcome != _DONE:
            reasons = {_REPORTED: "the decoder reports damage", _NO_MEMORY: "decoding it takes too much memory"}
            raise DecodeError(reasons.get(outcome, "damaged"))
        if item_size not in (1, 2, 4) or length != pixels * item_size:  # a helper that has lost its mind
            self._process.kill()
            raise _DiedError
        return np.frombuffer(self._read(length), f"<{'ui'[is_signed]}{item_size}").reshape(shape)

    def _write(self, data: bytes) -> None:
        unwritten = memoryview(data)
        try:
            while len(unwritten):
                unwritten = unwritten[self._process.stdin.write(unwritten) :]
        except OSError:
            raise _DiedError from None

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        unread = memoryview(data)
        while len(unread):
            received = self._process.stdout.readinto(unread)
            if not received:
                raise _DiedError
            unread = unread[received:]
        return data

    def why_dead(self) -> str:
        """What ended it, as far as its exit status tells."""
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:  # it has closed its end and lives on
            self._process.kill()
            status = self._process.wait()
        if not self._is_ready:
            return f"the process that decodes cannot be started (exit status {status})"
        return "decoding it takes too long" if status == _OUT_OF_TIME else "it crashes the decoder"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self.forget()

    def forget(self) -> None:
        """Let go of the pipes, without a word to the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.returncode = self._process.returncode or 0


class _Helpers:
    """Those of this process: the idle ones, and all."""

    def __init__(self) -> None:
        self.lock, self.idle, self.all = threading.Lock(), [], set()

    @contextlib.contextmanager
    def one(self) -> Iterator[_Helper]:
        """An idle or new one; whatever is raised meanwhile, other than `DecodeError`, ends it."""
        with self.lock:
            helper = self.idle.pop() if self.idle else self._start()
        try:
            yield helper
        except DecodeError:
            self._give_back(helper)
            raise
        except BaseException:
            with self.lock:
                self.all.discard(helper)
            helper.close()
            raise
        self._give_back(helper)

    def _start(self) -> _Helper:
        helper = _Helper()
        self.all.add(helper)
        return helper

    def _give_back(self, helper: _Helper) -> None:
        with self.lock:
            self.idle.append(helper)

    def warm_up(self) -> None:
        with self.lock:
            if not self.all:
                self.idle.append(self._start())

    def close(self) -> None:
        with self.lock:
            helpers, self.idle, self.all = self.all, [], set()
        for helper in helpers:
            helper.close()


_helpers = _Helpers()
atexit.register(lambda: _helpers.close())


def _after_fork() -> None:
    """A forked child has helpers of its own; the parent's must see their input end when the parent does."""
    global _helpers
    inherited, _helpers = _helpers.all, _Helpers()
    for helper in inherited:
        helper.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def warm_up() -> None:
    """Start a helper, if there is none yet, while the caller still does other things."""
    with contextlib.suppress(OSError):  # said when it is needed
        _helpers.warm_up()


def decode_frame(module: str, frame: bytes, shape: tuple[int, int], bits: int) -> np.ndarray:
    """The pixels of one grey frame.

    Args:
        module: Which decoder, a key of `DECODERS`.
        frame: Its code stream.
        shape: `(row, column)`, which must be what the code stream holds.
        bits: Allocated for a pixel, by the header.

    Returns:
        `shape`, integers as the code stream has them.

    Raises:
        DecodeError: If it is damaged, crashes the decoder, or takes too much time or memory.
    """
    reason = ""
    for _ in range(2):  # one that dies may have been somebody else's victim
        try:
            with _helpers.one() as helper:
                try:
                    return helper.decode(module, frame, shape, bits)
                except _DiedError:
                    reason = helper.why_dead()
                    raise
        except _DiedError:
            if "too long" in reason:
                break
        except OSError as error:
            reason = f"the process that decodes cannot be started ({error.strerror})"
            break
    raise DecodeError(reason)


# ---------------------------------------------------------------------------------------------------------------------
# The side that decodes
# ---------------------------------------------------------------------------------------------------------------------

_Pixels = tuple[bytes, int, bool]
"""Their bytes, how many one takes, and whether it is signed."""


def _container_bytes(precision: int) -> int:
    return 1 if precision <= 8 else 2 if precision <= 16 else 4


def _openjpeg(openjpeg, frame: bytes, shape: tuple[int, int], bits: int) -> _Pixels:
    found = openjpeg.get_parameters(frame)
    if (found["rows"], found["columns"], found["samples_per_pixel"]) != (*shape, 1):
        raise ValueError("another size")
    pixels = openjpeg.decode_pixel_data(frame, version=2)
    return pixels, _container_bytes(found["precision"]), bool(found["is_signed"])


def _jpeg_ls(jpeg_ls, frame: bytes, shape: tuple[int, int], bits: int) -> _Pixels:
    pixels, found = jpeg_ls.decode_pixel_data(frame)
    if (found["height"], found["width"], found["components"]) != (*shape, 1):
        raise ValueError("another size")
    return pixels, _container_bytes(found["bits_per_sample"]), False


def _gdcm(gdcm, frame: bytes, shape: tuple[int, int], bits: int) -> _Pixels:
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(bytes(frame))
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((shape[1], shape[0], 1))
    image.SetDataElement(element)
    grey = gdcm.PhotometricInterpretation.GetPIType("MONOCHROME2")
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(grey))
    lossless = gdcm.TransferSyntax.GetTSType("1.2.840.10008.1.2.4.57")  # whichever JPEG it is
    image.SetTransferSyntax(gdcm.TransferSyntax(lossless))
    # All bits as stored: the unused ones of the header would be blanked, and are needed to count what was consumed.
    image.SetPixelFormat(gdcm.PixelFormat(1, bits, bits, bits - 1, 0))
    # Bytes come as text.
    return image.GetBuffer().encode("utf-8", "surrogateescape"), _container_bytes(bits), False


DECODERS = {"openjpeg": _openjpeg, "jpeg_ls": _jpeg_ls, "gdcm": _gdcm}


def _limit_memory(count: int) -> None:
    """So many bytes more than now, where the system knows how many those are."""
    if resource is not None:
        with contextlib.suppress(OSError, ValueError):
            used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
            _, most = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (used + count, most))


def _reply(replies: io.RawIOBase, outcome: int, pixels: _Pixels = (b"", 0, False)) -> None:
    data, item_size, is_signed = pixels
    for part in (_REPLY.pack(outcome, item_size, is_signed, len(data)), data):
        unwritten = memoryview(part)
        while len(unwritten):
            unwritten = unwritten[replies.write(unwritten) :]


def _run() -> None:
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    silence = os.open(os.devnull, os.O_RDWR)
    # What is printed by decoders, or inherited by nobody, must not get among the replies.
    os.dup2(silence, 0)
    os.dup2(silence, 1)
    quiet = os.fdopen(silence, "w")
    faulthandler.dump_traceback_later(START_SECONDS, exit=True, file=quiet)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, whose end is this one's
    words = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    words.write(bytes(_WORDS_BYTES))
    os.dup2(words.fileno(), 2)
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    warnings.simplefilter("ignore")
    logging.disable()
    for name in DECODERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    faulthandler.cancel_dump_traceback_later()
    _reply(replies, _READY)
    while len(header := requests.read(_REQUEST.size)) == _REQUEST.size:
        name, *shape, bits, seconds, memory, length = _REQUEST.unpack(header)
        data = requests.read(length)
        name = name.rstrip(b"\0").decode()
        faulthandler.dump_traceback_later(START_SECONDS, exit=True, file=quiet)
        module = importlib.import_module(name)
        words.seek(0)
        words.truncate(_WORDS_BYTES)
        faulthandler.dump_traceback_later(seconds, exit=True, file=quiet)
        _limit_memory(memory)
        pixels, outcome = (b"", 0, False), _DAMAGED
        try:
            pixels = DECODERS[name](module, data, tuple(shape), bits)
            outcome = _REPORTED if words.tell() else _DONE
            if len(pixels[0]) != math.prod(shape) * pixels[1]:
                outcome = _DAMAGED
        except MemoryError:
            outcome = _NO_MEMORY
        except Exception:  # decoders raise many kinds
            outcome = _DAMAGED
        faulthandler.cancel_dump_traceback_later()
        _reply(replies, outcome, pixels if outcome == _DONE else (b"", 0, False))


if __name__ == "__main__":
    _run()

__all__ = ["DECODERS", "DecodeError", "decode_frame", "is_installed", "warm_up"]
