"""``python -m vqkernels``: print the state of the native kernels. Exit 0 either way."""

from vqkernels.status import native_status

if __name__ == "__main__":
    print(native_status())
