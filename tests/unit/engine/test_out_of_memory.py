"""Out of memory in all its disguises, and what only looks like it."""

import errno

import pytest
import torch

from segfit.engine.out_of_memory import is_out_of_memory
from segfit.errors import SegFitError
from tests.unit.engine.fakes import Recorder, make_fit

DISGUISES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 7.79 GiB total capacity)"
    ),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error\nLast error:\n"
        "Cuda failure 2 'out of memory'"
    ),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.92 GB)"),
    RuntimeError(
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a"
    ),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("Unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "68719476736 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate "
        "68719476736 bytes."
    ),
    RuntimeError("unable to mmap 1024 bytes from file: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)"),
    RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_MAPPING_ERROR"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    ValueError("CUDA out of memory is what this sentence is about"),
    OSError(errno.ENOSPC, "No space left on device"),
    KeyboardInterrupt(),
]


def name(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:50]}"


@pytest.mark.parametrize("error", DISGUISES, ids=name)
def test_a_disguise_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=name)
def test_another_error_is_not(error):
    assert not is_out_of_memory(error)


def test_what_this_machine_says_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


class Failing:
    """A forward that fails with more than `fits` samples."""

    def __init__(self, model, error, fits):
        self.model, self.error, self.fits = model, error, fits

    def __call__(self, inputs):
        if len(inputs) > self.fits:
            raise self.error
        return self.model(inputs)


def failing_fit(folder, error, fits):
    fit = make_fit(folder, epochs=1)
    fit.state.forward = Failing(fit.state.model, error, fits)
    return fit


@pytest.mark.parametrize("error", [DISGUISES[0], DISGUISES[8], MemoryError()], ids=name)
def test_training_goes_on_with_a_smaller_micro_batch(tmp_path, error):
    heard = Recorder()
    failing_fit(tmp_path, error, 1).run(heard, {})
    assert len(heard.notices) == 1
    assert "out of memory with a micro-batch of 2: continuing with 1" in heard.notices[0]
    assert len(heard.losses) == 4


def test_another_error_ends_training(tmp_path):
    heard = Recorder()
    with pytest.raises(RuntimeError, match="BAD_PARAM"):
        failing_fit(tmp_path, OTHERS[1], 1).run(heard, {})
    assert heard.notices == []


def test_what_was_none_of_memory_after_all_is_quoted(tmp_path):
    error = RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR\nmore")
    with pytest.raises(
        SegFitError, match=r"The error was: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR$"
    ):
        failing_fit(tmp_path, error, 0).run(Recorder(), {})
