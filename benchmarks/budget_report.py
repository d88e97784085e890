"""Results of a benchmark as they come: printed, kept on disk, and within a time budget."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import triton


class Report:
    """Rows of results, kept on disk as they come, within a time budget."""

    def __init__(self, path: Path, seconds: float, device: torch.device) -> None:
        self.path, self.deadline = path, time.time() + seconds
        self.rows: list[dict[str, Any]] = []
        self.meta: dict[str, Any] = {"torch": torch.__version__, "triton": getattr(triton, "__version__", None)}
        self.meta["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        self.meta["mma_sync"] = os.environ.get("DISABLE_MMA_V3") == "1"

    def left(self) -> float:
        return self.deadline - time.time()

    def add(self, section: str, **row: Any) -> None:
        self.rows.append({"section": section, **row})
        shown = " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                         for key, value in row.items())  # fmt: skip
        print(f"[{section}] {shown}"[:220], flush=True)

    def save(self) -> None:
        self.path.write_text(json.dumps({"meta": self.meta, "rows": self.rows}, indent=0))
