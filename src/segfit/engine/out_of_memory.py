"""Which errors of torch, CUDA and its libraries mean that memory ran out."""

import errno
import gc

import torch

_SIGNS = (
    "cuda out of memory",
    "hip out of memory",
    "cuda error: out of memory",  # the driver's or the runtime's, past torch's allocator
    "cuda driver error: out of memory",
    "cudaerrormemoryallocation",
    "'out of memory'",  # NCCL: Cuda failure 2 'out of memory'
    "mps backend out of memory",
    "_status_alloc_failed",  # cuDNN, cuBLAS, cuSOLVER, cuSPARSE
    "_allocation_failed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED and others
    "cufft_alloc_failed",
    "defaultcpuallocator: can't allocate memory",
    "not enough memory: you tried to allocate",  # the same on Windows
    "cannot allocate memory",  # what the C library calls ENOMEM
    "bad_alloc",
    # The others only probably: from cuDNN and cuBLAS if no algorithm's workspace fits, or their own handle does not.
    "cudnn_status_not_supported",
    "cudnn_status_internal_error",
    "unable to find an engine to execute this computation",
    "cublas_status_not_initialized",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory of the device or of the host ran out.

    cuDNN and cuBLAS have no status for a workspace that does not fit: CUDNN_STATUS_NOT_SUPPORTED,
    CUDNN_STATUS_INTERNAL_ERROR, CUBLAS_STATUS_NOT_INITIALIZED and "unable to find an engine" count as out of memory,
    since a smaller batch nearly always helps; callers should show the message in case it does not.
    Statuses of wrong use or of a failed kernel (BAD_PARAM, EXECUTION_FAILED, MAPPING_ERROR), illegal accesses, and a
    Triton kernel that lacks shared memory (a property of the kernel, not of the batch) do not count.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):  # torch.AcceleratorError is one
        return False
    text = str(error).lower()
    return any(sign in text for sign in _SIGNS)


def release_memory() -> None:
    """Free what a failed pass held; call this outside of the `except` block, whose traceback holds tensors."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
