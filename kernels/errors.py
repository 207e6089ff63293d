"""The errors that kernels raise on purpose; each message says what to do.

KernelError
├── LayoutError      (ValueError)   a format, or a packed weight, that cannot be
├── CodeError        (ValueError)   a tensor that a lossless code has no room for
├── KernelInputError (ValueError)   arguments that a kernel cannot take; raised before any launch
├── KernelMissing                   no binary of a kernel's variant, and compiling here is forbidden
├── LaunchError                     the driver or the card refused a kernel
└── BundleError                     an archive of compiled kernels is broken, or cannot be built
"""


class KernelError(Exception):
    """Base of all errors that `kernels/` raises on purpose."""


class LayoutError(KernelError, ValueError):
    """A weight format that does not exist, or tensors that are not in it."""


class CodeError(KernelError, ValueError):
    """A tensor that does not fit its lossless code: it has to travel as it is."""


class KernelInputError(KernelError, ValueError):
    """Arguments of the wrong dtype, shape, device or alignment; nothing was launched."""


class KernelMissing(KernelError, RuntimeError):
    """The bundle lacks a variant of a kernel, and compiling it here is forbidden."""


class LaunchError(KernelError, RuntimeError):
    """The driver refused a module or a launch, in its own words, or the card is too small."""


class BundleError(KernelError, RuntimeError):
    """An archive of compiled kernels that cannot be read, trusted or built; names the file."""
