"""What GPUs can do by their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSheet:
    """bf16_flops: dense, a second; what model FLOPs utilisation (MFU) is against. dram_bytes: a second."""

    name: str
    bf16_flops: float
    dram_bytes: float


DATA_SHEETS = (
    DataSheet("L40S", 362e12, 864e9),
    DataSheet("A100", 312e12, 2039e9),
    DataSheet("H100", 989e12, 3350e9),
    DataSheet("H200", 989e12, 4800e9),
    DataSheet("B200", 2250e12, 8000e9),
    DataSheet("MI300X", 1307e12, 5300e9),
)


def data_sheet(name: str) -> DataSheet | None:
    """Of the GPU that its driver, or who rents it out, calls by this name. None if it is not among them."""
    return next((sheet for sheet in DATA_SHEETS if sheet.name in name), None)
