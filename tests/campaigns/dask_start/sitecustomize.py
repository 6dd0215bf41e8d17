"""A log of conversions, and faults of workers, for `tests.campaigns.dask_kills`: Python runs this
file at the start of every process whose PYTHONPATH names its folder.

    CONVERSIONS=FILE   each conversion appends "begin" and "end" with a time (monotonic), the exam's
                       key and the worker's name
    WORKER=NAME        that name
    SECONDS=NUMBER     each conversion takes so much longer
    HOG=BYTES          each exam takes so much memory of the worker itself
    FORGET=1           finished exams are not known again
"""

import functools
import importlib.machinery
import os
import sys
import time


def _log(word: str, key: str) -> None:
    line = f"{time.monotonic():.3f} {word} {key} {os.environ.get('WORKER', '-')}\n"
    descriptor = os.open(os.environ["CONVERSIONS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def _patch_convert(module) -> None:
    convert_exam = module.convert_exam

    @functools.wraps(convert_exam)
    def logged(conversion, exam):
        key = module.exam_key(conversion, exam)
        _log("begin", key)
        time.sleep(float(os.environ.get("SECONDS", 0)))
        result = convert_exam(conversion, exam)
        _log("end", key)
        return result

    module.convert_exam = logged


def _patch_notes(module) -> None:
    if os.environ.get("FORGET"):
        module.final_note = lambda conversion, key: None


def _patch_beam(module) -> None:
    if os.environ.get("HOG"):
        convert_once = module.convert_once

        def hogging(*arguments):
            hog = bytearray(int(os.environ["HOG"]))
            hog[::4096] = b"x" * len(hog[::4096])
            time.sleep(20)  # the nanny looks ten times a second
            convert_once(*arguments)

        module.convert_once = hogging


_PATCHES = {
    "data_prep.pipeline.convert": _patch_convert,
    "data_prep.pipeline.notes": _patch_notes,
    "data_prep.pipeline.beam": _patch_beam,
}


class _Patched:
    """Finds the modules to patch, and patches them once they are executed."""

    @staticmethod
    def find_spec(name, path, target=None):
        if name not in _PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _PATCHES[name](module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("CONVERSIONS"):
    sys.meta_path.insert(0, _Patched)
