"""What a GPU computes at most, by its data sheet."""

# Dense bf16 TFLOP/s by a part of the device's name; the first match counts.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121}


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of a device of this name; None if its data sheet is not here."""
    return next((1e12 * tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)
